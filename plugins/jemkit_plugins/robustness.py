"""Robustness: accuracy under every requested attack, with failure indicators."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import arange

from jemkit import Context, Evaluator, Figure, Images, Options, PixelModel, hookimpl
from jemkit.attacks.pixel_model import with_gradient
from jemkit.metrics.attack_runner import Attacked, attacked, robust_share
from jemkit_plugins.indicators import examine, outputs_of
from jemkit_plugins.indicators.plan import QUICK_SHARE


class Robustness(Options):
    """Accuracy under each attack, with failure indicators for each figure.

    The indicators use at most as many passes through the model as the attacks, or half as many with
    --quick. The record lists the indicators that were omitted. "full" runs them all.
    """

    standard_at_any: ClassVar = frozenset({"indicators", "indicator_images"})

    indicators: bool | Literal["full"] = True  # failure indicators of each figure; full: all
    indicator_images: int = Field(128, ge=2)  # images for indicators, at most

    def unused(self) -> dict[str, str]:
        return {} if self.indicators else {"indicator_images": "where indicators is false"}

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        first = data.take(arange(min(2, len(data.y)))).to(ctx.rng.device)
        model = with_gradient(subject, first.unit())
        results = {
            name: attacked(model, attack, data, ctx, name) for name, attack in ctx.attacks.items()
        }
        figures = [robust_share(one, ctx) for one in results.values()]
        if results and ctx.shard.rank == 0:
            self._examine(model, data, results, ctx)
        return figures

    def _examine(
        self, model: PixelModel, data: Images, results: dict[str, Attacked], ctx: Context
    ) -> None:
        if self.indicators:
            spent = sum(one.passes for one in results.values())
            budget = int(spent * (QUICK_SHARE if ctx.quick else 1))
            limit = None if self.indicators == "full" else budget
            rows = examine(model, data, results, ctx, self.indicator_images, limit)
            ctx.notes.tables["indicators"] = rows
        elif any(row["flag"] for row in outputs_of(ctx)):
            ctx.notes.tables["indicators"] = {
                one.label: outputs_of(ctx) for one in results.values()
            }


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"robustness": Robustness}
