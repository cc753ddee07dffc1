"""Robustness: accuracy under every attack that is asked for, and whether to believe it."""

from collections.abc import Mapping

from pydantic import Field
from torch import arange

from jemkit.anchor import anchored
from jemkit.cascade import attacked
from jemkit.data import Images
from jemkit.evaluator import Context, Evaluator
from jemkit.figures import Figure
from jemkit.hookspecs import hookimpl
from jemkit.indicators import examine
from jemkit.options import Options
from jemkit.pixels import PixelModel
from jemkit.robustness import robust_share


class Robustness(Options):
    """Accuracy under each attack, with the failure indicators of each figure."""

    indicators: bool = True
    indicator_images: int = Field(128, ge=2)

    def unused(self) -> dict[str, str]:
        return {} if self.indicators else {"indicator_images": "where indicators is false"}

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        first = data.take(arange(min(2, len(data.y)))).to(ctx.rng.device)
        model = anchored(subject, first.unit())
        found = {
            name: attacked(model, attack, data, ctx, name) for name, attack in ctx.attacks.items()
        }
        figures = [robust_share(one, ctx) for one in found.values()]
        if self.indicators and found and ctx.shard.rank == 0:
            ctx.notes.tables["indicators"] = examine(model, data, found, ctx, self.indicator_images)
        return figures


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"robustness": Robustness}
