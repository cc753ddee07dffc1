"""The whole page: all sections with content, styles and script, in one file."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from jemkit.errors import DataError
from jemkit.evaluation.report import gallery, plots, tables
from jemkit.evaluation.report.book import UNDRAWABLE, Book, badge, note, section
from jemkit.evaluation.run_table import read_runs
from jemkit.metrics import charts
from jemkit.metrics import record as records
from jemkit.metrics.record_file import Record
from jemkit.runtime.files import write_text
from jemkit.runtime.html import Html, coded, join, tag

SECTIONS: dict[str, tuple[Callable[[Book], Html | None], str]] = {
    "Comparison": (tables.overview, ""),
    "Warnings": (tables.cautions, ""),
    "Indicators": (tables.indicators, "failure indicators: `jemkit evaluate` with attacks"),
    "Robustness": (plots.robustness, "curves against radius and steps: `jemkit evaluate`"),
    "Energies": (plots.energies, "energy histograms: `jemkit evaluate --only energies`"),
    "Calibration": (plots.calibration, "reliability: `jemkit evaluate --only calibration`"),
    "OOD": (tables.ood, "out-of-distribution: `jemkit evaluate --only ood`"),
    "Samples": (gallery.samples, "sample grids: `jemkit evaluate --only generation`"),
    "Pictures": (gallery.others, ""),
    "Training": (plots.training, "training curves: the folder has no metrics.csv"),
    "Recipe": (tables.recipe, "recipes: the folder has no config.json"),
    "Figures": (tables.every_figure, ""),
}
"""Each section, with the hint to show if it has no content."""


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one or several runs, by default to the first run's folder."""
    page = render(folders)
    path = Path(folders[0]).resolve() / "report.html" if out is None else out
    if path.is_dir():
        raise DataError(f"{path} is a folder; --out must be the HTML file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render(folders: Sequence[Path]) -> str:
    """The page as HTML; the same runs give the same bytes."""
    book = read_book(folders)
    shown = {name: _shown(book, name) for name in SECTIONS}
    missing = [
        tag("li", coded(SECTIONS[name][1]))
        for name, part in shown.items()
        if part is None and SECTIONS[name][1]
    ]
    body = [part for part in shown.values() if part is not None]
    if missing:
        body.append(section("absent", "Not here", tag("ul", *missing, class_="notes")))
    links = (tag("a", name, href=f"#{_id(part)}") for name, part in shown.items() if part)
    names, short = ", ".join(run.name for run in book.runs), ", ".join(book.names)
    return _document(
        f"jemkit: {names}",
        tag("header", tag("p", "jemkit report", class_="kind"), tag("h1", short), _subjects(book)),
        tag("nav", *links, aria_label="Sections"),
        tag("main", *body),
        tag("footer", *_footer(book)),
    )


def read_book(folders: Sequence[Path]) -> Book:
    """The runs of a report; a run that was not evaluated yet has an empty record."""
    return Book(read_runs(folders, _read))


def _document(title: str, *body: Html) -> str:
    style = charts.style() + files(__package__).joinpath("parts.css").read_text("utf-8")
    script = files(__package__).joinpath("parts.js").read_text("utf-8")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    )
    whole = join(
        Html("<!doctype html>\n"), Html('<html lang="en"><head>'), Html(head), tag("title", title),
        Html(f"<style>{style}</style></head><body>"), *body,
        Html(f"<script>{script}</script></body></html>\n"),
    )  # fmt: skip
    return str(whole)


def _shown(book: Book, name: str) -> Html | None:
    """A section, or a message if a table has a form that this version cannot plot."""
    try:
        return SECTIONS[name][0](book)
    except UNDRAWABLE as error:
        message = f"This part of the record cannot be drawn: {type(error).__name__}: {error}"
        return section(name.lower(), name, note(message))


def _read(folder: Path) -> Record:
    """The record of a run; if it was not evaluated yet, an empty one with a hint."""
    if (folder / records.JSON).exists() or not (folder / "config.json").exists():
        return records.load(folder)
    return Record({}, {}, [], warnings=[f"not evaluated yet: `jemkit evaluate {folder}`"])


def _subjects(book: Book) -> Html:
    rows = []
    for slot, run in enumerate(book.runs):
        about, card = run.record.subject, run.record.protocol
        parts = [about[key] for key in ("backbone", "objective", "data", "model") if key in about]
        if "images" in card:
            parts.append(f"{card['images']} {card.get('split', 'test')} images")
        if card.get("radius_px") is not None:
            parts.append(f"{card.get('norm')} {card['radius_px']:g}/255")
        rows.append(
            tag(
                "li",
                book.run_name(slot),
                " ",
                " · ".join(map(str, parts)),
                " ",
                badge(book.label(slot)),
            )
        )
    return tag("ul", *rows, class_="subjects")


def _footer(book: Book) -> list[Html]:
    lines = []
    for run in book.runs:
        card = run.record.protocol
        versions = ", ".join(f"{k} {v}" for k, v in dict(card.get("versions", {})).items())
        sha = card.get("checkpoint", "not judged")
        lines.append(tag("p", f"{run.name}: {versions}; weights ", tag("code", sha)))
    return lines


def _id(part: Html) -> str:
    return part.split('id="', 1)[1].split('"', 1)[0]
