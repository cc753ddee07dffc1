"""The documentation site: its contents follow the code, and a browser shows it without a fault."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest
from browser import Browser, browser, chromium

import jemkit
from jemkit import testing
from jemkit.config.catalogue import comments, options_of
from jemkit.config.recipe import Recipe
from jemkit.config.registry import installed
from jemkit.options import Options

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in NEEDED),
    reason="needs the extra docs",
)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The hook that makes pages from the code."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/hooks/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def made(reference: Any) -> dict[str, str]:
    return dict(reference.pages())


def test_the_navigation_has_every_page_and_docs_readme_too(made: dict[str, str]) -> None:
    listed = set(re.findall(r"[\w/-]+\.md\b", (ROOT / "mkdocs.yml").read_text()))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    notebooks = (ROOT / "examples" / "notebooks").glob("*.ipynb")
    also = {"changelog.md", "own-loop.md", *(f"notebooks/{path.stem}.md" for path in notebooks)}
    assert listed == pages | set(made) | also
    contents = (ROOT / "docs" / "README.md").read_text()
    assert [page for page in sorted(pages - {"README.md"}) if f"({page})" not in contents] == []


def test_the_reference_has_every_option_of_every_part(made: dict[str, str]) -> None:
    registry = installed(third_party=False)
    for kind, shelf in registry.shelves.items():
        sections = re.split(r"^## `(\w+)`", made[f"reference/{kind}.md"], flags=re.M)[1:]
        by_name = dict(zip(sections[::2], sections[1::2], strict=True))
        assert set(by_name) == set(shelf), kind
        for name, part in shelf.items():
            listed = set(re.findall(r"^\| `([\w.]+)` \|", by_name[name], re.M))
            options = {option.name for option in options_of(part, registry)}
            assert listed == options, f"{kind} {name}"
            fields = {n for n, f in part.model_fields.items() if "SkipJson" not in repr(f)}
            assert {option.partition(".")[0] for option in options} == fields
            assert len(by_name[name].partition("[source]")[0].split()) > 5, f"{kind} {name}: doc"


def test_every_option_of_every_part_and_table_has_a_meaning() -> None:
    registry = installed(third_party=False)
    owners = {f"{kind} {n}": part for kind, shelf in registry.shelves.items()
              for n, part in shelf.items()}  # fmt: skip
    for name in ("run", "optimizer", "schedule", "sentinel", "extra"):
        tables = Recipe.model_fields[name].annotation
        owners |= {f"{name} {t.__name__}": t for t in get_args(tables) or (tables,)}
    bare = [f"{owner}: {o.name}" for owner, part in owners.items()
            for o in options_of(part, registry) if len(o.meaning.split()) < 3]  # fmt: skip
    assert bare == []


def test_an_option_has_its_own_comment_or_that_above_it_or_that_of_a_base_class() -> None:
    assert comments(Inherits) == {"lr": "of the first", "at": "two lines above it", "on": "behind"}


def test_the_reference_has_every_public_name_once(reference: Any) -> None:
    names = [n.rpartition(".")[2] for page in reference.public_names().values() for n in page]
    assert sorted(names) == sorted([*jemkit.__all__, *testing.__all__])


def test_the_reference_has_a_formula_of_every_part_that_computes_one(made: dict[str, str]) -> None:
    registry = installed(third_party=False)
    kinds = ("energy", "sampler", "density", "ascent", "distance", "updater", "objective")
    lacking = [f"{kind} {name}" for kind in kinds for name in registry[kind]
               if "$$" not in section(made[f"reference/{kind}.md"], name)]  # fmt: skip
    assert lacking == []


def section(page: str, name: str) -> str:
    return page.partition(f"## `{name}`")[2].partition("\n## ")[0]


class Base(Options):
    lr: float = 0.1  # of the first
    # two lines
    # above it
    at: tuple[float, ...] = (0.1, 0.2)
    on: bool = True


class Inherits(Base):
    lr: float = 0.2
    on: bool = False  # behind


class Links(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("img", "script", "iframe") and "src" in values:
            self.loaded.append(values["src"])
        elif tag == "link" and "href" in values and values.get("rel") != "canonical":
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@needs_mkdocs
def test_no_link_of_the_site_is_broken_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 40
    broken: list[str] = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # served under any path, so its links are absolute
        for link in [*page.links, *page.loaded]:
            if re.match(r"https?:|mailto:", link):
                assert link in page.links, f"{path.name} loads {link}"
                continue
            target, _, anchor = unquote(link).partition("#")
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            known = pages[file].anchors if file in pages else set()
            if not file.is_file() or (anchor and file in pages and anchor not in known):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@needs_mkdocs
def test_formulas_are_mathml_and_no_tex_is_left(site: Path) -> None:
    for page, count in (("concepts.html", 5), ("reference/objective.html", 30)):
        assert (site / page).read_text().count("<math ") >= count, page
    left = [path.name for path in site.rglob("*.html") if "arithmatex" in path.read_text()]
    assert left == []


@pytest.fixture(scope="module")
def tab(site: Path) -> Iterator[Browser]:
    with browser() as opened:
        opened.open(site / "index.html")
        yield opened


WIDE = """[...document.querySelectorAll("article *")].filter((e) =>
    e.getBoundingClientRect().right > innerWidth + 1 &&
    !e.closest(".md-typeset__scrollwrap, pre, .highlight, .formula"))
    .map((e) => e.outerHTML.slice(0, 80))"""
LOST = "[...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)"


@needs_mkdocs
@pytest.mark.skipif(chromium() is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_page_fits_a_phone_and_the_browser_finds_no_fault(
    site: Path, tab: Browser, dark: bool
) -> None:
    tab.size(375, 800, phone=True)
    tab.dark(dark)
    pages = sorted(p for p in site.rglob("*.html") if {"files", "404.html"}.isdisjoint(p.parts))
    for page in [site / "index.html"] if dark else pages:
        tab.open(page)
        where = page.relative_to(site)
        assert tab.errors == [], where
        assert [r for r in tab.requests if not r.startswith(("file:", "data:"))] == [], where
        assert tab.run("document.documentElement.scrollWidth") <= 375, where
        assert tab.run(WIDE) == [], where
        assert tab.run(LOST) == [], where
