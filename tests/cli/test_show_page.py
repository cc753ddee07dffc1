"""The page of `jemkit show` in a real browser."""

import re
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import Browser, browser, chromium
from cli_tools import Outcome, jemkit, one_line
from forked import Forked
from outgoing import audited
from shown import shown_toy
from waiting import until

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra show (gradio)"),
    pytest.mark.skipif(chromium() is None, reason="needs chromium"),
]


@pytest.fixture
def page(trained: tuple[Path, Outcome], tmp_path: Path) -> Iterator[Forked]:
    """The command with a tiny run; it has said where its page is."""
    arguments = ("show", str(trained[0] / "runs" / "latest"), "--port=0", "--no-browser")
    running = Forked(*arguments, "--max-images=50", cwd=tmp_path, before=audited)
    until(lambda: "the page is at" in running.text("stdout") or running.poll() is not None,
          "the page's address", lambda: running.text("stderr"))  # fmt: skip
    yield running
    running.send_signal(signal.SIGTERM)
    running.wait()


class Tab:
    """What a user does in the page."""

    def __init__(self, opened: Browser) -> None:
        self.opened = opened

    def text(self, query: str) -> str:
        return str(self.opened.run(f"document.querySelector('{query}')?.innerText ?? ''"))

    def shows(self, query: str, words: str) -> None:
        until(lambda: words in self.text(query), f"{words!r} in {query}",
              lambda: self.opened.run("document.body.innerText"))  # fmt: skip

    def press(self, query: str) -> None:
        until(lambda: self.opened.run(f"!!document.querySelector('{query}')"), query)
        self.opened.run(f"document.querySelector('{query}').click()")

    def turn_to(self, name: str) -> None:
        self.opened.run(
            "[...document.querySelectorAll('button[role=tab]')]"
            f".find((tab) => tab.innerText.trim() == '{name}').click()"
        )

    def give_file(self, path: Path) -> None:
        root = self.opened.send("DOM.getDocument")["root"]["nodeId"]
        until(lambda: self.opened.run("!!document.querySelector('input[type=file]')"), "the input")
        node = self.opened.send("DOM.querySelector", nodeId=root, selector="input[type=file]")
        self.opened.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node["nodeId"])

    def draw(self) -> None:
        until(lambda: self.opened.run("!!document.querySelector('#canvas canvas')"), "the canvas")
        x, y = self.opened.middle("#canvas canvas")
        for kind, move in (("mousePressed", -50), ("mouseMoved", 50), ("mouseReleased", 50)):
            self.opened.send("Input.dispatchMouseEvent", type=kind, x=x, y=y + move,
                             button="left", buttons=1, clickCount=1)  # fmt: skip


def test_every_part_of_the_page_works_and_nothing_leaves_the_machine(
    page: Forked, tmp_path: Path
) -> None:
    match = re.search(r"http://127\.0\.0\.1:\d+", page.text("stdout"))
    assert match, page.outcome()
    with browser() as opened:
        tab, url = Tab(opened), match[0]
        for width in (1280, 375):
            opened.size(width, 900, phone=width < 500)
            opened.open(url + "/")
            tab.shows("#result", "test image 0, class")
            assert opened.run("document.documentElement.scrollWidth") <= width
        tab.press("#next")
        tab.shows("#result", "test image 1, class")
        tab.press("#attack")
        tab.shows("#attacked", "after 20 of 20 steps")
        tab.press("#use-attacked")
        tab.shows("#result", "test image 1, attacked, class")
        tab.turn_to("Purify")
        tab.press("#purify")
        tab.shows("#purified", "after 20 of 20 steps")
        tab.turn_to("Generate")
        tab.press("#generate")
        tab.shows("#generated", "image 8")
        tab.press("#use-generated")
        tab.shows("#result", "generated image 1")
        tab.turn_to("Draw")
        tab.draw()
        tab.shows("#result", "your drawing")
        tab.turn_to("Open a file")
        (tmp_path / "image.png").write_text("no image")
        tab.give_file(tmp_path / "image.png")
        tab.shows(".toast-wrap", "cannot be read as an image")
        assert opened.run("document.documentElement.scrollWidth") <= 375
        assert [r for r in opened.requests if not r.startswith((url, "data:", "blob:"))] == []
        harmless = "Method not implemented"  # gradio's, of every upload
        assert [error for error in opened.errors if harmless not in error] == []
    page.send_signal(signal.SIGINT)
    done = page.outcome()
    assert (done.code, done.err) == (0, "")


def test_errors_come_before_slow_work(page: Forked) -> None:
    port = re.search(r":(\d+);", page.text("stdout"))
    assert port
    taken = jemkit("show", "nowhere", f"--port={port[1]}")
    assert f"port {port[1]} on 127.0.0.1 is in use" in one_line(taken, 2)
    assert "nowhere" in one_line(jemkit("show", "nowhere", "--port=0"), 6)


def test_a_classifiers_page_says_why_it_cannot_generate() -> None:
    from jemkit_cli.show.page import Page

    shown = shown_toy("classifier")
    assert "without a density" in str(Page(shown, None).blocks.get_config_file())
