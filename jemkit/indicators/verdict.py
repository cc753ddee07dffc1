"""The indicators of every figure of a model, from one course of probes.

After Athalye et al. (2018), Carlini et al. (2019) and Pintor et al. (2022).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jemkit.cascade import Attacked
from jemkit.data import Images
from jemkit.evaluator import Context
from jemkit.figures import share
from jemkit.indicators.against import aa_under_pgd, black_box, transfer
from jemkit.indicators.findings import Finding
from jemkit.indicators.model import of_model
from jemkit.indicators.probes import PGD_STEPS, Probes, probe
from jemkit.pixels import PixelModel


def examine(
    subject: PixelModel, data: Images, found: Mapping[str, Attacked], ctx: Context, n_images: int
) -> dict[str, list[Finding]]:
    """Findings for every figure by its label; the curves go to the notes.

    `found` has what each attack made of the data, by the attack's name. The probes run on the
    first `n_images` that the model has right; where it has none right there is nothing to find.
    """
    probes = probe(subject, data, ctx, n_images)
    if probes is None:
        return {one.label: [] for one in found.values()}
    _leave_curves(probes, ctx)
    common = of_model(probes)
    verdict = {
        one.label: [*common, black_box(probes, one), transfer(probes, one)]
        for one in found.values()
    }
    if {"pgd", "aa"} <= found.keys():
        row = aa_under_pgd(found["pgd"], found["aa"])
        for name in ("pgd", "aa"):
            verdict[found[name].label].append(row)
    return verdict


def _leave_curves(probes: Probes, ctx: Context) -> None:
    if probes.climbs is None:
        return
    curve = {"norm": ctx.threat.norm, "n": probes.seen}
    clean = {0.0: probes.climbs.pgd | True}
    ctx.notes.tables["radius_curve"] = {
        **curve,
        "attack": f"pgd{PGD_STEPS}",
        "points": _points({**clean, **probes.climbs.radius}, probes.seen),
    }
    ctx.notes.tables["steps_curve"] = {
        **curve,
        "attack": "pgd, its last state",
        "radius_px": ctx.threat.radius_px,
        "points": _points({**clean, **probes.climbs.steps}, probes.seen),
    }


def _points(right: Mapping[Any, Tensor], seen: int) -> list[list[float]]:
    """Accuracy on all images that were looked through, with its interval, at each point."""
    figures = {at: share("", int(rows.sum()), seen, {}) for at, rows in right.items()}
    return [[at, f.value, f.low or 0.0, f.high or 0.0] for at, f in figures.items()]
