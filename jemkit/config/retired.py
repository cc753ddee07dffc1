"""Runs of earlier versions: their config.json in the terms of this one."""

import logging
from typing import Any

log = logging.getLogger(__name__)

Table = dict[str, Any]

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

GONE = ("step", "step_px", "step_size", "margin", "start_px", *FIXED)


def current(tables: Table) -> Table:
    """The tables of a saved recipe; a value that can no longer be had stays, and is refused."""
    tables = _without_keep(tracked(tables))
    run, objective = tables.get("run"), tables.get("objective")
    if isinstance(run, dict) and "eval_images" in run:  # a saved run has every option
        tables["run"] = {"select": "pgd10", **run}  # as before it was one
    if isinstance(objective, dict) and objective.get("use") == "ebjdat":
        tables["objective"] = _translated(objective)
    return tables


def tracked(tables: Table, origin: str = "") -> Table:
    """The tables with the tracker that `run.tensorboard` selected; logged for a layer."""
    run = tables.get("run")
    on = run.get("tensorboard") if isinstance(run, dict) else None
    if not isinstance(run, dict) or str(on).lower() not in ("true", "false"):
        return tables
    if origin:
        log.warning(
            "run.tensorboard (from %s) is deprecated and will be removed: use --tracker "
            "tensorboard, or [trackers.tensorboard] in a file", origin
        )  # fmt: skip
    tables = {**tables, "run": {k: v for k, v in run.items() if k != "tensorboard"}}
    tracker = {"use": "tensorboard"} if str(on).lower() == "true" else False
    if tracker or origin:
        tables["trackers"] = {**tables.get("trackers", {}), "tensorboard": tracker}
    return tables


def _without_keep(table: Table) -> Table:
    """The tables without `pgd.keep = "worst"`, which always holds now."""
    return {
        name: _without_keep(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if (name, value) != ("keep", "worst")
    }


def _translated(options: Table) -> Table:
    """The options of EB-JDAT."""
    if released := _released(options):
        return released
    acts = {k: options[k] for k, v in FIXED.items() if options.get(k, v) != v}
    if options.get("start_px") not in (None, options.get("radius_px")):
        acts["start_px"] = options["start_px"]
    now = {k: v for k, v in options.items() if k not in GONE} | acts
    if options.get("w2") == 0 and options.get("outer") in ("abs", "hinge"):  # does nothing
        now["outer"] = "align"
    ascent = _ascent(options)
    return {"ascent": ascent, **now} if ascent else now


def _ascent(options: Table) -> Table:
    """What `step`, `step_px` and `step_size` say of the ascent."""
    if "step" not in options:
        return {}
    use = ASCENTS.get(str(options["step"]), options["step"])
    size = SIZES.get(str(use), "")
    return {"use": use, **({size: options[size]} if size in options else {})}


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
