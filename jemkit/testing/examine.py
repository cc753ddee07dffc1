"""All laws of one part: what was tried, and the smallest counterexample to the first that fails."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jemkit.errors import DataError, Preempted
from jemkit.testing.drawing import check_ascent, check_density, check_sampler, check_start
from jemkit.testing.judging import check_attack, check_dataset, check_distance, check_evaluator
from jemkit.testing.law import ConformanceError, Tried, recorded
from jemkit.testing.modelling import check_backbone, check_energy_model, check_network, small
from jemkit.testing.toys import at_most
from jemkit.testing.tracking import check_tracker
from jemkit.testing.training import check_objective, check_updater

CHECKS: Mapping[str, Callable[[Any], None]] = {
    "network": check_network,
    "energy": check_energy_model,
    "sampler": check_sampler,
    "start": check_start,
    "density": check_density,
    "backbone": lambda spec: check_backbone(small(spec)),
    "objective": check_objective,
    "updater": check_updater,
    "ascent": check_ascent,
    "distance": check_distance,
    "dataset": check_dataset,
    "attack": check_attack,
    "evaluator": check_evaluator,
    "tracker": check_tracker,
}
"""The check of each kind of part, by the kind's name."""


class Examination(NamedTuple):
    """The requirements that a part was tested for, in order; the last may be violated."""

    tried: list[Tried]
    images: int  # of the smallest batch that violates the last; 0 where all hold

    @property
    def violated(self) -> Tried | None:
        """The requirement that the part violates; None if all hold."""
        return next((one for one in self.tried if not one.holds), None)


def examine(kind: str, part: Any) -> Examination:
    """Test every law of a kind, up to the first that the part violates."""
    tried = _tried(kind, part, images=6)
    violated = next((one for one in tried if not one.holds), None)
    if violated is None:
        return Examination(tried, 0)
    for images in range(1, 6):
        fewer = _tried(kind, part, images)
        if not fewer[-1].holds and fewer[-1].law == violated.law:
            return Examination([*tried[:-1], fewer[-1]], images)
    return Examination(tried, 6)


def _tried(kind: str, part: Any, images: int) -> list[Tried]:
    with recorded() as tried, at_most(images):
        try:
            CHECKS[kind](part)
        except ConformanceError:
            pass
        except (DataError, Preempted):  # no fault of the part
            raise
        except Exception as error:
            came = f"it raised {type(error).__name__}: {error}"
            tried.append(Tried("runs", "runs without an error", False, came))
    return tried
