"""`jemkit plugins list` and `info`: the parts, the packages that provide them, their options."""

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say, say_json, show_table

if TYPE_CHECKING:
    from jemkit.config.registry import Offer, Registry

Json = Annotated[bool, typer.Option("--json", help="A JSON array of objects.")]


@guarded
def list_parts(as_json: Json = False, no_plugins: NoPlugins = False) -> None:
    """List every part, and every plug-in that was skipped and why."""
    rows = _rows(installed_parts(third_party=not no_plugins))
    if as_json:
        say_json(rows, indent=1)
    else:
        show_table(list(rows[0]), [[str(cell or "") for cell in row.values()] for row in rows])


@guarded
def info(
    name: Annotated[str, typer.Argument(help="A part's name.")],
    as_json: Json = False,
    no_plugins: NoPlugins = False,
) -> None:
    """Describe a part and its options; a name may belong to parts of several kinds."""
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.errors import UnknownName
    from jemkit.options import nearest

    offers = offers_of(registry)
    matches = [_about(offer, registry) for offer in offers if offer.name == name]
    if not matches:
        raise UnknownName(f"no part {name!r}{nearest(name, {o.name for o in offers})}")
    if as_json:
        say_json(matches, indent=1)
        return
    for part in matches:
        say(f"{part['kind']} {part['name']}  ({part['distribution']} {part['version']})")
        say(part["doc"])
        rows = [_row(option, registry) for option in part["options"]]
        if rows:
            show_table(["option", "type", "bounds", "default", "meaning"], rows)
        else:
            say("no options\n")


def offers_of(registry: "Registry") -> list["Offer"]:
    return [offer for shelf in registry.shelves.values() for offer in shelf.offers()]


def _rows(registry: "Registry") -> list[dict[str, Any]]:
    good = [
        {
            "kind": offer.kind,
            "name": offer.name,
            "distribution": offer.distribution,
            "version": offer.version,
            "state": "ok",
            "fault": None,
        }
        for offer in offers_of(registry)
    ]
    skipped = [
        {
            "kind": "plugin",
            "name": fault.plugin,
            "distribution": fault.distribution,
            "version": fault.version,
            "state": "skipped",
            "fault": fault.reason,
        }
        for fault in registry.faults
    ]
    return good + skipped


def _about(offer: "Offer", registry: "Registry") -> dict[str, Any]:
    from jemkit.config.catalogue import options_of
    from jemkit.config.recipe import part_schema

    return {
        "kind": offer.kind,
        "name": offer.name,
        "distribution": offer.distribution,
        "version": offer.version,
        "doc": inspect.getdoc(offer.part) or "",
        "options": [option._asdict() for option in options_of(offer.part, registry)],
        "schema": part_schema(offer.part, registry),
    }


def _row(option: dict[str, Any], registry: "Registry") -> list[str]:
    from jemkit.config.catalogue import shown

    default = "(required)" if option["required"] else shown(option["default"], registry)
    return [option["name"], option["type"], option["bounds"], default, option["meaning"]]
