"""An authors' checkpoint to a model folder of jemkit."""

from pathlib import Path
from typing import Any, NamedTuple

from jemkit.errors import ConfigError, DataError
from jemkit.exporting import check_vacant, write_model
from jemkit.foreign.layouts import Format, Reading, read_layout
from jemkit.foreign.reading import read_checkpoint
from jemkit.layers import Table
from jemkit.norms import Norm
from jemkit.recipe import Resolved, complete, resolve
from jemkit.registry import Registry

DATASETS = {10: "cifar10", 100: "cifar100"}
"""What a published checkpoint of so many classes was trained on, where nobody says."""

PARTS = {  # backbone, objective
    "jem": ("jem", "jem"),
    "jempp": ("jempp", "jem"),
    "sadajem": ("sadajem", "jem"),
    "mebm": ("mebm", "jem"),
    "ebjdat": ("sadajem", "ebjdat"),
    "wrn": ("classifier", "ce"),
}


class Imported(NamedTuple):
    """What was made of a checkpoint."""

    folder: Path
    format: Format
    network: str
    backbone: str
    dataset: str
    source_sha256: str
    sha256: str  # of model.safetensors
    left_out: list[str]  # what the file holds beside the weights that count


def import_checkpoint(
    path: Path,
    format: Format,
    registry: Registry,
    *,
    dataset: str | None = None,
    norm: Norm | None = None,
    out: Path | None = None,
    sha256: str | None = None,
) -> Imported:
    """Read the weights of a published checkpoint and write them as an exported model.

    `norm` is asked for where names do not tell instance norm from layer norm; with `sha256` the
    file must be that one.
    """
    folder = path.with_name(f"{path.stem}-imported") if out is None else out
    check_vacant(folder)
    contents = read_checkpoint(path)
    if sha256 is not None and contents.sha256 != sha256.lower():
        raise DataError(f"{path} has SHA-256 {contents.sha256}; wanted {sha256}")
    try:
        reading = read_layout(contents.weights, format, norm)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    resolved = _recipe(reading, format, registry, dataset)
    left_out = [*contents.beside, *reading.unused]
    source = {
        "file": path.name,
        "sha256": contents.sha256,
        "format": format,
        "left_out": left_out,
    }
    card = _card(source, reading, resolved)
    about = {"recipe": resolved.tables, "source": source}
    written = write_model(folder, about, reading.weights, card)
    network = f"wrn-{reading.network.depth}-{reading.network.width}"
    tables = resolved.tables
    return Imported(
        folder, format, network, tables["backbone"]["use"], tables["data"]["use"],
        contents.sha256, written, left_out,
    )  # fmt: skip


def _recipe(reading: Reading, format: Format, registry: Registry, dataset: str | None) -> Resolved:
    """The published method's recipe around the network that the file holds."""
    name = dataset or DATASETS.get(reading.n_classes)
    if name is None:
        raise ConfigError(
            f"the weights know {reading.n_classes} classes, and no data set is known for that "
            "many: name it by --dataset"
        )
    backbone, objective = PARTS[format]
    if format == "ebjdat":  # its program has three folders, one for each backbone
        backbone = _ebjdat_backbone(reading)
    network: Table = {"use": "wrn", **reading.network.model_dump(mode="json")}
    named = {
        "data": {"use": name},
        "backbone": {"use": backbone, "network": network},
        "objective": {"use": objective},
    }
    resolved = resolve(registry, named=named)
    known = resolved.recipe.data.n_classes
    if known != reading.n_classes:
        raise DataError(
            f"the weights know {reading.n_classes} classes, and {name} has {known}; give "
            "--dataset the one that they were trained on"
        )
    return complete(resolved, registry)


def _ebjdat_backbone(reading: Reading) -> str:
    if reading.yopo:
        return "jempp"
    return "jem" if reading.network.norm == "none" else "sadajem"


def _card(source: dict[str, Any], reading: Reading, resolved: Resolved) -> str:
    network = f"wrn-{reading.network.depth}-{reading.network.width}, norm {reading.network.norm}"
    left_out = ", ".join(source["left_out"]) or "nothing"
    return (
        f"Weights of the {source['format']} authors' checkpoint `{source['file']}` (SHA-256 "
        f"`{source['sha256']}`), under jemkit's names. Network: {network}. Data set: "
        f"{resolved.tables['data']['use']}. Left out: {left_out}.\n\n"
        "The recipe is the published method's as jemkit has it, not read from the file; the "
        "weights are the authors' own. No figure was measured yet.\n"
    )
