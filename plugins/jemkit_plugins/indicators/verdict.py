"""The indicators of every figure of a model, from one run of the probes.

After Athalye et al. (2018), Carlini et al. (2019) and Pintor et al. (2022).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jemkit.attacks.pixel_model import PixelModel
from jemkit.data import Images
from jemkit.metrics.attack_runner import Attacked
from jemkit.metrics.evaluator import Context
from jemkit.metrics.figures import share
from jemkit.metrics.outputs import Finding
from jemkit_plugins.indicators.findings import aa_under_pgd, against, of_model
from jemkit_plugins.indicators.plan import FINDINGS, PGD_STEPS
from jemkit_plugins.indicators.probes import Probes, probe


def examine(
    subject: PixelModel,
    data: Images,
    attacks: Mapping[str, Attacked],
    ctx: Context,
    n_images: int,
    budget: int | None = None,
) -> dict[str, list[Finding]]:
    """Findings for every figure by its label; the curves and the plan go to the notes.

    `attacks` has the result of each attack by name. The probes run on at most `n_images` correctly
    classified images, for at most `budget` passes of one image. If no image is classified correctly
    there are no findings.
    """
    first = outputs_of(ctx)
    probes = probe(subject, data, ctx, n_images, budget)
    if probes is None:
        return {one.label: first for one in attacks.values()}
    _leave_curves(probes, ctx)
    _leave_plan(probes, budget, ctx)
    common = [*first, *of_model(probes)]
    verdict = {one.label: [*common, *against(probes, one)] for one in attacks.values()}
    if {"pgd", "aa"} <= attacks.keys():
        row = aa_under_pgd(attacks["pgd"], attacks["aa"])
        for name in ("pgd", "aa"):
            verdict[attacks[name].label].append(row)
    return verdict


def outputs_of(ctx: Context) -> list[Finding]:
    """The finding about the model's outputs, if they were checked."""
    row = ctx.notes.tables.get("outputs")
    return [] if row is None else [row]


def _leave_plan(probes: Probes, budget: int | None, ctx: Context) -> None:
    plan = probes.plan
    ctx.notes.tables["indicators_plan"] = {
        "images": probes.n,
        "passes": plan.passes,
        "budget": budget,
        "left_out": [FINDINGS[name] for name in plan.left_out],
        "how": "--indicators full, or robustness.indicators = full, runs all of them",
    }


def _leave_curves(probes: Probes, ctx: Context) -> None:
    if probes.pgd is None:
        return
    curve = {"norm": ctx.threat.norm, "n": probes.examined}
    clean = {0.0: probes.pgd | True}
    if len(probes.radius) > 1:
        ctx.notes.tables["radius_curve"] = {
            **curve,
            "attack": f"pgd{PGD_STEPS}",
            "points": _points({**clean, **probes.radius}, probes.examined),
        }
    if probes.steps:
        ctx.notes.tables["steps_curve"] = {
            **curve,
            "attack": "pgd, its last state",
            "radius_px": ctx.threat.radius_px,
            "points": _points({**clean, **probes.steps}, probes.examined),
        }


def _points(right: Mapping[Any, Tensor], examined: int) -> list[list[float]]:
    """Accuracy with its interval at each point, on all images that were classified."""
    figures = {at: share("", int(rows.sum()), examined, {}) for at, rows in right.items()}
    return [[at, f.value, f.low or 0.0, f.high or 0.0] for at, f in figures.items()]
