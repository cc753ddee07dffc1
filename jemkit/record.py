"""The record of an evaluation: evaluation.json in a run's folder, and what belongs to it."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jemkit.errors import DataError
from jemkit.evaluator import Notes
from jemkit.figures import Figure
from jemkit.runtime.files import (
    load_tensors,
    read_json,
    set_aside,
    write_bytes,
    write_json,
    write_tensors,
)
from jemkit.runtime.ledger import tensors_hash
from jemkit.runtime.lock import locked

FORMAT, UNSEALED = 2, 1
"""Of a record; the older one has no hashes of its own."""

JSON, ROWS, PICTURES = "evaluation.json", "evaluation.safetensors", "evaluation"
NEXT = ".evaluation.next.safetensors"
"""ROWS until the JSON beside them is written: killed between the two, a record stays whole."""

LOCK, PATIENCE = ".evaluation.lock", 60.0
"""Held while a record is read, joined and written; the seconds that it is waited for."""

SEAL = "sha256"


@dataclass(frozen=True)
class Record:
    """Every figure of a model with its protocol, and what reports draw."""

    subject: dict[str, Any]  # what was judged: path, SHA-256 of the weights, parts
    protocol: dict[str, Any]  # what holds for the evaluation as a whole
    figures: list[Figure]
    tables: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # one value an image
    left_out: dict[str, str] = field(default_factory=dict)  # evaluators, and why
    warnings: list[str] = field(default_factory=list)

    def value(self, name: str) -> float:
        """A figure's value by its name."""
        return self.figure(name).value

    def figure(self, name: str) -> Figure:
        found = next((figure for figure in self.figures if figure.name == name), None)
        if found is None:
            names = ", ".join(sorted(figure.name for figure in self.figures))
            raise DataError(f"the record has no figure {name!r}; it has {names}")
        return found

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null; `warnings` name it. Its hashes come with it."""
        plain = {
            "format": FORMAT,
            "subject": finite(self.subject),
            "protocol": finite(self.protocol),
            "figures": [finite(figure._asdict()) for figure in self.figures],
            "tables": finite(self.tables),
            "left_out": self.left_out,
            "warnings": [*self.warnings, *_not_finite(self.figures)],
        }
        return {**plain, SEAL: {"record": _hash(plain), "rows": tensors_hash(self.rows)}}


def save(folder: Path, record: Record, notes: Notes) -> Path:
    """Write a record into a folder, over the figures of the same model that it measures anew.

    Figures of the same names are replaced; those of another checkpoint are dropped. Of several
    evaluations that write at once each joins what the one before it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"writes its {JSON}", patience=PATIENCE):
        _settle(folder)
        whole = _joined(folder, record, notes)
        pictures = folder / PICTURES
        if notes.pictures:
            pictures.mkdir(exist_ok=True)
        for name, png in notes.pictures.items():
            write_bytes(pictures / f"{name}.png", png)
        write_tensors(folder / NEXT, whole.rows)
        write_json(folder / JSON, whole.to_json())
        os.replace(folder / NEXT, folder / ROWS)
    return folder / JSON


def _settle(folder: Path) -> None:
    """End what a kill broke off: the rows of the JSON that is there take their place."""
    for pattern in (f".{JSON}.*", f".{NEXT}.*", f"{PICTURES}/.*.png.*"):
        for broken in folder.glob(pattern):
            broken.unlink()
    if not (folder / NEXT).exists():
        return
    try:
        wanted = _sealed(folder / JSON)[1]
        whole = wanted is not None and tensors_hash(load_tensors(folder / NEXT)) == wanted
    except DataError:
        whole = False
    if whole:
        os.replace(folder / NEXT, folder / ROWS)
    else:
        (folder / NEXT).unlink()


def save_adversarial(folder: Path, notes: Notes, record: Record) -> list[Path]:
    """Write the attacked images, [N, C, H, W] float32 in [0, 1], a file for each attack."""
    (folder / PICTURES).mkdir(exist_ok=True)
    paths = []
    for label, x_adv in notes.adversarial.items():
        path = folder / PICTURES / f"adversarial-{label}.safetensors"
        right = record.rows[label].to(torch.uint8)
        write_tensors(path, {"x_adv": x_adv, "right": right})
        paths.append(path)
    return paths


def load(folder: Path) -> Record:
    """The record in a run's folder."""
    try:
        return _read(folder)
    except DataError:  # another process may have been between its two files
        return _read(folder)


def _read(folder: Path) -> Record:
    path = folder / JSON
    if not path.exists():
        raise DataError(f"no {JSON} in {folder}; `jemkit evaluate` of a run writes it there")
    saved, wanted = _sealed(path)
    rows = _rows(folder, wanted)
    try:
        figures = [Figure(**{**f, "value": _number(f["value"])}) for f in saved["figures"]]
        return Record(
            dict(saved["subject"]), dict(saved["protocol"]), figures, dict(saved["tables"]), rows,
            dict(saved["left_out"]), list(saved["warnings"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _sealed(path: Path) -> tuple[dict[str, Any], str | None]:
    """What a record's JSON holds, as it was written, and the hash of its rows; None of old ones."""
    saved = read_json(path)
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if found not in (FORMAT, UNSEALED):
        raise DataError(
            f"{path} has record format {found!r}; this jemkit reads {UNSEALED}, {FORMAT}"
        )
    seal = saved.pop(SEAL, None)
    if seal is None and found == UNSEALED:
        return saved, None
    if not isinstance(seal, dict) or seal.get("record") != _hash(saved):
        raise DataError(
            f"{path} is damaged: its figures' SHA-256 is not the one that it holds. `jemkit "
            "evaluate` measures them anew, and keeps this file beside the new one"
        )
    return saved, str(seal.get("rows"))


def _rows(folder: Path, wanted: str | None) -> dict[str, Tensor]:
    """The rows that belong to a record's JSON, whose hash is `wanted`."""
    there = [folder / name for name in (NEXT, ROWS) if (folder / name).exists()]
    if wanted is None:
        return load_tensors(folder / ROWS) if folder / ROWS in there else {}
    for path in there:
        try:
            rows = load_tensors(path)
        except DataError:  # half of what a kill broke off, or damaged
            continue
        if tensors_hash(rows) == wanted:
            return rows
    raise DataError(
        f"{folder / ROWS} is missing or damaged: the SHA-256 of its outcomes is not the one in "
        f"{JSON}. "
        "`jemkit evaluate` measures them anew"
    )


def _hash(plain: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON: keys in order, no spaces."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def pictures(folder: Path) -> dict[str, Path]:
    """The pictures beside a record, by name."""
    return {path.stem: path for path in sorted((folder / PICTURES).glob("*.png"))}


def _joined(folder: Path, record: Record, notes: Notes) -> Record:
    """The record, with what an older one of the same weights has beside it.

    A standard figure, which may have taken hours, is not replaced by one that is not.
    """
    if not (folder / JSON).exists():
        return record
    try:
        old = load(folder)
    except DataError as error:  # the new one takes its place
        aside = set_aside(folder / JSON)
        notes.warnings.append(f"the record that was here is kept as {aside.name}: {error}")
        return replace(record, warnings=list(dict.fromkeys([*record.warnings, *notes.warnings])))
    if old.subject.get("sha256") != record.subject.get("sha256"):
        return record
    whole = {f.name for f in old.figures if f.protocol.get("standard")}
    lesser = {f.name for f in record.figures if not f.protocol.get("standard")} & whole
    anew = {figure.name for figure in record.figures} - lesser
    measured = {figure.protocol.get("evaluator") for figure in record.figures}
    kept = [f for f in old.figures if f.name not in anew]
    left_out = {k: v for k, v in old.left_out.items() if k not in measured}
    return Record(
        record.subject,
        record.protocol,
        [*(f for f in record.figures if f.name in anew), *kept],
        {**old.tables, **record.tables},
        {**old.rows, **{k: row for k, row in record.rows.items() if k not in lesser}},
        {**left_out, **record.left_out},
        list(dict.fromkeys([*(old.warnings if kept else ()), *record.warnings])),
    )


def finite(value: Any) -> Any:
    """A tree as JSON has it; a number that is not finite has no JSON and becomes None."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(figures: list[Figure]) -> list[str]:
    names = [figure.name for figure in figures if not math.isfinite(figure.value)]
    return [f"{name} is not a finite number" for name in names]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
