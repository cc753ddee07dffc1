"""PDF of plain SVG and of pictures, by svglib and reportlab."""

import io
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jemkit.runtime.extras import install
from jemkit_cli.paper.plain import SVG

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas

Face = tuple[str, str]
FAMILY = "Vera"
FACES = {"Vera": ("normal", "normal"), "VeraBd": ("bold", "normal"),
         "VeraIt": ("normal", "italic"), "VeraBI": ("bold", "italic")}  # fmt: skip
"""Files of Bitstream Vera Sans, which reportlab contains; a PDF has the characters that it uses."""
ANCHORS = {"start": 0.0, "middle": 0.5, "end": 1.0}
POINTS = 72 / 300
"""The size of a pixel of a picture on paper."""


def missing() -> str:
    """Why no PDF can be written; empty if it can."""
    lost = [name for name in ("svglib", "reportlab") if find_spec(name) is None]
    if not lost:
        return ""
    return f"no PDF is written, which needs {' and '.join(lost)}: {install('figures')}"


def of_svg(svg: str) -> bytes:
    """A page as large as an SVG of `plain`."""
    from reportlab.graphics import renderPDF
    from svglib.svglib import svg2rlg

    drawing: Any = svg2rlg(io.BytesIO(_placed(svg, _fonts()).encode()))
    page, content = _page(drawing.width, drawing.height)
    renderPDF.draw(drawing, page, 0, 0)
    page.save()
    return content.getvalue()


def _placed(svg: str, fonts: Mapping[Face, str]) -> str:
    """The SVG with each part of a formula as a text in its place, since svglib centres each."""
    from reportlab.pdfbase.pdfmetrics import stringWidth

    root = ET.fromstring(svg)
    texts = [text for text in root.iter(f"{SVG}text") if len(text)]
    for text in texts:
        size, weight = float(text.get("font-size", "11")), text.get("font-weight", "normal")
        x, y, places = 0.0, float(text.get("y", "0")), []
        for span in text:
            words, own = span.text or "", float(span.get("font-size", size))
            font = fonts[weight, span.get("font-style", "normal")]
            x += float(span.attrib.pop("dx", "0"))
            y += float(span.attrib.pop("dy", "0"))
            span.text = words.strip()  # spaces at the ends are not drawn
            before = words[: len(words) - len(words.lstrip())]
            places.append((span, x + stringWidth(before, font, own), y, own))
            x += stringWidth(words, font, own)
        left = float(text.get("x", "0")) - x * ANCHORS[text.attrib.pop("text-anchor", "start")]
        for span, at, below, own in places:
            span.tag = f"{SVG}text"
            span.attrib.update(
                {"x": f"{left + at:.2f}", "y": f"{below:.2f}", "font-size": f"{own}"}
            )
        text.tag = f"{SVG}g"
        del text.attrib["x"], text.attrib["y"]
    return ET.tostring(root, encoding="unicode")


def of_picture(png: bytes, width: int, height: int) -> bytes:
    """A page as large as a PNG at 300 dots per inch."""
    from reportlab.lib.utils import ImageReader

    page, content = _page(width * POINTS, height * POINTS)
    page.drawImage(ImageReader(io.BytesIO(png)), 0, 0, width * POINTS, height * POINTS)
    page.save()
    return content.getvalue()


def _page(width: float, height: float) -> "tuple[Canvas, io.BytesIO]":
    """An empty page; the same drawing gives the same bytes."""
    from reportlab.pdfgen.canvas import Canvas

    content = io.BytesIO()
    return Canvas(content, pagesize=(width, height), pageCompression=1, invariant=1), content


@cache
def _fonts() -> dict[Face, str]:
    """The names by which reportlab knows the faces, once they are registered."""
    import reportlab
    from svglib.fonts import register_font

    folder = Path(reportlab.__file__).parent / "fonts"
    return {
        (weight, style): str(register_font(FAMILY, str(folder / f"{name}.ttf"), weight, style)[0])
        for name, (weight, style) in FACES.items()
    }
