"""The record of an evaluation: evaluation.json in a run's folder, and what belongs to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jemkit.errors import DataError
from jemkit.evaluator import Notes
from jemkit.figures import Figure
from jemkit.runtime.files import load_tensors, read_json, write_bytes, write_json, write_tensors

FORMAT = 1
JSON, ROWS, PICTURES = "evaluation.json", "evaluation.safetensors", "evaluation"


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
        """A number that is not finite becomes null; `warnings` name it."""
        return {
            "format": FORMAT,
            "subject": finite(self.subject),
            "protocol": finite(self.protocol),
            "figures": [finite(figure._asdict()) for figure in self.figures],
            "tables": finite(self.tables),
            "left_out": self.left_out,
            "warnings": [*self.warnings, *_not_finite(self.figures)],
        }


def save(folder: Path, record: Record, notes: Notes) -> Path:
    """Write a record into a folder, over the figures of the same model that it measures anew.

    Figures of the same names are replaced; those of another checkpoint are dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = _joined(folder, record)
    pictures = folder / PICTURES
    if notes.pictures:
        pictures.mkdir(exist_ok=True)
    for name, png in notes.pictures.items():
        write_bytes(pictures / f"{name}.png", png)
    write_tensors(folder / ROWS, {name: row.contiguous() for name, row in whole.rows.items()})
    write_json(folder / JSON, whole.to_json())
    return folder / JSON


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
    path = folder / JSON
    if not path.exists():
        raise DataError(f"{folder} holds no {JSON}; `jemkit evaluate {folder}` writes it")
    saved = read_json(path)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise DataError(f"{path} has record format {found!r}; this jemkit reads {FORMAT}")
    try:
        figures = [Figure(**{**f, "value": _number(f["value"])}) for f in saved["figures"]]
        rows = load_tensors(folder / ROWS) if (folder / ROWS).exists() else {}
        return Record(
            dict(saved["subject"]), dict(saved["protocol"]), figures, dict(saved["tables"]), rows,
            dict(saved["left_out"]), list(saved["warnings"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def pictures(folder: Path) -> dict[str, Path]:
    """The pictures beside a record, by name."""
    return {path.stem: path for path in sorted((folder / PICTURES).glob("*.png"))}


def _joined(folder: Path, record: Record) -> Record:
    """The record, with what an older one of the same weights has beside it.

    A standard figure, which may have taken hours, is not replaced by one that is not.
    """
    if not (folder / JSON).exists():
        return record
    try:
        old = load(folder)
    except DataError:  # damaged, or of another format: the new one takes its place
        return record
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
