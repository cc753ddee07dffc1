"""The report: one file, whole, safe, the same each time; in a browser it works by touch and key."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from hostile_report import hostile_run, three_runs
from hypothesis import example, given
from hypothesis import strategies as st
from report_runs import N, bare_run, full_record, metrics, record, whole_run
from typer.testing import CliRunner

from jemkit.errors import DataError
from jemkit.evaluation.report import render, write
from jemkit.metrics import charts
from jemkit.metrics.curves import POINTS, epochs
from jemkit.metrics.curves import metrics as curves
from jemkit.metrics.curves import save as save_curves
from jemkit.runtime.html import tag, text
from jemkit_cli.report import compare as compare_command
from jemkit_cli.report import report as report_command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return three_runs(tmp_path_factory.mktemp("runs"))


class Elements(HTMLParser):
    """Every element of a page, in order, and whether they close."""

    VOID = ("meta", "img", "path", "line", "circle")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img", "!doctype"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        if name != "img":
            assert self.open.pop() == name

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def test_the_same_runs_give_the_same_bytes(runs: list[Path]) -> None:
    assert render(runs) == render(runs)


def test_every_element_is_closed_and_every_id_is_its_own(runs: list[Path]) -> None:
    page = Elements(render(runs))
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_refers_to_nothing_outside_itself(runs: list[Path]) -> None:
    page = Elements(render(runs))
    links = [
        a.get("src") or a.get("href") for _, a in page.elements if a.get("src") or a.get("href")
    ]
    assert links
    assert all(str(link).startswith(("data:image/png;base64,", "#")) for link in links)
    assert not page.named("link")
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert "http" not in re.sub(r"http-equiv", "", render(runs))


@pytest.mark.parametrize(
    "name",
    ["comparison", "warnings", "indicators", "robustness", "energies", "calibration", "ood",
     "pictures", "others", "training", "recipe", "figures"],
)  # fmt: skip
def test_whole_runs_have_every_section(runs: list[Path], name: str) -> None:
    assert f'id="{name}"' in render(runs)


def test_a_picture_stands_under_the_heading_of_what_it_shows_and_says_so(runs: list[Path]) -> None:
    page = render(runs[:1])
    shown = {
        name: re.findall("<figcaption>([^<]+)</figcaption><img", part)
        for name, part in re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    }
    of_samples, others = shown["pictures"], shown["others"]
    assert of_samples[0] == "During training, after epoch 10"
    assert "Samples drawn by the evaluation (top90)" in of_samples
    assert len(of_samples) == 4
    assert others == ["mine"]


def test_energies_have_histograms_confidences_and_those_of_other_images(runs: list[Path]) -> None:
    page = render(runs[:1])
    for title in ("E(x) of ebjdat", "E(x, y) of ebjdat", "Energy against confidence: ebjdat",
                  "E(x) of test and other images: ebjdat"):  # fmt: skip
        assert f"<figcaption>{title}" in page
    assert f"clean, x, {N} images, mean -9" in page
    assert "right, 84" in page
    assert "wrong, 15" in page


def test_curves_of_other_numbers_of_images_say_whose_they_are(tmp_path: Path) -> None:
    folders = []
    for name, n in (("a", 138), ("b", 60)):
        whole = full_record()
        curve = {**whole.tables["radius_curve"], "n": n}
        tables = {**whole.tables, "radius_curve": curve}
        folders.append(bare_run(tmp_path / name, dataclasses.replace(whole, tables=tables)))
    assert "138 images of a, 60 images of b: the first ones, until" in render(folders)
    assert "138 images: the first ones, until" in render(folders[:1])


def test_a_record_of_clean_accuracy_alone_is_enough(tmp_path: Path) -> None:
    page = render([bare_run(tmp_path / "a", record({"clean": 180}))])
    assert "90.00%" in page
    assert "not measured" in page
    assert 'id="absent"' in page
    assert 'id="training"' not in page


def test_a_run_that_was_never_judged_shows_its_training_and_says_so(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "a")
    (folder / "evaluation.json").unlink()
    page = render([folder])
    assert "not evaluated yet" in page
    assert 'id="training"' in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.json"):
        render([tmp_path])


def test_the_file_is_written_into_the_first_run_or_where_it_is_wanted(
    runs: list[Path], tmp_path: Path
) -> None:
    assert write(runs[:1]) == runs[0] / "report.html"
    out = tmp_path / "new" / "page.html"
    assert write(runs, out).read_text(encoding="utf-8") == render(runs)
    with pytest.raises(DataError, match="is a folder"):
        write(runs, tmp_path)


def test_figures_off_the_standard_protocol_are_labelled_wherever_they_stand(
    tmp_path: Path,
) -> None:
    page = render([whole_run(tmp_path / "a", standard=False)])
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    for name in ("comparison", "indicators", "robustness", "energies", "calibration", "ood",
                 "figures"):  # fmt: skip
        assert "non-standard" in sections[name], name
    assert "non-standard" not in sections["training"]


def test_a_standard_run_has_no_such_label(tmp_path: Path) -> None:
    assert '"badge">non-standard' not in render([whole_run(tmp_path / "a")])


def test_protocols_that_differ_are_marked(runs: list[Path]) -> None:
    page = render(runs)
    assert "PGD-20, 4/255</b> is not comparable" in page
    assert "radius_px is 8 in ebjdat, trades and 4 in quick" in page


def test_one_run_shows_what_is_not_the_default_and_several_what_differs(runs: list[Path]) -> None:
    one, three = (
        render(some).split('<section id="recipe">')[1].split("</section>")[0]
        for some in (runs[:1], runs)
    )
    assert "<code>run.epochs</code>" in one
    assert "<code>run.seed</code>" not in one
    assert "<code>objective.beta</code>" in three
    assert "<code>run.epochs</code>" not in three


def test_text_from_files_is_never_markup(tmp_path: Path) -> None:
    page = Elements(render([hostile_run(tmp_path)]))
    assert len(page.named("script")) == 1  # the page's own
    assert not page.named("img")
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert not page.open


@given(st.text())
def test_no_text_leaves_its_place(value: str) -> None:
    page = Elements(str(tag("p", value, title=value)))
    assert [name for name, _ in page.elements] == ["p"]
    assert set(page.elements[0][1]) == {"title"}
    text(value).encode()


def test_a_table_of_another_form_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    whole = full_record()
    whole.tables["reliability"] = {"bins": 3}
    whole.tables["energies"] = [1, 2]
    page = render([bare_run(tmp_path / "a", whole)])
    assert page.count("cannot be drawn") == 2
    assert "Accuracy against the radius" in page


def test_a_long_curve_is_thinned_by_means_and_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(metrics(1500))
    loss = curves(tmp_path)["loss"]
    assert len(loss.x) == len(loss.y) == 375  # 1500 in fours
    assert 300 < len(loss.x) <= POINTS
    assert loss.lost == 2
    assert [math.isnan(y) for y in loss.y].index(True) == 700 // 4
    assert sum(map(math.isnan, loss.y)) == 1
    energy = curves(tmp_path)["E(x)"]
    assert energy.y[0] == pytest.approx(-2 - 1.5 / 200)
    assert energy.x[0] == 3


def test_short_curves_keep_every_value_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,lr\n0,1,9\n1,,9\n2,inf,9\n3,4,9\n4,")
    series = curves(tmp_path)
    assert set(series) == {"loss"}
    assert series["loss"].x == [0, 2, 3]
    assert series["loss"].y[0] == 1
    assert math.isnan(series["loss"].y[1])


def test_the_last_row_of_an_epoch_counts_and_none_that_a_rollback_undid(tmp_path: Path) -> None:
    lines = [
        '{"event": "epoch", "step": 5, "accuracy": 0.1}', '{"event": "end"}', "cut off {",
        '{"event": "epoch", "step": 5, "accuracy": 0.2}',
        '{"event": "epoch", "step": 10, "accuracy": 0.9}', '{"event": "rollback", "to": 5}',
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    assert [(e["step"], e["accuracy"]) for e in epochs(tmp_path)] == [(5, 0.2)]


def test_a_damaged_accuracy_is_a_gap_in_the_curves(tmp_path: Path) -> None:
    lines = [
        f'{{"event": "epoch", "step": {n}, "accuracy": {a}}}' for n, a in ((1, '"x"'), (2, 0.5))
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    save_curves(tmp_path)
    assert (tmp_path / "curves.svg").exists()


def test_a_legend_has_markers_where_the_curve_has_them(tmp_path: Path) -> None:
    for epochs_done, marked in ((5, True), (50, False)):
        lines = [f'{{"event": "epoch", "step": {n}, "accuracy": 0.5}}' for n in range(epochs_done)]
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        save_curves(tmp_path)
        text = (tmp_path / "curves.svg").read_text()
        assert ('class="mark' in text) == marked


def test_a_long_title_is_broken_into_lines_and_nothing_of_it_is_lost() -> None:
    words = "validation images; PGD-20 at 25.5/255, L-inf; chains of 40 steps"
    panel = charts.Panel(words, charts.histogram([], {}, 0, charts.Axes(words, "x", "y")))
    titles = re.findall('class="title">([^<]*)<', charts.picture([panel]))
    assert " ".join(titles) == words
    assert max(map(len, titles)) <= charts.TITLE


def test_curves_of_one_run_alone_are_grouped_by_kind(runs: list[Path], tmp_path: Path) -> None:
    page = render(runs[:1])
    titles = re.findall("<figcaption>([^<]+?) ?</figcaption>", page.split('id="training"')[1])
    assert titles == ["Validation accuracy", "Terms of the loss", "Mean energies", "Energy gaps",
                      "Gradient norm"]  # fmt: skip
    other = whole_run(tmp_path / "other", shift=1.0)
    (other / "metrics.csv").write_text("step,loss,loss a,loss b\n0,1,2,3\n1,1,2,3\n")
    titles = re.findall("<figcaption>([^<]+?) ?</figcaption>",
                        render([runs[0], other]).split('id="training"')[1])  # fmt: skip
    assert titles == [
        "Validation accuracy", "Validation accuracy under PGD-10", "loss",
        "Terms of the loss of ebjdat alone", "Mean energies of ebjdat alone",
        "Energy gaps of ebjdat alone", "Gradient norm of ebjdat alone",
        "Terms of the loss of other alone",
    ]  # fmt: skip


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    ticks = charts.ticks(low, low + width)
    slack = 1e-6 * width
    assert 2 <= len(ticks) <= 8
    assert all(low - slack <= value <= low + width + slack for value in ticks)


@given(st.lists(st.floats(), min_size=1, max_size=6))
@example([-1.7e308, 1.7e308])
@example([5e-324])
@example([5e-324, 0.0])
@example([1e16, 1e16 + 2])
def test_no_value_breaks_a_chart(values: list[float]) -> None:
    series = charts.Series("a", 0, [float(i) for i in range(len(values))], values, marked=True)
    drawn = charts.lines([series], charts.Axes("t", "x", "y"))
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_eight_runs_have_eight_signs() -> None:
    assert len({str(charts.mark(slot)).split("class=")[1] for slot in range(8)}) == 8


def app() -> typer.Typer:
    commands = typer.Typer()
    commands.command()(report_command)
    commands.command()(compare_command)
    return commands


def test_the_commands_write_the_page_and_print_the_comparison(runs: list[Path]) -> None:
    run = CliRunner()
    done = run.invoke(app(), ["report", str(runs[0])])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == f"report {runs[0] / 'report.html'}"
    done = run.invoke(app(), ["compare", *map(str, runs[:2]), "--seeds"])
    assert done.exit_code == 0, done.output
    for words in ("ebjdat - trades", "holds 0", "over seeds", "90.00% [85.06 to 93.43 %] *"):
        assert words in done.stdout
    done = run.invoke(app(), ["compare", *map(str, runs), "--json", "--figure", "clean"])
    assert json.loads(done.stdout)["runs"] == ["ebjdat", "trades", "quick"]


def test_in_what_protocols_differ_is_said_once_with_all_the_figures_that_it_concerns(
    runs: list[Path],
) -> None:
    done = CliRunner().invoke(app(), ["compare", str(runs[0]), str(runs[2]), "--seeds"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if "radius_px is" in line]
    assert lines == ["! radius_px is 8 in ebjdat and 4 in quick: pgd20"]
    assert "pgd20: no paired difference: protocols differ, see above" in done.stdout


def test_a_mistake_ends_the_command_by_one_message(tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), ["compare", str(tmp_path)])
    assert done.exit_code == 6
    assert done.stderr.startswith("error: ")
