"""The sections of a report with images: samples, and images saved by evaluators."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jemkit.evaluation.report.book import Book, captioned, note, section
from jemkit.evaluation.report.tables import protocol_words
from jemkit.evaluation.run_table import Judged
from jemkit.metrics import record as records
from jemkit.runtime.html import Html, tag
from jemkit.runtime.opening import MIB, read_file

LARGEST = 64 * MIB  # of a picture, in bytes
PNG = b"\x89PNG\r\n\x1a\n"

CAPTIONS = {
    "samples": "Samples drawn by the evaluation",
    "neighbours": "Samples, each with the nearest training images",
}
"""Captions of the images of an evaluation."""


def samples(book: Book) -> Html | None:
    """The newest samples of training, and those drawn by an evaluation."""
    pictures = [_newest_samples(run.folder) | _beside(run, of_samples=True) for run in book.runs]
    return _gallery(book, "pictures", "Samples", pictures)


def others(book: Book) -> Html | None:
    """All other images of the evaluation that no section plots itself."""
    pictures = [_beside(run, of_samples=False) for run in book.runs]
    return _gallery(book, "others", "Other pictures", pictures)


def files(book: Book) -> list[tuple[str, Path]]:
    """Every picture of a report, with a name for a file."""
    return [
        (f"{name}-{book.names[slot]}", path)
        for slot, run in enumerate(book.runs)
        for name, path in [
            *(("training-samples", path) for path in _newest_samples(run.folder).values()),
            *records.pictures(run.folder, run.record).items(),
        ]
    ]


def _gallery(book: Book, name: str, title: str, pictures: Sequence[dict[str, Path]]) -> Html | None:
    parts = []
    for slot, (run, paths) in enumerate(zip(book.runs, pictures, strict=True)):
        panels = [_picture(caption, path, run.name) for caption, path in paths.items()]
        if panels:
            parts += [tag("h3", book.run_name(slot)), tag("div", *panels, class_="pictures")]
    return section(name, title, *parts) if parts else None


def _beside(run: Judged, *, of_samples: bool) -> dict[str, Path]:
    """The images of a run's record."""
    return {
        _caption(name, run): path
        for name, path in records.pictures(run.folder, run.record).items()
        if name.startswith(("samples", "neighbours")) == of_samples
    }


def _caption(name: str, run: Judged) -> str:
    """The caption of an image; it states a selection or another protocol."""
    plain, at, _ = name.partition("@")
    stem, dash, rest = plain.partition("-")
    otherwise = f"; {protocol_words(run.record.card_of('files', name))} ({name})" if at else ""
    if stem not in CAPTIONS:
        return f"{plain}{otherwise}"
    return f"{CAPTIONS[stem]}{f' ({rest})' if dash else ''}{otherwise}"


def _newest_samples(folder: Path) -> dict[str, Path]:
    """The grid of the last epoch, by number.

    It is chosen by name, not by time, so that a copy of the run gives the same page.
    """
    place = folder / "samples"
    own = [] if place.is_symlink() else [p for p in place.glob("*.png") if not p.is_symlink()]
    names = ((re.fullmatch(r"epoch-(\d+)", path.stem), path) for path in own)
    numbered = [(int(match[1]), path) for match, path in names if match]
    return {f"During training, after epoch {n}": path for n, path in sorted(numbered)[-1:]}


def _picture(title: str, path: Path, run: str) -> Html:
    content = read_file(path, LARGEST)
    if not content.startswith(PNG):
        return captioned(title, note(f"{path.name} is no PNG"))
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return captioned(title, tag("img", src=source, alt=f"{title}, {run}"))
