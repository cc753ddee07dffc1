"""The sections of a report that are pictures: samples, and what evaluators left beside a record."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jemkit.evaluation.report.book import Book, note, panel, section
from jemkit.evaluation.report.tables import protocol_words
from jemkit.evaluation.run_table import Judged
from jemkit.metrics import record as records
from jemkit.runtime.html import Html, tag
from jemkit.runtime.opening import MIB, read_file

LARGEST = 64 * MIB  # of a picture, in bytes
PNG = b"\x89PNG\r\n\x1a\n"
LEGACY_PICTURES = {
    "energies": "energies", "energy_path": "energy_path", "reliability": "reliability",
    "energy_confidence": "energy_confidence", "ood": "ood_energies",
}  # fmt: skip
"""Pictures that jemkit 0.1 left, with the tables that this page draws itself in their place."""

CAPTIONS = {
    "samples": "Samples that the evaluation drew",
    "neighbours": "Samples, each beside the training images nearest to it",
    "energies": "E(x) and E(x, y) of clean, adversarial and generated images",
    "energy_confidence": "Energy against confidence, image by image",
    "energy_path": "Energies on the way of an attack",
    "reliability": "Accuracy against confidence",
    "ood": "E(x) of the test images and of images from elsewhere",
}
"""What an evaluation's pictures show."""


def samples(book: Book) -> Html | None:
    """The newest samples of training, and those that an evaluation drew."""
    pictures = [_newest_samples(run.folder) | _beside(run, of_samples=True) for run in book.runs]
    return _gallery(book, "pictures", "Samples", pictures)


def others(book: Book) -> Html | None:
    """Every other picture of the evaluation that no section draws itself."""
    pictures = [_beside(run, of_samples=False) for run in book.runs]
    return _gallery(book, "others", "Other pictures", pictures)


def _gallery(book: Book, name: str, title: str, pictures: Sequence[dict[str, Path]]) -> Html | None:
    parts = []
    for slot, (run, paths) in enumerate(zip(book.runs, pictures, strict=True)):
        panels = [_picture(caption, path, run.name) for caption, path in paths.items()]
        if panels:
            parts += [tag("h3", book.run_name(slot)), tag("div", *panels, class_="pictures")]
    return section(name, title, *parts) if parts else None


def _beside(run: Judged, *, of_samples: bool) -> dict[str, Path]:
    """The pictures beside a run's record but for those of tables that this page draws."""
    return {
        _caption(name, run): path
        for name, path in records.pictures(run.folder, run.record).items()
        if (LEGACY_PICTURES.get(name) not in run.record.tables)
        and name.startswith(("samples", "neighbours")) == of_samples
    }


def _caption(name: str, run: Judged) -> str:
    """What a picture shows; one of a selection, or of another protocol, says which."""
    plain, at, _ = name.partition("@")
    stem, dash, rest = plain.partition("-")
    otherwise = f"; {protocol_words(run.record.card_of('files', name))} ({name})" if at else ""
    if stem not in CAPTIONS:
        return f"{plain}{otherwise}"
    return f"{CAPTIONS[stem]}{f' ({rest})' if dash else ''}{otherwise}"


def _newest_samples(folder: Path) -> dict[str, Path]:
    """The last epoch's grid, by its number; names, not times, so that a copy gives the same."""
    names = ((re.fullmatch(r"epoch-(\d+)", p.stem), p) for p in (folder / "samples").glob("*.png"))
    numbered = [(int(match[1]), path) for match, path in names if match]
    return {f"During training, after epoch {n}": path for n, path in sorted(numbered)[-1:]}


def _picture(title: str, path: Path, run: str) -> Html:
    content = read_file(path, LARGEST)
    if not content.startswith(PNG):
        return panel(title, note(f"{path.name} is no PNG"))
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return panel(title, tag("img", src=source, alt=f"{title}, {run}"))
