"""Several runs beside each other: what is compared, and what is not."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from report_runs import RECIPE, bare_run, full_record, record

from jemkit.errors import ConfigError, DataError
from jemkit.evaluation.compare import (
    Comparison,
    Difference,
    compare,
    newest,
    over_seeds,
    paired,
)
from jemkit.evaluation.run_table import (
    Judged,
    Line,
    comparison,
    differing,
    read_runs,
    shown,
    shown_interval,
)
from jemkit.metrics import record as records
from jemkit.metrics.figures import plain
from jemkit.metrics.record_file import Record


def judged(name: str, result: Record, seed: int = 0, **recipe: object) -> Judged:
    run = {**RECIPE["run"], "seed": seed}
    return Judged(name, Path(name), result, {"recipe": {**RECIPE, "run": run, **recipe}})


def line(runs: list[Judged], name: str) -> Line:
    return next(line for line in comparison(runs) if line.column.name == name)


def test_the_best_run_of_a_column_is_the_highest_accuracy_and_the_lowest_gap() -> None:
    runs = [judged("a", full_record()), judged("b", full_record(1.0))]
    best = {line.column.name: line.best for line in comparison(runs)}
    assert best == {
        "clean": [0], "aa": [1], "pgd20": [], "fid": [1], "gap_mean": [0], "ece": [0],
        "auroc/noise": [0],
    }  # fmt: skip


def test_a_single_run_is_not_the_best_of_anything() -> None:
    assert not [line for line in comparison([judged("a", full_record())]) if line.best]


def test_a_missing_figure_says_how_to_measure_it_or_why_it_was_left_out() -> None:
    whole = Record({}, {}, [], left_out={"ood": "one image set"})
    lines = {x.column.name: x.why[0] for x in comparison([judged("a", whole)])}
    assert "one image set" in lines["auroc"]
    assert "jemkit evaluate RUN --attack aa" in lines["aa"]


def test_figures_of_other_radii_are_marked_and_have_no_best() -> None:
    runs = [judged("a", record()), judged("b", record({"pgd20": 100}, radius_px=4.0))]
    assert differing(runs, "pgd20") == ["radius_px is 8 in a and 4 in b"]
    assert not line(runs, "pgd20").best


def both(*radii: float, **more: object) -> Record:
    """A record in which PGD-20 was measured at several radii, the last one newest."""
    result = [record({"pgd20": 100 + at}, radius_px=px, **more) for at, px in enumerate(radii)]
    figures = [figure for one in reversed(result) for figure in one.figures]
    return Record(result[0].subject, result[0].protocol, figures)


def test_figures_of_one_name_stand_beside_those_of_their_own_protocol() -> None:
    """Of a at 8 and 4, b at 4 and 8 and c at 2: each radius has a line, 2 says that it differs."""
    runs = [judged("a", both(8.0, 4.0)), judged("b", both(4.0, 8.0)), judged("c", both(2.0))]
    lines = [line for line in comparison(runs) if line.column.name == "pgd20"]
    shown = {
        line.column.title: [f and f.protocol["radius_px"] for f in line.figures] for line in lines
    }
    assert shown == {
        "PGD-20, 4/255": [4.0, 4.0, None], "PGD-20, 8/255": [8.0, 8.0, None],
        "PGD-20, 2/255": [None, None, 2.0],
    }  # fmt: skip
    assert [bool(line.differs) for line in lines] == [False, False, True]
    assert [line.why[2] for line in lines[:2]] == ["measured otherwise"] * 2
    assert {line.column.title: line.best for line in lines[:2]} == {
        "PGD-20, 4/255": [0], "PGD-20, 8/255": [1]
    }  # fmt: skip


def test_a_line_of_a_single_run_says_what_tells_its_figures_apart() -> None:
    compared = both(8.0, 4.0)
    compared.figures.extend(both(8.0, norm="L2", images=50).figures)
    titles = [line.column.title for line in comparison([judged("a", compared)])]
    assert [t for t in titles if "PGD" in t] == [
        "PGD-20, Linf 4/255, 200 images", "PGD-20, Linf 8/255, 200 images",
        "PGD-20, L2 8/255, 50 images",
    ]  # fmt: skip


def test_a_record_of_before_the_test_split_was_hashed_is_compared_with_one_of_after() -> None:
    runs = [judged("a", record()), judged("b", record(test_sha256="ef" * 32))]
    assert not differing(runs, "clean")
    runs[0] = judged("a", record(test_sha256="cd" * 32))
    assert differing(runs, "clean")


def test_seeds_are_grouped_by_the_settings_that_differ() -> None:
    runs = [judged(f"{name}{seed}", record(seed=seed), seed, objective={"use": name})
            for name in ("trades", "mart") for seed in (0, 1)]  # fmt: skip
    spreads = over_seeds(runs, ["clean", "fid"])
    assert [(s.settings, s.seeds, s.name, s.share) for s in spreads] == [
        ({"objective.use": "trades"}, [0, 1], "clean", True),
        ({"objective.use": "mart"}, [0, 1], "clean", True),
    ]


def test_the_newest_runs_are_those_begun_last_with_figures_and_no_link(tmp_path: Path) -> None:
    for at, name in enumerate(("c", "a", "b", "stopped")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (at, at))
        if name != "stopped":
            (tmp_path / name / "evaluation.json").write_text("{}")
    (tmp_path / "latest").symlink_to("b")
    assert [path.name for path in newest(tmp_path)] == ["a", "b"]
    with pytest.raises(DataError, match=r"runs with figures in .*: 3"):
        newest(tmp_path, 4)


def test_a_run_that_is_not_there_is_said_not_to_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothere does not exist"):
        compare([tmp_path / "nothere"])


def test_the_radius_has_no_bearing_on_clean_accuracy() -> None:
    runs = [judged("a", record()), judged("b", record(radius_px=4.0))]
    assert not differing(runs, "clean")


@pytest.mark.parametrize(
    "more",
    [
        {"seconds": 3.0}, {"seed": 1}, {"device": "cuda"}, {"accuracy_after": {"apgd": 0.5}},
        {"infinity": 1.5}, {"mean_distance": 0.5},
        {"checkpoint": "cd"},
        {"max_delta_px": {"L2": 4.0}}, {"sets": {"adversarial": {"max_delta_px": {"L2": 4.0}}}},
    ],
)  # fmt: skip
def test_what_is_no_protocol_keeps_figures_comparable(more: dict[str, object]) -> None:
    other = {"sets": {"adversarial": {"max_delta_px": {"L2": 3.0}}}} if "sets" in more else {}
    runs = [judged("a", record(**other)), judged("b", record(**more))]
    assert not differing(runs, "pgd20")


def test_other_data_is_another_protocol() -> None:
    a, b = record(), record()
    b.subject["data"] = "cifar10"
    assert differing([judged("a", a), judged("b", b)], "clean") == [
        'data is "digits" in a and "cifar10" in b'
    ]


def test_a_paired_difference_is_worked_out_image_by_image() -> None:
    """150 images right by both, 30 by a alone, 10 by b alone: 0.1, +- 1.96 sd of the mean."""
    a, b = record({"clean": 180}), record({"clean": 160})
    a.rows["clean"] = torch.arange(200) < 180
    b.rows["clean"] = (torch.arange(200) < 150) | (torch.arange(200) >= 190)
    differences = paired(judged("a", a), judged("b", b))[0]
    assert (differences.name, differences.n) == ("clean", 200)
    assert differences.mean == pytest.approx(0.1)
    half = 1.96 * ((40 / 200 - 0.1**2) / 200) ** 0.5
    assert differences.low == pytest.approx(
        0.1 - half, abs=0.006
    )  # the bootstrap's steps are 0.005
    assert differences.high == pytest.approx(0.1 + half, abs=0.006)
    assert not differences.holds_zero


def test_a_paired_difference_is_the_same_each_time_and_leaves_the_global_generator() -> None:
    a, b = judged("a", record({"clean": 180})), judged("b", record({"clean": 170}, seed=0))
    before = torch.get_rng_state()
    assert paired(a, b, 200) == paired(a, b, 200)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_run_differs_from_itself_by_nothing_and_swapped_by_the_opposite(p: int, q: int) -> None:
    a, b = judged("a", record({"clean": p})), judged("b", record({"clean": q}))
    same, there, back = (paired(x, y, 50)[0] for x, y in ((a, a), (a, b), (b, a)))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low <= there.mean <= there.high


def test_other_images_give_no_paired_difference_but_the_reason() -> None:
    a, b = record(), record(selection="the first 200 of 500")
    differences = paired(judged("a", a), judged("b", b))
    assert all("selection" in difference.why for difference in differences)
    assert all(math.isnan(difference.mean) for difference in differences)


def test_rows_that_another_evaluation_left_are_not_paired() -> None:
    a, b = record({"clean": 180}), record({"clean": 170})
    b.rows["clean"] = b.rows["clean"][:100]
    assert "rows of b" in paired(judged("a", a), judged("b", b))[0].why


def test_rows_that_are_no_accuracy_are_not_compared() -> None:
    a, b = record({"clean": 180}), record({"clean": 170})
    for result in (a, b):
        result.rows["energy"] = torch.zeros(200)
    assert [d.name for d in paired(judged("a", a), judged("b", b))] == ["clean"]


def test_seeds_of_one_recipe_give_mean_and_spread() -> None:
    """Of 0.9, 0.8 and 0.85: mean 0.85, standard deviation 0.05."""
    runs = [judged(str(s), record({"clean": right}), s) for s, right in enumerate((180, 160, 170))]
    spreads = over_seeds(runs, ["clean", "aa"])
    assert [spread.name for spread in spreads] == ["clean"]
    assert spreads[0].runs == ["0", "1", "2"]
    assert spreads[0].mean == pytest.approx(0.85)
    assert spreads[0].sd == pytest.approx(0.05)


def test_another_recipe_is_another_group_and_one_seed_has_no_spread() -> None:
    runs = [judged("a", record()), judged("b", record(), 1, objective={"use": "trades"})]
    assert [(s.runs, s.sd) for s in over_seeds(runs, ["clean"])] == [(["a"], None), (["b"], None)]


def test_settings_that_change_no_outcome_make_no_group() -> None:
    def run(name: str, seed: int, folder: str, images: str, **options: Any) -> Judged:
        one = judged(name, record(), seed, data={"use": "folder", "dir": folder})
        one.config["recipe"]["run"] |= options
        one.config["data"] = {split: {"sha256": images} for split in ("train", "valid", "test")}
        return one

    runs = [
        run("a", 0, "/here", "1f"),
        run("b", 1, "/there", "1f", device="cuda", micro_batch=32, keep=5, recompute=True),
        run("c", 2, "/here", "2e"),
        run("d", 3, "/here", "1f", batch_size=7),
    ]
    assert [s.runs for s in over_seeds(runs, ["clean"])] == [["a", "b"], ["c"], ["d"]]
    for one in runs:
        one.config["extra_data"] = {"sha256": "5c", "images": 9, "fraction": 0.5, "labels": None}
    assert [s.runs for s in over_seeds(runs, ["clean"])] == [["a", "b"], ["c"], ["d"]]
    runs[1].config["extra_data"]["sha256"] = "6d"
    assert [s.runs for s in over_seeds(runs[:2], ["clean"])] == [["a"], ["b"]]
    for one in runs:
        del one.config["data"], one.config["extra_data"]  # of jemkit 0.1
    assert [s.runs for s in over_seeds(runs[:3], ["clean"])] == [["a", "c"], ["b"]]


def test_seeds_judged_by_other_protocols_have_no_mean() -> None:
    runs = [judged("a", record()), judged("b", record(radius_px=4.0), 1)]
    spreads = {spread.name: spread for spread in over_seeds(runs, ["clean", "pgd20"])}
    assert math.isnan(spreads["pgd20"].mean)
    assert "radius_px" in spreads["pgd20"].why
    assert spreads["clean"].mean == pytest.approx(0.9)


def test_a_value_that_is_not_finite_is_never_the_best_and_makes_no_spread() -> None:
    a, b = record({"clean": 1}), record({"clean": 2})
    for result, value in ((a, math.nan), (b, 1.0)):
        result.figures.append(plain("ece", value, 200, {}))
    runs = [judged("a", a), judged("b", b, 1)]
    assert not line(runs, "ece").best
    spread = over_seeds(runs, ["ece"])[0]
    assert math.isnan(spread.mean)
    assert spread.sd is None
    assert shown(a.figure("ece")) == "not finite"


def test_accuracies_are_shown_as_percentages_and_the_rest_as_numbers() -> None:
    whole = full_record()
    assert shown(whole.figure("clean")) == "90.00%"
    assert shown_interval(whole.figure("clean")) == "85.06 to 93.43 %"
    assert shown(whole.figure("ece")) == "0.031"
    assert shown_interval(whole.figure("ece")) == ""


def test_runs_of_one_name_differ_by_the_folder_above(tmp_path: Path) -> None:
    for above in ("x", "y"):
        bare_run(tmp_path / above / "run", record())
    runs = read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"], records.load)
    assert [run.name for run in runs] == ["x/run", "y/run"]


def test_a_run_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    bare_run(tmp_path / "a", record())
    with pytest.raises(ConfigError, match="twice"):
        compare([tmp_path / "a", tmp_path / "x" / ".." / "a"])


def test_a_comparison_is_json_and_holds_the_requested_parts(tmp_path: Path) -> None:
    a = bare_run(tmp_path / "a", full_record())
    b = bare_run(tmp_path / "b", full_record(1.0), {**RECIPE, "run": {"seed": 1, "epochs": 20}})
    compared = compare([a, b], names=["clean", "nll"], seeds=True)
    printed = json.loads(json.dumps(compared.to_json(), allow_nan=False))
    assert [x["name"] for x in printed["lines"]] == ["clean", "nll"]
    assert [x["name"] for x in printed["paired"]] == ["clean"]
    assert [x["name"] for x in printed["seeds"]] == ["clean", "nll"]
    assert printed["lines"][0]["best"] == ["a"]


def test_a_figure_that_no_run_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    a = bare_run(tmp_path / "a", record())
    with pytest.raises(DataError, match=r"pgd50.*aa, clean, pgd20"):
        compare([a], names=["pgd50"])


def test_a_folder_without_a_record_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="jemkit evaluate"):
        compare([tmp_path])


@pytest.mark.parametrize("name", ["precision", "recall", "aupr/svhn", "fpr95/svhn", "temperature"])
def test_figures_without_an_attack_are_compared_across_radii(name: str) -> None:
    results = [
        Record({}, {}, [plain(name, 0.5, 9, {"norm": "Linf", "radius_px": px})]) for px in (4, 8)
    ]
    runs = [judged(str(at), result) for at, result in enumerate(results)]
    assert differing(runs, name) == []


def test_a_difference_that_is_not_defined_does_not_say_whether_it_holds_zero() -> None:
    undefined = Difference("clean", math.nan, math.nan, math.nan, 0, "protocols differ")
    around_zero = Difference("aa", 0.0, -0.1, 0.1, 9)
    (first, second) = Comparison(["a", "b"], [], [undefined, around_zero], []).to_json()["paired"]
    assert (first["holds_zero"], second["holds_zero"]) == (None, True)
