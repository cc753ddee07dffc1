"""Converts a published checkpoint to a model folder of jemkit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from jemkit.config.layers import Table
from jemkit.config.recipe import Resolved, complete, resolve
from jemkit.config.registry import Registry
from jemkit.data import Dataset, Shape
from jemkit.errors import ConfigError, DataError
from jemkit.models.networks import stages_for
from jemkit.models.norms import Norm
from jemkit.training import pinned
from jemkit.training.model_card import table_of
from jemkit.training.model_folder import TaskTable, check_vacant, write_model
from jemkit.training.opened import open_model
from jemkit.training.pretrained.layouts import (
    Format,
    Reading,
    energy_of,
    looks_like,
    read_layout,
    recognised,
)
from jemkit.training.pretrained.probing import StateDict
from jemkit.training.pretrained.reading import read_checkpoint
from jemkit.training.restore import restored

DATASETS = {10: "cifar10", 100: "cifar100"}
"""The data set of a published checkpoint by its number of classes, if none is given."""

PARTS = {  # backbone, objective
    "jem": ("jem", "jem"),
    "jempp": ("jempp", "jem"),
    "sadajem": ("sadajem", "jem"),
    "mebm": ("mebm", "jem"),
    "ebjdat": ("sadajem", "ebjdat"),
    "wrn": ("classifier", "ce"),
}


class Imported(NamedTuple):
    folder: Path
    format: Format
    network: str
    backbone: str
    dataset: str
    energy: str  # which head E(x) comes from
    key: str  # the key of the weights in the file
    source_sha256: str
    sha256: str  # of model.safetensors
    left_out: list[str]  # other contents of the file
    notes: list[str]  # what was guessed or chosen


def import_checkpoint(
    path: Path,
    format: Format | Literal["auto"],
    registry: Registry,
    *,
    dataset: Table | str | None = None,
    norm: Norm | None = None,
    key: str | None = None,
    out: Path | None = None,
    sha256: str | None = None,
    overrides: Sequence[str] = (),
) -> Imported:
    """Read the weights of a published checkpoint and write them as an exported model.

    `norm` is needed if names do not distinguish instance norm from layer norm, `key` if several
    state dicts fit; with `sha256` the file must have this hash. The folder is opened as a check.
    """
    folder = path.with_name(f"{path.stem}-imported") if out is None else out
    check_vacant(folder)
    contents = read_checkpoint(path, None if format == "auto" else format, key)
    if sha256 is not None and contents.sha256 != sha256.lower():
        raise DataError(f"{path} has SHA-256 {contents.sha256}; expected {sha256}")
    try:
        kind = recognised(contents.weights) if format == "auto" else format
        reading = read_layout(contents.weights, kind, norm)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    resolved, shape = _recipe(reading, kind, registry, dataset, overrides)
    energy, left_out = energy_of(contents.weights, kind), [*contents.beside, *reading.unused]
    notes = _notes(contents, kind, guessed=format == "auto")
    source = {
        "file": contents.file, "key": contents.key, "sha256": contents.sha256, "format": kind,
        "energy": energy, "left_out": left_out, "notes": notes,
    }  # fmt: skip
    written = write_model(
        folder, _config(resolved, shape, source), reading.weights, _card(source, reading, resolved),
        check=lambda made: restored(open_model(made), registry, torch.device("cpu")),
    )  # fmt: skip
    tables = resolved.tables
    return Imported(
        folder, kind, _name(reading), tables["backbone"]["use"], tables["data"]["use"], energy,
        contents.key, contents.sha256, written, left_out, notes,
    )  # fmt: skip


def _config(resolved: Resolved, shape: Shape, source: Table) -> Table:
    """The config.json of the model; its authors' training images are unknown, and none is read."""
    data = resolved.recipe.data
    classes = pinned.Table(n_classes=data.n_classes, classes=pinned.class_names(data))
    task = TaskTable(
        shape=shape, n_classes=data.n_classes, radius_px=data.radius_px, n_train=0,
        total_steps=0, hash="",
    )  # fmt: skip
    return {
        "recipe": resolved.tables,
        "source": source,
        "data": classes.model_dump(mode="json"),
        "task": task.model_dump(mode="json"),
    }


def _notes(contents: StateDict, kind: Format, *, guessed: bool) -> list[str]:
    """What a reader could not know: the choices made, and the alternatives."""
    notes = []
    if guessed:
        others = [f for f in looks_like(contents.weights) if f != kind]
        fits = f"; its names fit {', '.join(others)} too (--format)" if others else ""
        notes.append(f"read as {kind} by its names and shapes{fits}")
    if contents.averaged:
        ignored = f"{contents.averaged} is ignored (--key selects it)"
        notes.append(f"averaged weights, of {contents.key}; {ignored}")
    return notes


def _recipe(
    reading: Reading,
    format: Format,
    registry: Registry,
    given: Table | str | None,
    overrides: Sequence[str],
) -> tuple[Resolved, Shape]:
    """The published method's recipe around the network that the file holds, and its images."""
    data: Table = {"use": given} if isinstance(given, str) else dict(given or {})
    data.setdefault("use", DATASETS.get(reading.n_classes))
    if data["use"] is None:
        count = f"{reading.n_classes} classes, and no data set is known for that many"
        raise ConfigError(f"the weights have {count}: pass it by --dataset")
    backbone, objective = PARTS[format]
    if format == "ebjdat":  # its program has three folders, one for each backbone
        plain = "jem" if reading.network.norm == "none" else "sadajem"
        backbone = "jempp" if reading.yopo else plain
    network: Table = {"use": "wrn", **reading.network.model_dump(mode="json")}
    backbone_table = {"use": backbone, "network": network}
    named = {"data": data, "backbone": backbone_table, "objective": {"use": objective}}
    resolved = resolve(registry, named=named, overrides=tuple(overrides))
    known = resolved.recipe.data.n_classes
    if known != reading.n_classes:
        raise DataError(
            f"the weights have {reading.n_classes} classes, but {data['use']} has {known}; pass "
            f"the data set that they were trained on by --dataset"
        )
    shape = _shape(reading, data["use"], resolved.recipe.data)
    return complete(resolved, registry), shape


def _shape(reading: Reading, name: str, data: Dataset) -> Shape:
    """The shape of the data set's images, for which the network must have been built."""
    shape: Shape | None = getattr(data, "shape", None)
    if shape is None:
        shape = tuple(data.load("test").x.shape[1:])  # type: ignore[assignment]
    if shape is None or shape[0] != reading.channels or stages_for(shape[1]) != reading.stages:
        made = "64 px and more" if reading.stages == 4 else "less than 64 px"
        expected = f"{shape[0]} channels and {shape[1]} px" if shape else "no shape"
        raise DataError(
            f"the network takes images of {reading.channels} channels and, with "
            f"{reading.stages} stages, of {made}; those of {name} have {expected}. Pass the data "
            f"set that it was trained on by --dataset: for a folder of images --dataset folder "
            f"--data-dir DIR, and --set data.size=64 to resize them"
        )
    return shape


def _name(reading: Reading) -> str:
    return f"wrn-{reading.network.depth}-{reading.network.width}"


def _card(source: Table, reading: Reading, resolved: Resolved) -> str:
    rows = [
        ("authors' format", source["format"]),
        ("file", source["file"]),
        ("under the key", source["key"] or "none"),
        ("SHA-256 of the file", source["sha256"]),
        ("network", f"{_name(reading)}, norm {reading.network.norm}"),
        ("energy", source["energy"]),
        ("data set", resolved.tables["data"]["use"]),
        ("left out", ", ".join(source["left_out"]) or "nothing"),
        *(("note", note) for note in source["notes"]),
    ]
    return (
        f"Published weights under jemkit's names.\n\n{table_of(rows)}\n"
        "The recipe is jemkit's for the published method, not read from the file; the weights "
        "are the authors'. No figure was measured yet: `jemkit evaluate` measures them.\n"
    )
