"""Indicators that hold an attack against others."""

from torch import Tensor

from jemkit.metrics.attack_runner import Attacked
from jemkit.metrics.indicators.findings import Finding, net, said, surely
from jemkit.metrics.indicators.probes import Probes

BEYOND = 0.03
"""Images that an attack without gradients may fell beside every gradient attack; honest models
that were measured: at most 3 of 128."""

WEAKER = 0.08
"""By how much more than this attack one without gradients may fell; honest models: 7 of 128, on
a linear one, where the cross-entropy climbs towards the wrong class."""

WEAK = 0.15
"""By how much AutoAttack may lie under PGD on an honest model: on a linear one the ascent of the
margin lies 16 points under that of the cross-entropy."""


def against(probes: Probes, found: Attacked) -> list[Finding]:
    """What hold an attack against those without its gradient, where they were run."""
    rows, climbs = [], probes.climbs
    if probes.search is not None:
        what = f"random search of {probes.plan.sizes.queries} queries"
        rows.append(_without_gradient("black box", what, probes.search, probes, found))
    if climbs is not None and climbs.transfer is not None:
        what = f"transfer from a surrogate that agrees on {climbs.agreement:.1%}"
        rows.append(_without_gradient("transfer", what, climbs.transfer, probes, found))
    return rows


def _without_gradient(
    name: str, what: str, wrong: Tensor, probes: Probes, found: Attacked
) -> Finding:
    """Beyond the attack and every ascent the model masks gradients; over the attack it is weak."""
    felled, n = ~found.right[probes.index], probes.n
    ascents = felled if probes.climbs is None else felled | probes.climbs.felled
    beyond = int((wrong & ~ascents).sum())
    masked = probes.climbs is not None and surely(beyond, n, BEYOND)
    weak = surely(net(wrong, felled), n, WEAKER)
    means = (
        "gradients mislead: an attack without them finds what those with them do not"
        if masked or not weak
        else "this attack is weaker than one without gradients, though other ascents are not"
    )
    return Finding(
        name=name,
        flag=masked or weak,
        found=f"{what} fells {said(int(wrong.sum()), n)}, {found.label} {int(felled.sum())}; "
        f"{beyond} fall to no gradient attack",
        means=means,
        do="trust no figure of a gradient attack alone: run aa or square, and look for what "
        "hides the gradient"
        if masked or not weak
        else "read this figure as no bound on robustness: set its loss and step, or take aa",
    )


def aa_under_pgd(pgd: Attacked, aa: Attacked) -> Finding:
    """On all images that both judged."""
    n = len(pgd.right)
    fall = net(pgd.right, aa.right)
    return Finding(
        name="aa under pgd",
        flag=surely(fall, n, WEAK),
        found=f"{pgd.label} leaves {said(int(pgd.right.sum()), n)}, {aa.label} "
        f"{said(int(aa.right.sum()), n)}",
        means="PGD does not reach what AutoAttack reaches: gradients or the loss mislead it",
        do="report AutoAttack's figure, not PGD's",
    )
