"""Markup in which every text is escaped unless it is markup already."""

import re
from collections.abc import Sequence
from html import escape

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
"""What no document may hold, and marks that reverse the text after them."""


class Html(str):
    """Markup; any other string is text."""

    __slots__ = ()


def text(value: object) -> Html:
    """Text as markup; what no document may hold is replaced."""
    if isinstance(value, Html):
        return value
    plain = CONTROL.sub("�", str(value)).encode(errors="replace").decode()
    return Html(escape(plain, quote=True))


def join(*parts: object) -> Html:
    return Html("".join(text(part) for part in parts if part is not None))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; `class_` is class, `data_x` is data-x, True a bare attribute, None none."""
    pieces = []
    for key, value in attributes.items():
        word = key.rstrip("_").replace("_", "-")
        if value is True:
            pieces.append(f" {word}")
        elif value is not None and value is not False:
            pieces.append(f' {word}="{text(value)}"')
    return Html(f"<{name}{''.join(pieces)}>{join(*children)}</{name}>")


def coded(value: str) -> Html:
    """Text whose words between backticks are code."""
    parts = str(value).split("`")
    if len(parts) % 2 == 0:
        return text(value)
    return join(*(tag("code", part) if at % 2 else part for at, part in enumerate(parts)))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], class_: str = "") -> Html:
    """A table in a box of its own that scrolls; its first column stays in sight."""
    cells = (
        tag("tr", *(_cell(cell, "th" if at == 0 else "td") for at, cell in enumerate(row)))
        for row in rows
    )
    top = tag("thead", tag("tr", *(_cell(cell, "th", scope="col") for cell in head)))
    whole = tag("table", top, tag("tbody", *cells), class_=class_ or None)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label="table")


def _cell(content: object, name: str, **attributes: object) -> Html:
    """A cell, unless the content is one already."""
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    more = {"scope": "row", **attributes} if name == "th" else attributes
    return tag(name, content, **more)
