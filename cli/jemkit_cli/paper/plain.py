"""Charts as plain SVG: every style an attribute, and formulas set as such.

Programs that know neither style sheets nor variables, such as LaTeX's and office programs, then
show what a browser shows.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jemkit.metrics import charts

SVG = "{http://www.w3.org/2000/svg}"
PAPER = {"--paper": "#ffffff", "--sheet": "#ffffff", "--soft": "#3d434b"}
"""Colours for print instead of those of a page."""
MEDIA = re.compile(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}")
RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")
PART = re.compile(r"\.([\w-]+)|\[class~=([\w-]+)\]")
VARIABLE = re.compile(r"var\((--[\w-]+)\)")
FORMULA = re.compile(
    r"\b(?P<of>[Ep])\((?P<inner>[^()]*)\)|(?<![^\s(])L(?P<norm>∞|[12])(?![^\s,)])"
    r"|\b(?P<adversarial>x~)|(?<=, )(?P<image>x)(?=,|$)|(?P<minus> - )(?=E\()"
    r"|(?<=\s)(?P<sign>-)(?=\d)"
)
WIDER = 0.13
"""How much further a tilde over an x reaches than the x, in parts of the font's size."""
LIFT = 3.2
"""How far an index is moved, in units of the drawing."""


class Piece(NamedTuple):
    """A part of a line of text, and how it is set."""

    words: str
    italic: bool = False
    shift: float = 0.0  # down; an index is also smaller
    back: float = 0.0  # to the left, in parts of the font's size


def plain(svg: str, family: str, *, accents: bool = True) -> str:
    """The SVG of `charts.picture` without a style sheet, in a font.

    A font without combining accents has them beside its letters otherwise, as in x~.
    """
    root = ET.fromstring(svg)
    sheet = list(_rules(charts.style()))
    variables = {**dict(_declarations(sheet, ":root")), **PAPER}
    for element in root.iter():
        _style(element, sheet, variables)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}style", f"{SVG}title"):
                parent.remove(child)
            elif child.tag == f"{SVG}svg":  # in its own place and size
                child.tag = f"{SVG}g"
                for name in ("viewBox", "width", "height"):
                    child.attrib.pop(name, None)
    for text in root.iter(f"{SVG}text"):
        _typeset(text, accents)
    root.set("font-family", family)
    ET.register_namespace("", SVG.strip("{}"))
    return ET.tostring(root, encoding="unicode") + "\n"


def pieces(line: str, *, accents: bool = True) -> list[Piece]:
    """A line of text with its formulas: E(x~), L∞."""
    parts, at = [], 0
    for match in FORMULA.finditer(line):
        parts += [Piece(line[at : match.start()]), *_formula(match, accents)]
        at = match.end()
    return [piece for piece in [*parts, Piece(line[at:])] if piece.words]


def _formula(match: re.Match[str], accents: bool) -> Iterator[Piece]:
    if match["of"]:
        yield from (Piece(match["of"], italic=True), Piece("("))
        for symbol in re.findall(r"x~|x[+-]|[xy]|[^xy]+", match["inner"]):
            yield from _symbol(symbol, accents)
        yield Piece(")")
    elif match["norm"]:
        yield from (Piece("L", italic=True), Piece(match["norm"], shift=LIFT * 0.7))
    elif match["minus"]:
        yield Piece(" − ")
    elif match["sign"]:
        yield Piece("−")
    else:
        yield from _symbol(match["adversarial"] or match["image"], accents)


def _symbol(symbol: str, accents: bool) -> Iterator[Piece]:
    if symbol[0] not in "xy":
        yield Piece(symbol)
    elif symbol == "x~" and accents:
        yield Piece("x\u0303", italic=True)
    else:
        yield Piece(symbol[0], italic=True)
        if symbol == "x~":
            yield Piece("~", shift=-1.2 * LIFT, back=0.7)
        elif symbol[1:]:
            yield Piece(symbol[1:].replace("-", "−"), shift=-LIFT)


def _typeset(text: ET.Element, accents: bool) -> None:
    """Put the formulas of a text into elements of their own."""
    parts = pieces(text.text or "", accents=accents)
    if parts == [Piece(text.text or "")]:
        return
    text.text, before = None, Piece("")
    size = float(text.get("font-size", 11))
    for part in parts:
        span = ET.SubElement(text, f"{SVG}tspan")
        span.text = part.words
        if part.italic:
            span.set("font-style", "italic")
        if part.shift and not part.back:
            span.set("font-size", f"{size * 0.75:g}")
        back = part.back or (WIDER if before.back else 0.0)
        if back:
            span.set("dx", f"{-back * size:g}")
        if part.shift != before.shift:
            span.set("dy", f"{part.shift - before.shift:g}")
        before = part


def _style(element: ET.Element, sheet: list[tuple[str, str]], variables: Mapping[str, str]) -> None:
    """Write the declarations of a style sheet that an element's classes select as attributes."""
    classes = set(element.attrib.pop("class", "").split())
    own = dict(variables)
    styles: dict[str, str] = {}
    for selector, body in sheet:
        if _selects(selector, element.tag.removeprefix(SVG), classes):
            for name, value in _pairs(body):
                (own if name.startswith("--") else styles)[name] = value
    for name, value in styles.items():
        while match := VARIABLE.search(value):
            value = value.replace(match[0], own[match[1]])
        if name == "opacity":
            element.set("fill-opacity", value)
            element.set("stroke-opacity", value)
        elif value != "inherit":
            element.set(name, {"600": "bold"}.get(value, value.removesuffix("px")))
    for name in ("role", "aria-label", "aria-hidden"):
        element.attrib.pop(name, None)


def _selects(selector: str, tag: str, classes: set[str]) -> bool:
    """Whether a selector of charts.css selects an element; all are in one of class `chart`."""
    last = selector.removeprefix(".chart ")
    wanted = {one or other for one, other in PART.findall(last)}
    name = re.match(r"\w*", last)
    return (not name or name[0] in ("", tag)) and wanted <= classes and ":" not in last


def _rules(css: str) -> Iterator[tuple[str, str]]:
    """Each selector with its declarations, of the rules for light pages."""
    for selectors, body in RULE.findall(MEDIA.sub("", css)):
        for selector in selectors.split(","):
            yield selector.strip(), body


def _declarations(sheet: list[tuple[str, str]], selector: str) -> Iterator[tuple[str, str]]:
    for one, body in sheet:
        if one == selector:
            yield from _pairs(body)


def _pairs(body: str) -> Iterator[tuple[str, str]]:
    for declaration in body.split(";"):
        name, colon, value = declaration.partition(":")
        if colon:
            yield name.strip(), value.strip()
