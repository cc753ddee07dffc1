"""Text for a terminal: names that others chose, without the control sequences in them."""

import unicodedata
from pathlib import Path
from typing import Any

PRINTABLE = "\n\t\u200c\u200d"
"""Line ends, tabs, and the joiners used by some scripts and emoji."""

UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Control characters (which begin escape sequences), marks that reverse text, surrogates."""


def printable(text: str) -> str:
    """The text with what a terminal would obey, or not show, as an escape: \\x1b."""
    if text.isprintable():
        return text
    return "".join(
        c if c in PRINTABLE or unicodedata.category(c) not in UNSEEN
        else c.encode("unicode_escape").decode()
        for c in text
    )  # fmt: skip


def at_home(value: Any) -> Any:
    """A path given to a command, or a list of paths, with ~ expanded."""
    if isinstance(value, list):
        return [at_home(one) for one in value]
    if isinstance(value, Path):
        try:
            return value.expanduser()
        except RuntimeError:  # no such user
            return value
    return value
