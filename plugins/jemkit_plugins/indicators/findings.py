"""What the probes find about a model, and about an attack on it: one function per indicator."""

from collections.abc import Mapping

from torch import Tensor

from jemkit.metrics.attack_runner import Attacked
from jemkit.metrics.outputs import Finding, said, surely
from jemkit_plugins.indicators.probes import Probes

REPEAT = 1e-4
"""Allowed difference of a second pass, as a share of the spread of the logits.

Rounding in float32 causes 1e-7, and on a GPU, where a network sums in no fixed order, 1e-6 to 1e-5.
"""

COMPANY, COUPLED = 1e-3, 0.1
"""With other images in the batch, a tenth of the images may change by this share of the spread."""

NOTHING = 0.05
"""Allowed share of images without a gradient, or correct in the whole pixel range.

Intact models that were measured have none.
"""

STEADY = 0.03
"""Allowed rise of accuracy with radius or steps; intact models: at most 3 of 128 images."""

RESTARTS = 0.05
"""Allowed gain of more restarts; intact models: up to 6 of 128 images, in L2."""

BEYOND = 0.03
"""Allowed share of images that only an attack without gradients fools.

Intact models that were measured: at most 3 of 128.
"""

WEAKER = 0.08
"""Allowed lead of an attack without gradients over this attack.

Intact models: 7 of 128, on a linear one, where the gradient of the cross-entropy points to the
wrong class.
"""

WEAK = 0.15
"""Allowed difference of accuracy under PGD and under AutoAttack.

On a linear model accuracy is 16 points lower with the margin than with the cross-entropy.
"""


def of_model(probes: Probes) -> list[Finding]:
    """The findings of every probe of the model that was run."""
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
        means="the model is randomised: a single gradient is not that of the next prediction, "
        "and an attack that failed once may succeed the next time",
        do="remove the randomness, or attack the mean over draws (EOT) and report that",
    )


def coupled(probes: Probes) -> Finding | None:
    company = probes.company
    if probes.repeat is None or company is None:
        return None
    changed, n = int((company > max(COMPANY, 10 * probes.repeat)).sum()), len(company)
    return Finding(
        name="batch",
        flag=n > 1 and changed > COUPLED * n,
        found=f"{said(changed, n)} have other logits in a batch with other images or at another "
        "position; "
        f"the largest change is {float(company.max()):.2g} of the spread",
        means="the prediction for an image depends on its batch, as with batch norm in train "
        "mode: attacks "
        "that drop images, and any other batch size, operate on another model",
        do="evaluate the model with running statistics: its eval() must reach every batch norm",
    )


def gradients(probes: Probes) -> Finding | None:
    """Counts only images that PGD-20 does not fool: for the others the gradient sufficed."""
    n, dead, saturated = probes.n, probes.dead, probes.saturated
    if dead is None or saturated is None:
        return None
    bad, more = dead, ""
    if probes.pgd is not None:
        right = ~probes.pgd
        margin = probes.pgd & False if probes.margin is None else probes.margin
        bad = right & (dead | (saturated & margin))
        more = (
            f"; of {said(int(right.sum()), n)} correct under PGD-20 on the "
            f"cross-entropy, {int((right & margin).sum())} are misclassified under that on the "
            "margin"
        )
    return Finding(
        name="gradient",
        flag=surely(int(bad.sum()), n, NOTHING),
        found=f"{said(int(dead.sum()), n)} have no gradient of the cross-entropy; for "
        f"{int(saturated.sum())} the cross-entropy is exactly 0{more}",
        means="gradients vanish: the logits saturate, or the input is rounded or detached from "
        "the graph, so a gradient attack does not move",
        do="attack the margin of the logits or divide them by their scale. If rounding cuts the "
        "graph, use the identity in the backward pass (BPDA). Do not trust this figure",
    )


def box(probes: Probes) -> Finding | None:
    if probes.box is None:
        return None
    stand, n = int(probes.box.sum()), probes.n
    return Finding(
        name="unbounded",
        flag=surely(stand, n, NOTHING),
        found=f"{said(stand, n)} are correct although PGD may set every pixel to any value",
        means="an attack without a bound can turn an image into another one, so none should be "
        "correct: "
        "the attack does not work on this model",
        do="fix the attack before you use its figure: loss, step size, gradient",
    )


def radius(probes: Probes) -> Finding | None:
    if len(probes.radius) < 2:
        return None
    n, (rise, text) = probes.n, _rise({f"{k:g}/255": v for k, v in probes.radius.items()})
    return Finding(
        name="radius",
        flag=surely(rise, n, STEADY),
        found=f"correct of {n} by radius: {text}",
        means="accuracy rises with the radius, although the larger ball contains the smaller "
        "one: the "
        "attack fails at larger radii",
        do="set the step size for each radius, use more steps, or another loss",
    )


def steps(probes: Probes) -> Finding | None:
    if not probes.steps:
        return None
    n, (rise, text) = probes.n, _rise({str(k): v for k, v in probes.steps.items()})
    return Finding(
        name="steps",
        flag=surely(rise, n, STEADY),
        found=f"correct of {n} by steps, at the last state: {text}",
        means="accuracy rises with the steps: the ascent does not increase the loss",
        do="use a smaller step size, keep the worst image of all steps, or check the gradient",
    )


def _rise(right: Mapping[str, Tensor]) -> tuple[int, str]:
    """The largest rise from any point to a later one, and all points as text."""
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
        found=f"{probes.plan.sizes.restarts} restarts of PGD-20 fool {said(more, n)} more than one",
        means="the attack depends on its start: one start is not enough",
        do="report the attack with as many restarts as still lower the accuracy",
    )


def against(probes: Probes, attacked_images: Attacked) -> list[Finding]:
    """Compares an attack with the gradient-free probes that were run."""
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
    """Compares an attack with one that does not use gradients.

    If the latter fools images that no gradient attack fools, the model masks gradients; if it fools
    more images than this attack, this attack is weak.
    """
    felled, n = ~attacked_images.right[probes.index], probes.n
    beyond = int((wrong & ~probes.felled(felled)).sum())
    masked = probes.pgd is not None and surely(beyond, n, BEYOND)
    weak = surely(net(wrong, felled), n, WEAKER)
    means = (
        "gradients mislead: an attack without them succeeds where those with gradients fail"
        if masked or not weak
        else "this attack is weaker than one without gradients, though other attacks are not"
    )
    return Finding(
        name=name,
        flag=masked or weak,
        found=f"{what} fools {said(int(wrong.sum()), n)}, "
        f"{attacked_images.label} {int(felled.sum())}; "
        f"{beyond} are fooled by no gradient attack",
        means=means,
        do="do not rely on gradient attacks alone: run aa or square, and look for what "
        "hides the gradient"
        if masked or not weak
        else "this figure is no bound on robustness: change its loss and step size, or use aa",
    )


def aa_under_pgd(pgd: Attacked, aa: Attacked) -> Finding:
    """Compares PGD and AutoAttack on all images of both."""
    n = len(pgd.right)
    fall = net(pgd.right, aa.right)
    return Finding(
        name="aa under pgd",
        flag=surely(fall, n, WEAK),
        found=f"{pgd.label} leaves {said(int(pgd.right.sum()), n)} correct, {aa.label} "
        f"{said(int(aa.right.sum()), n)}",
        means="PGD is much weaker than AutoAttack: gradients or the loss mislead it",
        do="report the figure of AutoAttack, not that of PGD",
    )


def net(more: Tensor, less: Tensor) -> int:
    """How many more images are in the first set than in the second, both [N] bool."""
    return int(more.sum()) - int(less.sum())
