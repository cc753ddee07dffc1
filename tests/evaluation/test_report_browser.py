"""The report in a browser: by touch, key and mouse, on paper, and with a hostile record."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, chromium
from hostile_report import hostile_run, three_runs
from report_runs import N, bare_run, card, full_record

from jemkit.evaluation.report import write
from jemkit.metrics.figures import plain

needs_chromium = pytest.mark.skipif(chromium() is None, reason="needs chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return three_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(window: Browser, runs: list[Path], tmp_path: Path) -> Browser:
    window.dark(False)
    window.size(1200, 900)
    window.open(write(runs, tmp_path / "report.html"))
    return window


CARDS = "[...document.querySelectorAll('.card')].filter((e) => e.offsetWidth)"
OPEN = f"{CARDS}.map((e) => e.textContent)"


@needs_chromium
def test_it_opens_without_an_error_and_asks_for_nothing(page: Browser) -> None:
    assert page.errors == []
    requested = [url for url in page.requests if not url.startswith("data:")]
    assert [url.rsplit("/", 1)[1] for url in requested] == ["report.html"]


@needs_chromium
def test_every_picture_shows(page: Browser) -> None:
    widths = page.run("[...document.images].map((e) => e.naturalWidth)")
    assert len(widths) == 10
    assert min(widths) > 0


@needs_chromium
def test_a_click_on_its_head_sorts_a_column_and_missing_figures_stay_last(page: Browser) -> None:
    first = "[...document.querySelector('#comparison table').querySelectorAll"
    names = f"{first}('tbody th')].map((e) => e.textContent)"
    heads = page.run(f"{first}('thead th')].map((e) => e.innerText)")
    at = next(i for i, head in enumerate(heads, 1) if head == "AA")
    column = f"#comparison thead th:nth-child({at})"
    assert page.run(names) == ["ebjdat", "trades", "quick"]
    page.click(f"{column} .sort")
    assert page.run(names) == ["trades", "ebjdat", "quick"]
    page.click(f"{column} .sort")
    assert page.run(names) == ["ebjdat", "trades", "quick"]
    assert page.run(f"document.querySelector('{column}').getAttribute('aria-sort')") == "ascending"
    page.click("#comparison thead th:first-child .sort")
    assert page.run(names) == ["ebjdat", "quick", "trades"]


@needs_chromium
@pytest.mark.parametrize("width", [320, 375, 768])
def test_the_page_never_scrolls_sideways(page: Browser, width: int) -> None:
    page.size(width, 800, phone=True)
    page.run("document.querySelectorAll('details').forEach((e) => { e.open = true })")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("innerWidth") == width


@needs_chromium
def test_at_1280_the_comparison_is_not_cut(
    window: Browser, runs: list[Path], tmp_path: Path
) -> None:
    """With as many sets of other images as an evaluation has, and names as a study gives."""
    whole = full_record()
    more = [plain(f"auroc/{name}", 0.9, N, card()) for name in ("uniform", "gaussian", "rotation")]
    many = bare_run(
        tmp_path / f"better-dm-no-generated-images-{'0' * 40}-18a18984",
        dataclasses.replace(whole, figures=[*whole.figures, *more]),
    )
    window.size(1280, 900)
    window.open(write([many, *runs], tmp_path / "report.html"))
    boxes = "[...document.querySelectorAll('#comparison .scroll')]"
    widths = window.run(f"{boxes}.map((e) => [e.scrollWidth, e.clientWidth])")
    assert len(widths) == 2
    assert all(inner <= outer for inner, outer in widths)
    name = window.run("document.querySelector('#comparison .run > span').textContent")
    assert name == "better-dm-no-gene…000-18a18984"
    full = window.run("document.querySelector('#comparison .run > span').title")
    assert full == many.name


@needs_chromium
def test_dark_is_dark_and_its_words_are_light(page: Browser) -> None:
    style = "getComputedStyle(document.body)"
    light = [page.run(f"{style}.backgroundColor"), page.run(f"{style}.color")]
    page.dark(True)
    dark = [page.run(f"{style}.backgroundColor"), page.run(f"{style}.color")]
    paper, ink = ([sum(map(int, re.findall(r"\d+", c))) for c in pair] for pair in (light, dark))
    assert paper[0] > 600 > 200 > paper[1]
    assert ink[0] < 200 < 600 < ink[1]


@needs_chromium
@pytest.mark.parametrize("how", ["tap", "key", "mouse"])
def test_a_card_opens_on_a_tap_on_the_keyboards_focus_and_under_the_mouse(
    page: Browser, how: str
) -> None:
    if how == "tap":
        page.size(375, 800, phone=True)
        page.tap("#comparison .number")
    elif how == "key":
        first = "document.querySelector('#comparison table')"
        page.run(f"[...{first}.querySelectorAll('.sort')].at(-1).focus()")
        for _ in range(2):  # a table wider than the page is a stop of its own
            if not page.run(OPEN):
                page.press("Tab")
    else:
        x, y = page.middle("#comparison .number")
        page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    (opened,) = page.run(OPEN)
    assert "clean of ebjdat" in opened
    assert "95 % interval85.06 to 93.43 %" in opened
    box = f"{CARDS}[0].getBoundingClientRect()"
    assert page.run(f"{box}.left") >= 0
    assert page.run(f"{box}.right - innerWidth") <= 0
    if how == "tap":
        page.tap("#comparison h2")
        assert page.run(OPEN) == []


@needs_chromium
def test_a_hostile_record_runs_nothing(window: Browser, tmp_path: Path) -> None:
    window.open(write([hostile_run(tmp_path)], tmp_path / "report.html"))
    assert window.run("window.hurt") is None
    assert window.errors == []
    assert window.run("document.querySelectorAll('img').length") == 0
    assert "onerror" in window.run("document.body.textContent")


@needs_chromium
def test_on_paper_nothing_is_cut_off_and_every_protocol_is_there(page: Browser) -> None:
    page.size(760, 1000)  # A4 at 96 dots an inch, less its margins
    page.run("dispatchEvent(new Event('beforeprint'))")
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.run("document.documentElement.scrollWidth") <= 760
        assert page.run("document.querySelectorAll('details:not([open])').length") == 0
    finally:
        page.send("Emulation.setEmulatedMedia", media="")
