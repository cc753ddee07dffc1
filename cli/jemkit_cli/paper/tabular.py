"""A table of text as LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

SPECIAL = str.maketrans(
    {c: rf"\{c}" for c in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "−": r"$-$", "∞": r"$\infty$", "≠": r"$\neq$", "…": r"\dots{}"}
)
"""The characters that LaTeX does not print as they are."""


MINUS = re.compile(r"(?<![\w$-])-(?=\d)")


@dataclass(frozen=True)
class Grid:
    """A table as it is read; `data` are the same figures as a program reads them."""

    name: str  # of its files
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Collection[tuple[int, int]] = ()  # row and column of the best figures
    notes: Sequence[str] = ()
    data: Sequence[Sequence[object]] = field(default=())  # with a header of its own


def latex(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """A tabular of booktabs with its notes as comments."""
    cells = [
        [rf"\textbf{{{escaped(cell)}}}" if (at, column) in bold else escaped(cell)
         for column, cell in enumerate(row)]
        for at, row in enumerate(rows)
    ]  # fmt: skip
    lines = [" & ".join(row) + r" \\" for row in ([escaped(cell) for cell in head], *cells)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    comments = [f"% {' '.join(note.split())}" for note in notes]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([*comments, begin, *body, r"\end{tabular}", ""])


def comma_separated(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV; None is an empty cell, and a number has all of its digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [repr(cell) if isinstance(cell, float) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def escaped(text: str) -> str:
    """Text escaped for LaTeX."""
    plain = " ".join(text.split()).translate(SPECIAL).replace("+-", r"$\pm$")
    return MINUS.sub("$-$", plain)
