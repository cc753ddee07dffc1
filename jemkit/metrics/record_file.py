"""The files of a record, evaluation.json and evaluation.safetensors, and how they are read."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from jemkit.errors import DataError
from jemkit.metrics.figures import Figure, finite
from jemkit.runtime.files import load_tensors, read_json, write_json, write_tensors
from jemkit.runtime.work_cache import tensors_hash

FORMAT, UNSEALED = 3, 1  # of a record; the oldest has no hashes of its own

STEM = "evaluation"
JSON, ROWS, PICTURES = f"{STEM}.json", f"{STEM}.safetensors", STEM
SEAL = "sha256"

Folder = Annotated[str, Field(pattern=rf"^{STEM}(-[0-9a-f]{{8}})?$")]
File = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
"""Allowed names in a record: of the folder of its plots, and of a file in it."""

Kind = Literal["tables", "rows", "files"]


class Part(NamedTuple):
    """What one evaluator left at once: its figures by their keys, and what belongs to them.

    Tables, rows and files each map the evaluator's own name to the name in the record, where
    several parts may have left a table of one name.
    """

    evaluator: str
    key: str  # a hash of the evaluator and its protocol
    figures: tuple[str, ...] = ()
    tables: dict[str, str] = {}
    rows: dict[str, str] = {}
    files: dict[str, File] = {}

    def names(self, kind: Kind) -> dict[str, str]:
        """The evaluator's names of what it left of a kind, to those in the record."""
        return {"tables": self.tables, "rows": self.rows, "files": self.files}[kind]


@dataclass(frozen=True)
class Record:
    """All figures of a model on a data set, with protocols, tables and plots."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    subject: dict[str, Any]  # the evaluated model: path, SHA-256 of the weights, parts
    protocol: dict[str, Any]  # entries of the newest evaluation as a whole
    figures: list[Figure]  # the newest first
    tables: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # one value an image
    left_out: dict[str, str] = field(default_factory=dict)  # skipped evaluators, and why
    warnings: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)  # the newest first
    pictures: Folder = PICTURES  # the folder of its plots

    def value(self, name: str, **protocol: Any) -> float:
        """A figure's value by its name, and by entries of its protocol: radius_px=8."""
        return self.figure(name, **protocol).value

    def figure(self, name: str, **protocol: Any) -> Figure:
        """A figure by its name; if there are several, the newest standard one, else the newest.

        Entries of the protocol select among them: norm="L2", radius_px=128.
        Raises DataError if there is none.
        """
        named = [figure for figure in self.figures if figure.name == name]
        if not named:
            names = ", ".join(sorted({figure.name for figure in self.figures}))
            raise DataError(f"the record has no figure {name!r}; it has {names}")
        matches = [f for f in named if all(f.protocol.get(k) == v for k, v in protocol.items())]
        if not matches:
            wanted = ", ".join(f"{key} {value}" for key, value in protocol.items())
            raise DataError(f"the record has {name!r}, but not with {wanted}")
        return preferred(matches)

    def rows_of(self, figure: Figure) -> Tensor | None:
        """A figure's outcomes, image by image; None if there are none."""
        owner = next((p for p in self.owned() if figure.key in p.figures), None)
        return None if owner is None else self.rows.get(owner.rows.get(figure.name, ""))

    def owned(self, files: Iterable[str] = ()) -> list[Part]:
        """Its parts; a record without parts, such as one of an older format, is a single one."""
        if self.parts or not (self.figures or self.tables or self.rows):
            return self.parts
        keys = tuple(figure.key for figure in self.figures)
        named = [{name: name for name in names} for names in (self.tables, self.rows, files)]
        return [Part("", hashlib.sha256(json.dumps(keys).encode()).hexdigest(), keys, *named)]

    def named(self, kind: Kind, name: str) -> list[str]:
        """The names in this record of all tables, rows or files that evaluators call `name`."""
        stored = [part.names(kind)[name] for part in self.owned() if name in part.names(kind)]
        return sorted(stored, key=lambda one: one != name)

    def card_of(self, kind: Kind, stored: str) -> dict[str, Any]:
        """The protocol of a table, rows or a file."""
        for part in self.owned():
            if stored in part.names(kind).values():
                owned = [f for f in self.figures if f.key in part.figures]
                if owned:
                    return preferred(owned).protocol
        return self.protocol

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null; `warnings` name it. Its hashes come with it."""
        broken = (figure.name for figure in self.figures if not math.isfinite(figure.value))
        lost = [f"{name} is not a finite number" for name in broken]
        plain = {
            "format": FORMAT,
            "subject": finite(self.subject),
            "protocol": finite(self.protocol),
            "figures": [finite(figure._asdict()) for figure in self.figures],
            "tables": finite(self.tables),
            "left_out": self.left_out,
            "warnings": list(dict.fromkeys([*self.warnings, *lost])),
            "parts": [finite(part._asdict()) for part in self.parts],
            "pictures": self.pictures,
        }
        return {**plain, SEAL: {"record": _hash(plain), "rows": tensors_hash(self.rows)}}


def preferred(figures: Sequence[Figure]) -> Figure:
    """The first one with the standard protocol, else the first."""
    return next((f for f in figures if f.protocol.get("standard")), figures[0])


def next_rows(stem: str) -> str:
    """Holds the rows until the JSON is written: if killed in between, the record stays intact."""
    return f".{stem}.next.safetensors"


def write(folder: Path, record: Record, stem: str = STEM) -> None:
    """Write a record whole or not at all."""
    write_tensors(folder / next_rows(stem), record.rows)
    write_json(folder / f"{stem}.json", record.to_json())
    os.replace(folder / next_rows(stem), folder / f"{stem}.safetensors")


def settle(folder: Path) -> None:
    """Complete an interrupted write: the rows of the existing JSON replace the others."""
    for pattern in (f".{STEM}*.json.*", f".{STEM}*.safetensors.*", f"{STEM}*/.*.png.*"):
        for broken in folder.glob(pattern):
            broken.unlink()
    for beside in folder.glob(next_rows(f"{STEM}*")):
        stem = beside.name.removeprefix(".").removesuffix(".next.safetensors")
        try:
            wanted = _sealed(folder / f"{stem}.json")[1]
            whole = wanted is not None and tensors_hash(load_tensors(beside)) == wanted
        except DataError:
            whole = False
        if whole:
            os.replace(beside, folder / f"{stem}.safetensors")
        else:
            beside.unlink()


def load(folder: Path, stem: str = STEM) -> Record:
    """The record in a run's folder: of the model and data that were evaluated last."""
    try:
        return _read(folder, stem)
    except DataError:  # another process may be between writing its two files
        return _read(folder, stem)


def beside(folder: Path) -> list[str]:
    """The stems of the records of other models or other data in a folder, in order."""
    return sorted(path.stem for path in folder.glob(f"{STEM}-*.json"))


def every(folder: Path) -> Iterator[Record]:
    """Every record of a folder, evaluation.json first."""
    yield load(folder)
    for stem in beside(folder):
        yield load(folder, stem)


def _read(folder: Path, stem: str) -> Record:
    path = folder / f"{stem}.json"
    if folder.is_file():
        raise DataError(f"{folder} is a file; expected the folder of a run")
    if not path.exists():
        raise DataError(f"no {path.name} in {folder}; `jemkit evaluate` of a run writes it there")
    saved, wanted = _sealed(path)
    rows = _rows(folder, stem, wanted)
    try:
        record = TypeAdapter(Record).validate_python({**saved, "rows": rows})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is damaged: {place}: {first['msg']}") from None
    for part in record.parts:
        lost = set(part.tables.values()) - record.tables.keys()
        lost |= set(part.rows.values()) - record.rows.keys()
        if lost:
            raise DataError(f"{path} is damaged: {min(lost)!r} is not there")
    return replace(record, parts=record.owned())


def _sealed(path: Path) -> tuple[dict[str, Any], str | None]:
    """The contents of a record's JSON, and the hash of its rows; None for old formats."""
    saved = read_json(path)
    version = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if version not in (1, 2, FORMAT):
        raise DataError(f"{path} has record format {version!r}; this jemkit reads 1, 2, {FORMAT}")
    seal = saved.pop(SEAL, None)
    if seal is None and version == UNSEALED:
        return saved, None
    if not isinstance(seal, dict) or seal.get("record") != _hash(saved):
        raise DataError(
            f"{path} is damaged: the SHA-256 of its figures is not the stored one. `jemkit "
            f"evaluate` measures them again, and keeps this file"
        )
    return saved, str(seal.get("rows"))


def _rows(folder: Path, stem: str, wanted: str | None) -> dict[str, Tensor]:
    """The rows of a record's JSON, whose hash is `wanted`."""
    usual = folder / f"{stem}.safetensors"
    there = [path for path in (folder / next_rows(stem), usual) if path.exists()]
    if wanted is None:
        return load_tensors(usual) if usual in there else {}
    for path in there:
        try:
            rows = load_tensors(path)
        except DataError:  # an interrupted write, or damaged
            continue
        if tensors_hash(rows) == wanted:
            return rows
    raise DataError(
        f"{usual} is missing or damaged: the SHA-256 of its outcomes is not the one in "
        f"{stem}.json. `jemkit evaluate` measures it again"
    )


def _hash(plain: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def pictures(folder: Path, record: Record | None = None) -> dict[str, Path]:
    """The plots of a record, by name."""
    where = folder / (record.pictures if record else PICTURES)
    return {path.stem: path for path in sorted(where.glob("*.png"))}
