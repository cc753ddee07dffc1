"""Whether a figure is of the standard protocol: which options of its parts are not the defaults."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from jemkit.attacks.base import Threat, nonstandard


def departures(part: object, threat: Threat) -> dict[str, Any]:
    """The options of an attack or evaluator that are neither its defaults nor told by its label.

    An option that is None by default, and stands at what None means in this threat, is a default.
    Options that a class names in `standard_at_any` leave a figure standard. One without a default
    counts: no value of it is the standard one.
    """
    if not isinstance(part, BaseModel):
        return {}
    fields, free = type(part).model_fields, getattr(part, "standard_at_any", ())
    step = getattr(part, "default_step_px", lambda radius_px: radius_px / 4)(threat.radius_px)
    implied = {**threat._asdict(), "step_px": step}
    changed = {}
    for name, field in fields.items():
        value = getattr(part, name)
        if name in free or field.exclude:
            continue
        if not field.is_required():
            usual = field.get_default(call_default_factory=True)
            meant = usual is None or name in ("norm", "radius_px")
            if value == usual or (meant and value == implied.get(name, usual)):
                continue
            if _in_label(part, name, usual):
                continue
        changed[name] = plain(value)
    return changed


def with_departures(card: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A figure's card that tells its options, which are not the standard ones."""
    if not changed:
        return dict(card)
    options = {**card.get("options", {}), **changed}
    why = f"options that are not the defaults: {', '.join(f'{k} {v}' for k, v in changed.items())}"
    return {**card, "options": options, **nonstandard([card.get("why"), why])}


def plain(value: Any) -> Any:
    """An option as JSON has it; of a path its name, since records may be published."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, BaseModel):
        return {"part": type(value).__name__, **{k: plain(v) for k, v in value}}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _in_label(part: BaseModel, name: str, usual: Any) -> bool:
    """Whether the name of its figure tells an option: pgd50 and pgd20x5 do, apgd does not."""
    label = getattr(part, "label", None)
    return label is not None and label != part.model_copy(update={name: usual}).label  # type: ignore[attr-defined]
