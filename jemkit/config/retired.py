"""Settings of jemkit 0.1 in the terms of this version: old configs keep their meaning."""

from collections.abc import Iterator
from typing import Any

from jemkit.errors import ConfigError

Table = dict[str, Any]

RETIRED = {"keep": "worst"}
"""Options of parts that were removed, and the value by which a part then acts as it does now:
`pgd.keep` until 0.2."""


def without_retired(table: Table) -> Table:
    """The tables of a run that an earlier version wrote, without what has no meaning any more."""
    return {
        name: without_retired(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if RETIRED.get(name) != value or not isinstance(value, str)
    }


OBJECTIVES = ("ebjdat", "ebjdatreleased")  # what `ebjdat` of 0.1 is now
ASCENTS = {"sign": "sign", "gradient": "sgld", "normalised": "l2"}  # `step` of 0.1, as it is now
SIZES = {"sign": "step_px", "sgld": "step_size", "l2": "step_px"}
"""The ascents, and the option that was their size, as it is now."""

FIXED = {"direction": "raise", "projection": True, "pair": "same"}
"""Options that are gone, and the value that now always holds."""

RELEASED = {
    "step": "sign", "norm": "Linf", "projection": False, "outer": "contrastive", "pair": "density",
    "distance": {"use": "logits"}, "distance_weight": -1,
}  # fmt: skip
"""What the authors' program was a setting of; its chain is named in `CLIMBS`."""
CLIMBS = {("joint", "lower"): "logit", ("ce", "raise"): "ce"}

INSTEAD = {
    "direction": 'the objective "ebjdatreleased" has x~ lower E(x~, y)',
    "projection": 'the objective "ebjdatreleased" has no ball; here radius_px may be larger',
    "pair": 'the objective "ebjdatreleased" compares x~ with the images of the density',
    "start_px": "x~ starts in the ball of radius_px; set that",
    "outer": 'set outer = "squared", which is bounded too',
}
"""What to write for a value that can no longer be had."""

GONE = ("step", "step_px", "step_size", "margin", "start_px", *FIXED)

KEYS = {"objective.step": "objective.ascent.use"}  # keys that choose a part now


def old_names(options: Table) -> list[str]:
    """The options among these that are 0.1's alone, or have a value that is."""
    return [k for k, v in options.items() if k in GONE or (k == "outer" and v in ("abs", "hinge"))]


def translate(options: Table, origin: str, *, saved: bool) -> Table:
    """The options of EB-JDAT that one layer sets, as 0.1 named them, in the terms of now.

    `saved`: it is the config of a run.
    """
    if not old_names(options):
        return options
    if released := _released(options):
        return released
    for name, value in _removed(options):
        raise ConfigError(
            f"objective.{name} = {value!r} was removed in jemkit 0.2 (from {origin}): "
            f"{INSTEAD[name]}{'. This run needs jemkit 0.1' if saved else ''}"
        )
    current = {name: value for name, value in options.items() if name not in GONE}
    if current.get("outer") in ("abs", "hinge"):  # w2 is 0, so it does nothing
        current["outer"] = "align"
    ascent = _ascent(options)
    return {"ascent": ascent, **current} if ascent else current


def _ascent(options: Table) -> Table:
    """What `step`, `step_px` and `step_size` say of the ascent."""
    sizes = {name: options[name] for name in ("step_px", "step_size") if name in options}
    if "step" not in options:
        return {name: size for name, size in sizes.items() if size is not None}
    use = ASCENTS.get(str(options["step"]), options["step"])
    return {"use": use, **{k: v for k, v in sizes.items() if k == SIZES.get(str(use))}}


def _released(options: Table) -> Table | None:
    """The options of `ebjdatreleased`, where they are those of its authors' program."""
    climbs = CLIMBS.get((str(options.get("inner")), str(options.get("direction"))))
    sizes = [options.get(name) for name in ("start_px", "step_px")]
    weights = {name: options.get(name) for name in ("w1", "w2", "w3", "w_clean")}
    if weights["w_clean"] is None:
        weights["w_clean"] = weights["w3"]
    if any(options.get(name) != value for name, value in RELEASED.items()):
        return None
    if climbs is None or None in sizes or not all(weights.values()) or "w_clean" not in options:
        return None
    chain = {"adv_steps": options.get("adv_steps", 5), "start_px": sizes[0], "step_px": sizes[1]}
    return {"use": "ebjdatreleased", **weights, **chain, "climbs": climbs}


def _removed(options: Table) -> Iterator[tuple[str, Any]]:
    """The options whose value can no longer be had, and acts."""
    no_gap = options.get("w2") == 0
    if no_gap and options.get("w3") == 0:
        return
    still = options.get("adv_steps") == 0
    idle = {*(("direction", "projection") if still else ()), *(("pair",) if no_gap else ())}
    for name, value in FIXED.items():
        if options.get(name, value) != value and name not in idle:
            yield name, options[name]
    start = options.get("start_px")
    if start is not None and start != options.get("radius_px"):
        yield "start_px", start
    if options.get("outer") in ("abs", "hinge") and not no_gap:
        yield "outer", options["outer"]
