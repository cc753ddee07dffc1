"""All laws of one part: what was tried, and the smallest counterexample to each that fails."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jemkit.errors import DataError, Preempted
from jemkit.testing.drawing import check_ascent, check_density, check_sampler, check_start
from jemkit.testing.judging import check_attack, check_dataset, check_distance, check_evaluator
from jemkit.testing.law import Tried, recorded
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


class Violation(NamedTuple):
    """A requirement that a part violates, by the smallest batch that shows it."""

    law: str
    requirement: str
    result: str
    images: int


class Examination(NamedTuple):
    """The requirements that a part was tested for, in order, and those that it violates."""

    tried: list[Tried]
    violations: list[Violation]
    stopped: str  # the error after which no more was tested; "" if there was none


def examine(kind: str, part: Any) -> Examination:
    """Test every law of a kind, also after one that the part violates."""
    tried, stopped = _tried(kind, part, images=6)
    smallest = {
        _subject(one): Violation(one.law, one.requirement, one.result, 6)
        for one in reversed(tried)
        if not one.holds
    }
    left = {*smallest}
    for images in range(1, 6):
        if not left:
            break
        for one in _tried(kind, part, images)[0]:
            if not one.holds and (subject := _subject(one)) in left:
                smallest[subject] = Violation(one.law, one.requirement, one.result, images)
                left.remove(subject)
    return Examination(tried, [*reversed(smallest.values())], stopped)


def _subject(one: Tried) -> tuple[str, str]:
    """A requirement without shapes, which depend on the number of images."""
    return one.law, re.sub(r"\[[\d, ]*\]", "", one.requirement)


def _tried(kind: str, part: Any, images: int) -> tuple[list[Tried], str]:
    with recorded() as tried, at_most(images):
        try:
            CHECKS[kind](part)
        except (DataError, Preempted):  # no fault of the part
            raise
        except Exception as error:
            came = f"it raised {type(error).__name__}: {error}"
            if all(one.holds for one in tried):  # else it may follow from what was violated
                tried.append(Tried("runs", "runs without an error", False, came))
            return tried, came
    return tried, ""
