"""Writes every figure of runs as PDF and SVG, pictures as PNG too, and tables as LaTeX and CSV."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jemkit.errors import DataError
from jemkit.evaluation.report import gallery, plots
from jemkit.evaluation.report.book import Book
from jemkit.metrics import charts
from jemkit.metrics.charts import Panel
from jemkit.runtime.files import write_bytes
from jemkit.runtime.html import tag
from jemkit.runtime.opening import make_folder, read_file
from jemkit_cli.paper import pdf
from jemkit_cli.paper.plain import plain
from jemkit_cli.paper.tabular import Grid, comma_separated, latex

DPI, COLUMN = 300, 3.25
"""Dots per inch of a picture, and the inches of a column that it fills."""
FONTS = "Helvetica, Arial, sans-serif"


@dataclass
class Written:
    """The files that were written, and what was left out."""

    folder: Path
    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, name: str, suffix: str, content: str | bytes) -> None:
        """A file, under a name that no other one has."""
        stem = re.sub(r"[^\w.+]+", "-", name.replace("~", "adv")).strip("-.").lower() or "figure"
        others = {path.name.casefold() for path in self.paths}
        names = (f"{stem}{f'-{i}' if i else ''}.{suffix}" for i in range(len(others) + 1))
        path = self.folder / next(one for one in names if one.casefold() not in others)
        write_bytes(path, content if isinstance(content, bytes) else content.encode())
        self.paths.append(path)


def write_all(book: Book, grids: Sequence[Grid], folder: Path) -> Written:
    """The charts, pictures and tables of runs in a folder."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; --figures must be a folder")
    make_folder(folder)
    reason = pdf.missing()
    written = Written(folder, notes=[reason] if reason else [])
    panels, faults = plots.panels(book)
    written.notes += faults
    for panel in panels:
        _chart(panel, written, paged=not reason)
    for name, path in gallery.files(book):
        try:
            _picture(name, read_file(path, gallery.LARGEST), written, paged=not reason)
        except (OSError, ValueError, SyntaxError) as error:  # of Pillow, where it is damaged
            written.notes.append(f"{path} cannot be read as PNG: {error}")
    for grid in grids:
        written.write(grid.name, "tex", latex(grid.head, grid.rows, grid.notes, grid.bold))
        written.write(grid.name, "csv", comma_separated(grid.data or [grid.head, *grid.rows]))
    return written


def _chart(panel: Panel, written: Written, *, paged: bool) -> None:
    svg = charts.picture([panel], columns=1)
    written.write(panel.name, "svg", plain(svg, FONTS))
    if paged:
        written.write(panel.name, "pdf", pdf.of_svg(plain(svg, pdf.FAMILY, accents=False)))


def _picture(name: str, content: bytes, written: Written, *, paged: bool) -> None:
    """A picture with whole enlarged pixels, at least as wide as a column at 300 dots per inch."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        times = max(1, -(-round(COLUMN * DPI) // image.width))
        size = (image.width * times, image.height * times)
        large = image.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, "PNG", dpi=(DPI, DPI))
    png = buffer.getvalue()
    written.write(name, "png", png)
    written.write(name, "svg", _svg(png, *size))
    if paged:
        written.write(name, "pdf", pdf.of_picture(png, *size))


def _svg(png: bytes, width: int, height: int) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = tag("image", href=source, width=width, height=height)
    whole = tag(
        "svg", image, xmlns="http://www.w3.org/2000/svg", width=f"{width / DPI:g}in",
        height=f"{height / DPI:g}in", viewBox=f"0 0 {width} {height}",
    )  # fmt: skip
    return f"{whole}\n"
