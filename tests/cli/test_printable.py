"""Names of files, classes and plug-ins reach a terminal, or a page, as text."""

import logging
import unicodedata
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from jemkit.runtime.html import tag
from jemkit_cli.printable import at_home, printable
from jemkit_cli.progress import tracking
from jemkit_cli.terminal import fail, say, show_notices, show_table

HOSTILE = "\x1b]0;owned\x07\x1b[2Jrun \u202egnp.exe \x9b31m \udc80"
SHOWN = r"\x1b]0;owned\x07\x1b[2Jrun \u202egnp.exe \x9b31m \udc80"
MARKUP = "[/b] [red]a[/red] [link=x]"


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text)
    kinds = {unicodedata.category(c) for c in shown if c not in "\n\t\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(shown) == shown
    assert not text.isprintable() or shown == text


def test_joiners_and_every_script_stay() -> None:
    for text in ("Gruesse, gr\u00fcn \u65e5\u672c \U0001f469\u200d\U0001f52c", "a\tb\nc"):
        assert printable(text) == text


def test_every_way_to_speak_shows_control_sequences_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own capture of the log cannot be sent between processes with half a character in it
    monkeypatch.setattr(logging.getLogger("jemkit"), "propagate", False)
    say(HOSTILE)
    show_table([HOSTILE, MARKUP], [[HOSTILE, MARKUP]], f"{HOSTILE} {MARKUP}")
    with pytest.raises(typer.Exit):
        fail(HOSTILE, 3)
    show_notices()
    logging.getLogger("jemkit.somewhere").warning("%s", HOSTILE)
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 4
    assert out.count(MARKUP) == 3
    assert err == f"error: {SHOWN}\n{SHOWN}\n"


def test_progress_takes_any_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, which alone has bars
    monkeypatch.setenv("COLUMNS", "200")
    with tracking(silent=False) as track:
        assert track is not None
        track(f"{MARKUP} {HOSTILE}", 1, 2)
    shown = "".join(capsys.readouterr())
    assert MARKUP in shown
    assert r"\x1b]0;owned" in shown
    assert "\x1b]0" not in shown


def test_a_page_reverses_no_text() -> None:
    page = tag("p", HOSTILE, title=HOSTILE)
    assert not set(page) & set("\x1b\x07\u202e\x9b")


def test_a_path_of_a_command_begins_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home([Path("~/data"), "~"]) == [Path("/home/me/data"), "~"]
    assert at_home(Path("~nobody-of-this-name/x")) == Path("~nobody-of-this-name/x")
