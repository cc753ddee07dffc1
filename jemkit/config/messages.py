"""What is wrong with a recipe, as lines that a user can act on."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from jemkit.config.layers import OPTIMIZERS, inside, spoken, table_at
from jemkit.options import nearest

GIVEN_BY = {"data.dir": ": --data-dir DIR says where the images are"}
"""The option of the commands that sets a field without a default."""

OTHERWISE = {
    "learning_rate": "lr", "wd": "weight_decay", "beta1": "betas", "eps": "radius_px",
    "radius": "radius_px", "epsilon": "radius_px", "batchsize": "batch_size",
    "num_epochs": "epochs", "num_steps": "steps", "n_steps": "steps",
}  # fmt: skip
"""Other programs' names of options."""

LONGEST = 200  # characters of a wrong value that a message repeats


def explain(
    error: ValidationError, tables: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> str:
    """A line for each mistake: the key, the value and its origin, what was expected, the nearest
    name."""
    mistakes = [dict(m) for m in error.errors(include_url=False)]
    unknown = {_where(m) for m in mistakes if m["type"] == "extra_forbidden"}
    return "\n".join(_line(mistake, tables, unknown, origins or {}) for mistake in mistakes)


def _line(
    mistake: dict[str, Any],
    tables: Mapping[str, Any],
    unknown: set[tuple[str, ...]],
    origins: Mapping[str, str],
) -> str:
    where = _where(mistake)
    key = ".".join(where)
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "missing":
        message = "is required" + GIVEN_BY.get(key, "")
    if mistake["type"] == "part" and isinstance(mistake["input"], str):
        message += f"; choose one by {key}.use"
    if where in unknown:
        table = table_at(tables, where[:-1])
        known = [name for name in table if (*where[:-1], name) not in unknown and name != "use"]
        meant = OTHERWISE.get(where[-1])
        near = nearest(meant if meant in known else where[-1], known)
        message = f"no such option{near}. There are: {', '.join(known) or 'none'}"
    origin = origins.get(key) or next((o for k, o in origins.items() if inside(k, key)), "")
    whole = isinstance(mistake["input"], dict) and where not in unknown
    got = "" if isinstance(mistake["input"], dict) else f"; got {mistake['input']!r}"
    message = message.removesuffix(got)
    got = got if len(got) < LONGEST else f"{got[:LONGEST]}..."
    return f"{key}: {message}{got}{'' if whole else spoken(origin)}"


def _where(mistake: Mapping[str, Any]) -> tuple[str, ...]:
    """A mistake's key; pydantic inserts the chosen optimizer between a table and its field."""
    loc = [str(part) for part in mistake["loc"]]
    if loc[0] == "optimizer" and loc[1:2] and loc[1] in OPTIMIZERS:
        del loc[1]
    return tuple(loc)
