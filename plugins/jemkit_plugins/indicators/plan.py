"""Which probes run: all of them, or those that cost no more than the attacks that they check.

Cost is the number of passes of one image through the model, where a gradient counts as two. It
depends only on the attacks and their images, not on the time.
"""

from typing import NamedTuple

PGD_STEPS, BOX_STEPS = 20, 50
STUDENT_STEPS, STUDENT_BATCH = 200, 128
FEWEST = 4
"""With fewer images a probe is not meaningful: all of 3 may be misclassified by accident."""

QUICK_SHARE = 0.5
"""The budget of the probes with --quick, as a share of the cost of the attacks."""


class Sizes(NamedTuple):
    """The size of each probe."""

    radii: tuple[float, ...]  # as shares of the radius, which is one of them
    steps: tuple[int, ...]
    restarts: int
    queries: int


FULL = Sizes((0.25, 0.5, 1.0, 1.5, 2.0, 4.0), (1, 5, 20, 50), 5, 300)
SMALL = Sizes((0.5, 1.0, 2.0), (1, 5, 20), 3, 100)

CORE = ("logits", "gradient", "pgd", "margin", "search")
"""The most informative probes for their cost.

They show whether the model is randomised or couples images, whether gradients vanish, what the
margin finds beyond the cross-entropy, and what an attack without gradients finds.
"""

ORDER = (*CORE, "box", "steps", "radius", "restarts", "transfer")
"""The order in which probes are selected until the budget is spent."""

ASCENTS = ("pgd", "margin", "box", "steps", "radius", "restarts", "transfer")
"""Probes that need a step of PGD, which is not defined for L1."""

FINDINGS = {
    "logits": "random, batch", "gradient": "gradient", "pgd": "PGD-20 of the probes",
    "margin": "ascent of the margin", "search": "black box", "box": "unbounded",
    "steps": "steps", "radius": "radius", "restarts": "restarts", "transfer": "transfer",
}  # fmt: skip
"""The names of the probes in a record."""


class Plan(NamedTuple):
    """The selected probes by name, the number of images of each, and the cost."""

    images: int
    sizes: Sizes
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    passes: int


def cost(name: str, n: int, sizes: Sizes, batch_size: int) -> int:
    """Passes of one image that a probe of n images needs."""
    ascent = 2 * PGD_STEPS + 1
    each = {
        "logits": 4,
        "gradient": 4,
        "pgd": ascent,
        "margin": ascent,
        "search": sizes.queries,
        "box": 2 * BOX_STEPS + 1,
        "steps": 2 * max(sizes.steps) + 1,
        "radius": ascent * (len(sizes.radii) - 1),
        "restarts": ascent * (sizes.restarts - 1),
        "transfer": 1,
    }[name]
    own = STUDENT_STEPS * min(STUDENT_BATCH, batch_size) + 1 if name == "transfer" else 0
    return n * each + own


def planned(
    n: int, *, quick: bool, ascents: bool, search: bool = True, batch_size: int,
    budget: int | None = None,
) -> Plan:  # fmt: skip
    """The probes that run on at most n images; without `ascents` or `search`, without those.

    All of them if there is no budget, or if it suffices. Otherwise the core probes run on as many
    images as the budget allows, and the others if some of the budget is left.
    """
    never = (*(() if ascents else ASCENTS), *(() if search else ("search",)))
    order = tuple(name for name in ORDER if name not in never)
    kinds = (SMALL,) if quick else (FULL, SMALL)
    for sizes in kinds if budget is not None else kinds[:1]:
        passes = sum(cost(name, n, sizes, batch_size) for name in order)
        if budget is None or passes <= budget:
            return Plan(n, sizes, order, (), passes)
    few = n
    core = [name for name in CORE if name in order]
    while few > FEWEST and sum(cost(name, few, SMALL, batch_size) for name in core) > (budget or 0):
        few = max(FEWEST, few // 2)
    left, names = budget or 0, []
    for name in order:
        if (price := cost(name, few, SMALL, batch_size)) <= left:
            left -= price
            names.append(name)
    out = tuple(name for name in order if name not in names)
    return Plan(few, SMALL, tuple(names), out, (budget or 0) - left)
