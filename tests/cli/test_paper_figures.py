"""`--figures` of report and compare: plain SVG, PDF, pictures at 300 dpi, LaTeX and CSV."""

import csv
import dataclasses
import io
import re
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_tools import jemkit, one_line
from hostile_report import hostile_run
from PIL import Image
from report_runs import RECIPE, bare_run, full_record, png, whole_run

from jemkit.evaluation.report import read_book
from jemkit_cli.paper import grids, pdf
from jemkit_cli.paper.plain import SVG, Piece, pieces
from jemkit_cli.paper.tabular import escaped, latex
from jemkit_cli.paper.writing import Written, write_all

needs_pdf = pytest.mark.skipif(find_spec("svglib") is None, reason="needs the extra figures")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their seed."""
    home = tmp_path_factory.mktemp("runs")
    other = {**RECIPE, "run": {**RECIPE["run"], "seed": 1}}
    return [whole_run(home / "first"), whole_run(home / "second", 1.0, other)]


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """What is written without PDF, which takes most of the time."""
    book = read_book(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdf, "missing", lambda: "no PDF")
        return write_all(book, grids.of_runs(book.runs), tmp_path_factory.mktemp("figures"))


def test_every_section_has_its_files_and_no_name_is_used_twice(written: Written) -> None:
    names = [path.name for path in written.paths]
    assert len(set(names)) == len(names) == len(list(written.folder.iterdir()))
    wanted = {
        "radius-pgd-linf", "steps-pgd-linf", "energies-first", "joint-energies-second",
        "energy-confidence-first", "energy-path", "joint-energy-path", "reliability",
        "confidences-second", "ood-energies-first", "validation-accuracy", "training-loss",
        "training-samples-first", "samples-second", "neighbours-first", "mine-second",
    }  # fmt: skip
    assert {f"{name}.svg" for name in wanted} <= set(names)
    for table in ("comparison", "figures", "ood", "recipe"):
        assert {f"{table}.tex", f"{table}.csv"} <= set(names)


def test_charts_are_svg_that_needs_no_style_sheet(written: Written) -> None:
    for path in written.folder.glob("*.svg"):
        text = path.read_text()
        root = ET.fromstring(text)
        assert not re.search(r"class=|<style|var\(|--c|@media", text), path.name
        nested = [e for e in root.iter(f"{SVG}svg") if e is not root]
        assert not nested
    curve = ET.parse(written.folder / "radius-pgd-linf.svg").getroot()
    strokes = {path.get("stroke") for path in curve.iter(f"{SVG}path")}
    assert {"#0068a8", "#c8500a"} <= strokes  # one palette, a colour for each run
    words = ["".join(text.itertext()) for text in curve.iter(f"{SVG}text")]
    assert {"L∞ radius, in 1/255", "accuracy", "first", "second"} <= set(words)


@pytest.mark.parametrize(
    ("line", "italic", "text"),
    [
        ("E(x, y)", "Exy", "E(x, y)"),
        ("largest p(y | x)", "pyx", "largest p(y | x)"),
        ("E(x+) - E(x-)", "ExEx", "E(x+) − E(x−)"),
        ("adversarial, x~, mean -1.2", "x\u0303", "adversarial, x\u0303, mean −1.2"),
        ("L∞ radius, in 1/255", "L", "L∞ radius, in 1/255"),
        ("run-L2-x, expected", "", "run-L2-x, expected"),
    ],
)
def test_formulas_are_set_as_such(line: str, italic: str, text: str) -> None:
    parts = pieces(line)
    assert "".join(part.words for part in parts if part.italic) == italic
    assert "".join(part.words for part in parts) == text
    assert Piece("x\u0303", italic=True) not in pieces(line, accents=False)


def test_pictures_have_whole_pixels_at_300_dots_per_inch(written: Written) -> None:
    for path in written.folder.glob("samples*.png"):
        with Image.open(path) as image:
            assert image.width >= 975
            assert [round(dots) for dots in image.info["dpi"]] == [300, 300]
        root = ET.parse(path.with_suffix(".svg")).getroot()
        assert float(root.attrib["width"].removesuffix("in")) == pytest.approx(image.width / 300)


@needs_pdf
def test_each_figure_is_a_pdf_too_with_its_font_and_always_the_same(tmp_path: Path) -> None:
    whole = full_record()
    few = {name: whole.tables[name] for name in ("radius_curve", "energies")}
    run = bare_run(tmp_path / "run", dataclasses.replace(whole, tables=few))
    (run / "evaluation").mkdir()
    (run / "evaluation" / "samples.png").write_bytes(png())
    folders = [write_all(read_book([run]), [], tmp_path / name).folder for name in ("a", "b")]
    names = {path.name for path in folders[0].glob("*.pdf")}
    assert names == {"radius-pgd-linf.pdf", "energies-run.pdf", "joint-energies-run.pdf",
                     "samples-run.pdf"}  # fmt: skip
    for name in names:
        content, again = ((folder / name).read_bytes() for folder in folders)
        assert content.startswith(b"%PDF-")
        assert content == again
        assert (b"/FontFile2" in content) == (name != "samples-run.pdf")


def test_without_its_library_there_is_no_pdf_and_one_message(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf, "find_spec", lambda name: None)
    out = tmp_path / "figures"
    done = jemkit("report", str(runs[0]), "--out", str(tmp_path / "a.html"), "--figures", str(out))
    assert done.code == 0, done.err
    assert done.err.count("\n") == 1
    assert "no PDF is written, which needs svglib and reportlab: pip install" in done.err
    assert "[figures]" in done.err
    assert {path.suffix for path in out.iterdir()} == {".svg", ".png", ".tex", ".csv"}


def test_tables_are_latex_and_csv_with_all_digits(written: Written, runs: list[Path]) -> None:
    text = (written.folder / "comparison.tex").read_text()
    assert r"first & \textbf{90.00\% [85.06, 93.43]}" in text
    assert r"\toprule" in text
    rows = list(csv.DictReader(io.StringIO((written.folder / "comparison.csv").read_text())))
    (clean,) = [r for r in rows if (r["run"], r["figure"]) == ("first", "clean")]
    assert (clean["value"], clean["images"], clean["best"]) == ("0.9", "200", "True")
    assert float(clean["low"]) == read_book(runs).runs[0].record.figure("clean").low
    recipe = list(csv.reader(io.StringIO((written.folder / "recipe.csv").read_text())))
    assert recipe == [["option", "first", "second"], ["run.seed", "0", "1"]]


def test_words_are_escaped_for_latex() -> None:
    assert escaped("a_b & 5 % +- 1\n#") == r"a\_b \& 5 \% $\pm$ 1 \#"
    assert escaped("-0.20 of run-2, 1e-05") == "$-$0.20 of run-2, 1e-05"
    assert r"\textbf{b}" in latex(["a", "b"], [["a", "b"]], ["x\ny"], {(0, 1)})


def test_compare_writes_what_it_prints(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf, "missing", lambda: "")
    monkeypatch.setattr(pdf, "of_svg", lambda svg: b"%PDF")
    monkeypatch.setattr(pdf, "of_picture", lambda png, width, height: b"%PDF")
    out = tmp_path / "figures"
    done = jemkit("compare", *map(str, runs), "--seeds", "--json", "--figures", str(out))
    assert done.code == 0, done.err
    names = {path.name for path in out.iterdir()}
    assert {"comparison.tex", "paired-differences.csv", "seeds.tex", "energy-path.svg"} <= names
    rows = list(csv.DictReader(io.StringIO((out / "paired-differences.csv").read_text())))
    means = {row["figure"]: float(row["mean"]) for row in rows}
    assert means == {d["name"]: d["mean"] for d in done.record["paired"] if not d["why"]}
    assert "0" in (out / "seeds.tex").read_text()


def test_a_hostile_record_gives_whole_files_inside_the_folder(tmp_path: Path) -> None:
    book = read_book([hostile_run(tmp_path / "runs")])
    written = write_all(book, grids.of_runs(book.runs), tmp_path / "out")
    assert written.paths
    for path in written.paths:
        assert path.parent == tmp_path / "out"
        if path.suffix == ".svg":
            ET.fromstring(path.read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "out"}


def test_a_file_is_no_folder_for_figures(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    page = str(tmp_path / "a.html")
    done = jemkit("report", str(runs[0]), "--out", page, "--figures", str(tmp_path / "taken"))
    assert "--figures must be a folder" in one_line(done, 6)
