"""The figures of `jemkit reproduce`: what is drawn, and what is left empty."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import card, full_record, record
from study_tools import Calls, done, study

from jemkit.metrics import plots
from jemkit.metrics import record as records
from jemkit.metrics.figures import plain
from jemkit.metrics.record_file import Record
from jemkit_cli.results import protocol_text
from jemkit_cli.study.plan import Study
from jemkit_cli.study.table import table_of
from jemkit_cli.study.writing import write_all


def drawn(given: Study, out: Path, judged: Callable[[Path], Record]) -> str:
    """The SVG of a study, which is parsed as XML."""
    table = table_of(given, done(given, out, Calls(judged)))
    paths = {path.suffix: path for path in write_all(table, out, "mine")}
    text = paths[".svg"].read_text()
    ET.fromstring(text)
    assert "](mine.svg)" in paths[".md"].read_text()
    return text


def with_missing_row(**more: Any) -> Study:
    """Rows a and b, and one that cannot be trained."""
    given = study("a", "b", **more)
    missing = given.rows[0].model_copy(
        update={"name": "c", "missing": "not in jemkit", "paper": {"clean": 90.0, "pgd20": 50.0}}
    )
    return given.model_copy(update={"rows": (*given.rows, missing)})


def test_energies_have_a_panel_for_each_method(tmp_path: Path) -> None:
    text = drawn(with_missing_row(figure="energies"), tmp_path, lambda _: full_record())
    assert [f">{name}<" in text for name in ("a", "b", "c: not measured")] == [True] * 3
    assert text.count("E(x, y)") >= 3
    assert text.count("under PGD-20") == 2
    assert "generated" not in text  # the record has no E(x, y) of generated images


def test_accuracies_are_those_of_the_table_and_the_papers_are_apart(tmp_path: Path) -> None:
    given = with_missing_row(figure="trade-off", columns=("clean", "pgd20", "ece"))

    def judge(_: Path) -> Record:
        base = record({"clean": 180, "pgd20": 120})
        return replace(base, figures=[*base.figures, plain("ece", 0.1, 200, card())])

    text = drawn(given, tmp_path, judge)
    assert "PGD-20, measured here" in text
    assert "PGD-20, as printed in the paper" in text
    assert "c: not measured" in text
    assert "ECE" not in text  # it is no accuracy


def test_samples_are_the_pictures_of_the_runs(tmp_path: Path) -> None:
    def judge(_: Path) -> Record:
        how = {"split": "generated", "steps": 40, "sampler": "SGLD()", "images": 4}
        base = record()
        return replace(base, figures=[*base.figures, plain("fd-self", 1.0, 4, card(**how))])

    given = study("a", "b", figure="samples")
    units = done(given, tmp_path, Calls(judge))
    picture = units[0].folder / records.PICTURES / "samples.png"
    picture.parent.mkdir()
    plots.save_grid(picture, torch.rand(4, 1, 8, 8))
    text = write_all(table_of(given, units), tmp_path, "mine")[-1].read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "chains of 40 steps, SGLD()" in text
    assert "b: no samples" in text


def test_a_study_without_a_figure_writes_none(tmp_path: Path) -> None:
    given = study("a")
    table = table_of(given, done(given, tmp_path, Calls()))
    assert [path.suffix for path in write_all(table, tmp_path, "mine")] == [
        ".md", ".tex", ".csv", ".json"
    ]  # fmt: skip


def test_what_cannot_be_trained_has_the_papers_figures_alone(tmp_path: Path) -> None:
    given = with_missing_row()
    calls = Calls()
    table = table_of(given, done(given, tmp_path, calls))
    assert {folder[0] for _, folder in calls.commands} == {"a", "b"}
    text = write_all(table, tmp_path, "mine")[0].read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| c |"))
    assert line == "| c |  |  |  | 90 | 50 |"
    assert "c is not measured: not in jemkit" in text


@pytest.mark.parametrize(
    ("weights", "shown"),
    [("the graph of 2015", "Inception, the graph of 2015"),
     ("unknown", f"Inception, unknown weights of SHA-256 {'12' * 32}")],
)  # fmt: skip
def test_a_fid_names_the_weights_of_its_features(weights: str, shown: str) -> None:
    features = {"extractor": "Inception", "sha256": "12" * 32, "weights": weights}
    assert shown in protocol_text(plain("fid", 30.0, 64, card(features=features)))


@pytest.mark.parametrize(("reference", "shown"), [
    ({"set": "train", "count": 50_000}, "against 50000 train images"),
    ({"set": "statistics", "split": "test", "count": 10_000}, "against 10000 test images"),
    ({"set": "statistics", "count": 10_000}, "against 10000 reference images"),
])  # fmt: skip
def test_a_fid_names_its_reference(reference: dict[str, Any], shown: str) -> None:
    assert shown in protocol_text(plain("fid", 30.0, 64, card(reference=reference)))
