"""What the probes say of a model, and of an attack on it: one function an indicator."""

from collections.abc import Mapping

from torch import Tensor

from jemkit.metrics.attack_runner import Attacked
from jemkit.metrics.outputs import Finding, said, surely
from jemkit_plugins.indicators.probes import Probes

REPEAT = 1e-4
"""A second pass may differ by this share of the logits' spread; float32 rounds at 1e-7, and
a network's sums on a GPU, in no fixed order, at 1e-6 to 1e-5."""

COMPANY, COUPLED = 1e-3, 0.1
"""Beside other images, a tenth of the images may change by this share of the spread."""

NOTHING = 0.05
"""Images without a gradient, or right in the whole range, that are let pass; honest models
that were measured have none."""

STEADY = 0.03
"""By how much accuracy may rise with radius or steps; honest models: at most 3 of 128 images."""

RESTARTS = 0.05
"""What more restarts may fell; honest models: up to 6 of 128 images, in L2."""

BEYOND = 0.03
"""Images that an attack without gradients may fell beside every gradient attack; honest models
that were measured: at most 3 of 128."""

WEAKER = 0.08
"""By how much more than this attack one without gradients may fell; honest models: 7 of 128, on
a linear one, where the cross-entropy climbs towards the wrong class."""

WEAK = 0.15
"""By how much AutoAttack may lie under PGD on an honest model: on a linear one the ascent of the
margin lies 16 points under that of the cross-entropy."""


def of_model(probes: Probes) -> list[Finding]:
    """What every probe of the model says that was run."""
    indicators = (random, coupled, gradients, box, radius, steps, restarts)
    return [row for indicator in indicators if (row := indicator(probes)) is not None]


def random(probes: Probes) -> Finding | None:
    if probes.repeat is None:
        return None
    return Finding(
        name="random",
        flag=probes.repeat > REPEAT,
        found=f"two passes over the same images differ by {probes.repeat:.2g} of the logits' "
        "spread",
        means="the model answers at random: one gradient is no gradient of the answer that counts, "
        "and an image that stood once may fall at the next try",
        do="take the randomness out, or attack the mean over draws (EOT) and report that",
    )


def coupled(probes: Probes) -> Finding | None:
    company = probes.company
    if probes.repeat is None or company is None:
        return None
    changed, n = int((company > max(COMPANY, 10 * probes.repeat)).sum()), len(company)
    return Finding(
        name="batch",
        flag=n > 1 and changed > COUPLED * n,
        found=f"{said(changed, n)} have other logits beside other images or in another place; "
        f"the largest change is {float(company.max()):.2g} of the spread",
        means="an image's answer hangs on its batch, as with batch norm in train mode: attacks "
        "that drop images on their way, and any other batch size, see another model",
        do="judge the model with running statistics: its eval() must reach every batch norm",
    )


def gradients(probes: Probes) -> Finding | None:
    """Counted where PGD-20 left the image standing: a gradient that is not needed is no loss."""
    n, dead, saturated = probes.n, probes.dead, probes.saturated
    if dead is None or saturated is None:
        return None
    bad, more = dead, ""
    if probes.pgd is not None:
        right = ~probes.pgd
        margin = probes.pgd & False if probes.margin is None else probes.margin
        bad = right & (dead | (saturated & margin))
        more = (
            f"; of {said(int(right.sum()), n)} that stand under PGD-20 on the "
            f"cross-entropy, {int((right & margin).sum())} fall to the margin's"
        )
    return Finding(
        name="gradient",
        flag=surely(int(bad.sum()), n, NOTHING),
        found=f"{said(int(dead.sum()), n)} give the cross-entropy no gradient and on "
        f"{int(saturated.sum())} it is exactly 0{more}",
        means="gradients vanish: the logits saturate, or the input is rounded or cut off from "
        "the graph, so a gradient attack does not move",
        do="attack the margin of the logits or divide them by their scale; where rounding cuts the "
        "graph, use the identity there in the backward pass (BPDA), and trust no such figure",
    )


def box(probes: Probes) -> Finding | None:
    if probes.box is None:
        return None
    stand, n = int(probes.box.sum()), probes.n
    return Finding(
        name="unbounded",
        flag=surely(stand, n, NOTHING),
        found=f"{said(stand, n)} stand where PGD may set every pixel to anything",
        means="an attack without a bound can turn an image into another one, so none can stand: "
        "the attack does not work on this model",
        do="mend the attack before its figure is read: loss, step, gradient",
    )


def radius(probes: Probes) -> Finding | None:
    if len(probes.radius) < 2:
        return None
    n, (rise, text) = probes.n, _rise({f"{k:g}/255": v for k, v in probes.radius.items()})
    return Finding(
        name="radius",
        flag=surely(rise, n, STEADY),
        found=f"standing of {n} by radius: {text}",
        means="accuracy rises with the radius though the larger ball holds the smaller: the "
        "attack finds less where there is more to find",
        do="set the step for each radius, take more steps, or another loss",
    )


def steps(probes: Probes) -> Finding | None:
    if not probes.steps:
        return None
    n, (rise, text) = probes.n, _rise({str(k): v for k, v in probes.steps.items()})
    return Finding(
        name="steps",
        flag=surely(rise, n, STEADY),
        found=f"standing of {n} by steps, at the last state: {text}",
        means="accuracy rises with the steps: the ascent does not go up",
        do="take a smaller step, keep the worst image on the way, or look at the gradient",
    )


def _rise(right: Mapping[str, Tensor]) -> tuple[int, str]:
    """The largest rise from any point to a later one, and every point."""
    rows = list(right.values())
    rise = max((net(b, a) for i, a in enumerate(rows) for b in rows[i + 1 :]), default=0)
    return rise, ", ".join(f"{k}: {int(v.sum())}" for k, v in right.items())


def restarts(probes: Probes) -> Finding | None:
    if probes.restarts is None or probes.pgd is None:
        return None
    n, more = probes.n, int((probes.restarts & ~probes.pgd).sum())
    return Finding(
        name="restarts",
        flag=surely(more, n, RESTARTS),
        found=f"{probes.plan.sizes.restarts} restarts of PGD-20 fell {said(more, n)} more than one",
        means="the way up hangs on where it begins: one start finds too little",
        do="report the attack with restarts, as many as still help",
    )


def against(probes: Probes, attacked_images: Attacked) -> list[Finding]:
    """What hold an attack against those without its gradient, where they were run."""
    rows = []
    if probes.search is not None:
        what = f"random search of {probes.plan.sizes.queries} queries"
        rows.append(_without_gradient("black box", what, probes.search, probes, attacked_images))
    if probes.transfer is not None:
        what = f"transfer from a surrogate that agrees on {probes.agreement:.1%}"
        rows.append(_without_gradient("transfer", what, probes.transfer, probes, attacked_images))
    return rows


def _without_gradient(
    name: str, what: str, wrong: Tensor, probes: Probes, attacked_images: Attacked
) -> Finding:
    """Beyond the attack and every ascent the model masks gradients; over the attack it is weak."""
    felled, n = ~attacked_images.right[probes.index], probes.n
    beyond = int((wrong & ~probes.felled(felled)).sum())
    masked = probes.pgd is not None and surely(beyond, n, BEYOND)
    weak = surely(net(wrong, felled), n, WEAKER)
    means = (
        "gradients mislead: an attack without them finds what those with them do not"
        if masked or not weak
        else "this attack is weaker than one without gradients, though other ascents are not"
    )
    return Finding(
        name=name,
        flag=masked or weak,
        found=f"{what} fells {said(int(wrong.sum()), n)}, "
        f"{attacked_images.label} {int(felled.sum())}; "
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


def net(more: Tensor, less: Tensor) -> int:
    """How many more images are in the first set than in the second, both [N] bool."""
    return int(more.sum()) - int(less.sum())
