"""`jemkit plugins check`: the laws of a part, what was tried, the smallest counterexamples."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jemkit_cli.plugins.listing import offers_of
from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say, say_json, show_table

if TYPE_CHECKING:
    from jemkit.config.registry import Offer, Registry
    from jemkit.testing import Examination

MEANINGS = {
    "box": "Pixels of 0 and 255 are common in images, and clamped chains stay there.",
    "descent": "A flipped sign trains or samples the opposite, often without any error.",
    "detached": "A graph that is kept grows with every step, and lets gradients into the chains.",
    "deterministic": "With hidden state a run cannot be repeated, nor resumed bit for bit.",
    "differentiable": "Without this gradient the part has no influence on training.",
    "dtype": "Energies in half precision have rounding errors larger than the gaps of training.",
    "files": "Resuming, reports and comparisons read these files.",
    "figures": "Records and comparisons identify a figure by its name and protocol.",
    "finite": "One NaN in the replay buffer or in a loss ends a run.",
    "generator": "Other sources of randomness make runs with one seed differ.",
    "gradients": "Chains and attacks that fill .grad add their gradients to the update.",
    "guard": "Each step is one update, and an update that is not finite must not be applied.",
    "inputs": "Changed in place, the batch or the replay buffer is wrong for all that follows.",
    "interface": "The trainer calls the part by this interface.",
    "labels": "A label outside the range is an index error on a GPU, far from its cause.",
    "modes": "In the wrong mode batch norm couples images, or its statistics stop learning.",
    "probability": "E(x, y) below E(x) would be a probability of more than 1.",
    "range": "Outside the ball or the pixel range, robust accuracies cannot be compared.",
    "resume": "A resumed run, or a repeated step, must go on as if it had not been interrupted.",
    "rows": "If images influence each other, results depend on the batch size and its order.",
    "runs": "The part fails on the smallest data that jemkit has.",
    "shape": "By broadcasting, a wrong shape can go on as a wrong number.",
    "stationary": "The chain samples another density than it claims to: it is not exact.",
    "statistics": "Running statistics that learn twice are those of no training step.",
    "switches": "Torch's switches are of the whole process: all that runs later is affected.",
    "total": "The logged terms must be those that are trained.",
    "weights": "Only an update may change weights and buffers.",
    "zero": "d(x, x) is a minimum, so the inner maximisation has no pull at x itself.",
}
"""What it means for a joint energy-based model that a law is violated."""


@guarded
def check(
    name: Annotated[str, typer.Argument(help="A part, or a plug-in with all its parts.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of a part, e.g. NAME.step_size=0.1.", metavar="K=V"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    no_plugins: NoPlugins = False,
) -> None:
    """Test a part by all laws of its kind; exit code 1 if it violates one.

    A backbone is tested with a small network and a small buffer, a data set with its files.
    """
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.config.eval_settings import options_of
    from jemkit.testing import examine

    options = options_of(overrides or ())
    parts = []
    chosen = _chosen(registry, name, options)
    for offer in chosen:
        part = _built(offer, _given(offer, chosen, options), registry)
        parts.append(_about(offer, examine(offer.kind, part)))
        if not as_json:
            _show(parts[-1], offer.version)
    well = all(part["ok"] for part in parts)
    if as_json:
        say_json({"ok": well, "parts": parts})
    if not well:
        raise typer.Exit(1)


def _chosen(registry: "Registry", name: str, options: dict[str, Any]) -> list["Offer"]:
    """The parts of this name, or of the plug-in or distribution of this name."""
    from jemkit.errors import ConfigError, UnknownName
    from jemkit.options import nearest

    offers = offers_of(registry)
    chosen = [o for o in offers if o.name == name]
    chosen = chosen or [o for o in offers if name in (o.distribution, o.part.__module__)]
    if not chosen:
        for fault in registry.faults:
            if name in (fault.plugin, fault.distribution):
                raise ConfigError(f"the plug-in {name} is skipped: {fault.reason}")
        names = {*(o.name for o in offers), *(o.distribution for o in offers)}
        here = f"; to install the one in this folder: pip install -e {name}"
        hint = here if (Path(name) / "pyproject.toml").is_file() else nearest(name, names)
        raise UnknownName(f"no part or plug-in {name!r}{hint}")
    for other in options.keys() - {o.name for o in chosen}:
        raise ConfigError(f"--set {other}: expected an option of {name}, such as {name}.OPTION=1")
    return chosen


def _given(offer: "Offer", chosen: list["Offer"], options: dict[str, Any]) -> dict[str, Any]:
    """The options of a part; one that only another part of the same name has is that part's."""
    others = {f for o in chosen if o.name == offer.name for f in o.part.model_fields}
    own = offer.part.model_fields.keys()
    given = options.get(offer.name, {})
    return {field: value for field, value in given.items() if field in own or field not in others}


def _built(offer: "Offer", given: dict[str, Any], registry: "Registry") -> Any:
    from pydantic import ValidationError

    from jemkit.config.layers import Stack
    from jemkit.config.messages import explain
    from jemkit.errors import ConfigError

    table = Stack(registry).of_part(offer.kind, offer.name, given, "--set")
    try:
        return offer.part.model_validate(table, context=registry.context)
    except ValidationError as error:
        text = explain(error, {**dict.fromkeys(offer.part.model_fields), **table})
        hint = f"; set its options by --set {offer.name}.OPTION=VALUE"
        raise ConfigError(f"{offer.kind} {offer.name}: {text}{hint}") from None


def _about(offer: "Offer", examined: "Examination") -> dict[str, Any]:
    times = Counter((one.law, one.requirement) for one in examined.tried)
    failed = {(one.law, one.requirement) for one in examined.tried if not one.holds}
    laws = [
        {"law": law, "requirement": text, "tried": tried, "holds": (law, text) not in failed}
        for (law, text), tried in times.items()
    ]
    violations = [{**one._asdict(), "meaning": MEANINGS[one.law]} for one in examined.violations]
    return {
        "kind": offer.kind,
        "name": offer.name,
        "distribution": offer.distribution,
        "ok": not violations,
        "laws": laws,
        "violations": violations,
        "stopped": examined.stopped or None,
    }


def _show(part: dict[str, Any], version: str) -> None:
    rows = [
        ["holds" if one["holds"] else "VIOLATED", one["law"], one["requirement"], str(one["tried"])]
        for one in part["laws"]
    ]
    say(f"{part['kind']} {part['name']}  ({part['distribution']} {version})")
    show_table(["", "law", "requirement", "tried"], rows)
    for wrong in part["violations"]:
        say(f"violated: {wrong['law']}: {wrong['requirement']}")
        result = wrong["result"] or "this does not hold"
        say(f"smallest counterexample (seed 0, images: {wrong['images']}): {result}")
        say(f"what it means: {wrong['meaning']}\n")
    count = sum(not one["holds"] for one in part["laws"])
    say(
        f"{count} of {len(rows)} requirements are violated"
        if count
        else f"all {len(rows)} requirements hold"
    )
    if part["stopped"]:
        say(f"the requirements after the last were not tried: {part['stopped']}")
    say("")
