"""Settings to a record: the right radius, the right parts, and a label where it is not standard."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import every_rank
from toys import REGISTRY, gen, linear_model

import jemkit as api
from jemkit import ConfigError, Figure, Images, PixelModel, UnknownName
from jemkit.config.eval_settings import (
    attacks_of,
    evaluators_of,
    options_of,
    settings_of,
    threat_of,
)
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.subjects import subject_of
from jemkit.metrics import record as records
from jemkit.metrics.evaluator import Notes
from jemkit.metrics.figures import paired_difference
from jemkit.metrics.record_file import Record
from jemkit.runtime.distributed import shard
from jemkit.runtime.files import load_tensors
from jemkit.runtime.lock import in_use
from jemkit.testing import toy_task

TASK = toy_task()
DATA = TASK.images("valid")
QUIET = {"robustness": {"indicators": False}}


def measured(out: Path | None = None, **settings: object) -> Record:
    subject = PixelModel(linear_model(64, 3))
    requested = {"attacks": ("pgd",), "only": ("robustness",), "options": QUIET, **settings}
    return api.evaluate(subject, DATA, registry=REGISTRY, out=out, **requested)


@pytest.mark.parametrize(("values", "radius"), [
    ({}, 8.0), ({"protocol": "released"}, 4.0), ({"eps_px": 2}, 2.0),
    ({"protocol": "released", "eps_px": 2}, 2.0), ({"norm": "L2", "eps_px": 127.5}, 127.5),
    ({"norm": "L1", "eps_px": 3060}, 3060.0),
])  # fmt: skip
def test_a_radius_is_in_pixels_for_every_norm(values: dict[str, object], radius: float) -> None:
    threat = threat_of(settings_of(values), 8.0, 3072)
    assert threat.radius_px == radius
    assert threat.eps == pytest.approx(radius / 255)


@pytest.mark.parametrize(("values", "message"), [
    ({"eps_px": 0.03}, "probably a fraction"), ({"eps_px": 256}, "wider than the whole range"),
    ({"eps_px": -1}, "greater than or equal to 0"), ({"norm": "L2"}, "127.5, which is 0.5"),
    ({"norm": "L0"}, "Linf"), ({"max_images": 0}, "max_images"), ({"batch_size": 0}, "batch_size"),
    ({"only": ("acuracy",)}, "did you mean 'accuracy'"), ({"skip": ("nothing",)}, "no evaluator"),
    ({"attacks": ("pgb",)}, "did you mean 'pgd'"), ({"radius": 3}, "no such option"),
    ({"options": {"pgd": {"step": 3}}}, "did you mean 'steps'"),
    ({"options": {"pdg": {"steps": 3}}}, "did you mean 'pgd'"),
    ({"options": {"pgd": {"radius_px": 3}}, "eps_px": 4}, "same norm and radius"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_with_what_to_do(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(**{"options": {}, **values})


def test_options_of_attacks_and_evaluators_are_named_with_their_part() -> None:
    parsed = options_of(["pgd.steps=7", "pgd.restarts=2", "robustness.indicators=false"])
    assert parsed == {"pgd": {"steps": 7, "restarts": 2}, "robustness": {"indicators": False}}
    attacks = attacks_of(settings_of({"attacks": ("pgd",), "options": parsed}), REGISTRY)
    assert attacks["pgd"].label == "pgd7x2"
    with pytest.raises(ConfigError, match="expected NAME"):
        options_of(["steps=7"])


def test_clean_accuracy_comes_first_whatever_is_requested() -> None:
    assert next(iter(evaluators_of(settings_of({}), REGISTRY))) == "accuracy"
    only = evaluators_of(settings_of({"only": ("robustness",)}), REGISTRY)
    assert list(only) == ["accuracy", "robustness"]
    skipped = evaluators_of(settings_of({"skip": ("robustness",)}), REGISTRY)
    assert "robustness" not in skipped
    with pytest.raises(UnknownName):
        evaluators_of(settings_of({"only": ("nothing",)}), REGISTRY)


def test_pgd_and_aa_are_the_default_and_pgd_alone_of_a_quick_look() -> None:
    assert list(attacks_of(settings_of({}), REGISTRY)) == ["pgd", "aa"]
    assert list(attacks_of(settings_of({"quick": True}), REGISTRY)) == ["pgd"]
    assert attacks_of(settings_of({}), REGISTRY)["pgd"].label == "pgd20"


def test_what_is_not_standard_says_so_in_every_figure() -> None:
    assert measured().protocol["standard"]
    for settings in (
        {"max_images": 10},
        {"quick": True, "max_images": 5},
        {"protocol": "released"},
    ):
        record = measured(**settings)
        assert not record.protocol["standard"]
        assert all(not figure.protocol["standard"] for figure in record.figures)


@pytest.mark.parametrize(("attack", "options"), [
    ("pgd", {"step_px": 0.5}), ("apgd", {"steps": 3}), ("square", {"queries": 3}),
    ("fgsm", {"random_start": True}),
])  # fmt: skip
def test_an_attack_whose_name_hides_its_settings_says_that_they_are_its_own(
    attack: str, options: dict[str, object]
) -> None:
    record = measured(attacks=(attack,), options={**QUIET, attack: options}, max_images=None)
    clean, robust = record.figures
    assert clean.protocol["standard"]
    assert not robust.protocol["standard"]
    assert robust.protocol["why"]


def test_a_refined_model_is_not_the_standard_one() -> None:
    record = measured(refine_steps=1, only=("accuracy",), options={})
    assert not record.figure("clean").protocol["standard"]
    assert "1 steps of SGLD" in record.figure("clean").protocol["why"]


def test_the_released_protocol_replays_the_step_of_its_pgd() -> None:
    card = measured(protocol="released").figure("pgd20").protocol
    assert (card["radius_px"], card["step_px"], card["steps"]) == (4, 0.5, 20)


def test_one_seed_gives_one_record_and_every_figure_its_protocol() -> None:
    one, two = measured(max_images=20), measured(max_images=20)
    wanted = {"norm", "radius_px", "seed", "images", "versions", "checkpoint", "batch_size"}
    for a, b in zip(one.figures, two.figures, strict=True):
        assert a[:5] == b[:5]
        assert wanted <= set(a.protocol)
    assert one.figure("pgd20").protocol["steps"] == 20
    assert torch.equal(one.rows["pgd20"], two.rows["pgd20"])


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = measured(tmp_path)
    again = records.load(tmp_path)
    assert again.figures == record.figures
    assert again.subject == record.subject
    assert again.protocol == record.protocol
    assert torch.equal(again.rows["clean"], record.rows["clean"])
    text = (tmp_path / "evaluation.json").read_text()
    assert set(json.loads(text)["figures"][0]) == {"name", "value", "low", "high", "n", "protocol"}
    assert not (tmp_path / ".evaluation").exists()  # nothing half-done is left


def test_a_second_evaluation_adds_to_the_record_of_the_same_weights(tmp_path: Path) -> None:
    measured(tmp_path)
    measured(tmp_path, options={**QUIET, "pgd": {"steps": 3}})
    names = [figure.name for figure in records.load(tmp_path).figures]
    assert names == ["clean", "pgd3", "pgd20"]
    other = PixelModel(linear_model(64, 3, seed=5))
    api.evaluate(other, DATA, registry=REGISTRY, out=tmp_path, only=("accuracy",))
    assert [figure.name for figure in records.load(tmp_path).figures] == ["clean"]


def test_a_number_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    figure = Figure("gap_relative", float("nan"), None, None, 3, {"standard": True})
    record = Record({"sha256": "0"}, {}, [figure])
    records.save(tmp_path, record, Notes())
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["figures"][0]["value"] is None
    assert "gap_relative is not a finite number" in saved["warnings"]
    assert records.load(tmp_path).figures[0].value != records.load(tmp_path).figures[0].value


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 9}', '{"form']
)
def test_a_damaged_record_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(api.DataError, match=r"evaluation\.json"):
        records.load(tmp_path)


def written(folder: Path, name: str = "clean", value: float = 0.5) -> None:
    """A record with one figure, and its outcomes by image."""
    figure = Figure(name, value, None, None, 4, {"evaluator": name, "standard": True})
    rows = {name: torch.arange(4) % 2 == 0}
    records.save(folder, Record({"sha256": "0"}, {}, [figure], rows=rows), Notes())


@pytest.mark.parametrize("what", ["a figure", "an outcome", "no outcomes"])
def test_a_record_that_was_changed_is_refused(tmp_path: Path, what: str) -> None:
    written(tmp_path)
    path, rows = tmp_path / "evaluation.json", tmp_path / "evaluation.safetensors"
    message = r"evaluation\.safetensors is missing or damaged: the SHA-256"
    if what == "a figure":
        path.write_text(path.read_text().replace("0.5", "0.9"))
        message = r"evaluation\.json is damaged: the SHA-256"
    elif what == "an outcome":
        raw = bytearray(rows.read_bytes())
        raw[-1] ^= 1
        rows.write_bytes(raw)
    else:
        rows.unlink()
    with pytest.raises(api.DataError, match=message):
        records.load(tmp_path)


def test_a_record_of_before_there_were_hashes_is_read(tmp_path: Path) -> None:
    written(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    del saved["sha256"]
    (tmp_path / "evaluation.json").write_text(json.dumps({**saved, "format": 1}))
    assert records.load(tmp_path).value("clean") == 0.5
    (tmp_path / "evaluation.json").write_text(json.dumps(saved))
    with pytest.raises(api.DataError, match="SHA-256"):
        records.load(tmp_path)


def test_a_damaged_record_stays_beside_the_one_that_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"form')
    record = measured(tmp_path)
    assert (tmp_path / "damaged-evaluation.json").read_text() == '{"form'
    assert records.load(tmp_path).figures == record.figures
    assert any("kept as damaged-evaluation.json" in w for w in records.load(tmp_path).warnings)


def test_every_damaged_record_stays(tmp_path: Path) -> None:
    for text in ("{", "["):
        (tmp_path / "evaluation.json").write_text(text)
        measured(tmp_path)
    saved = {p.name: p.read_text() for p in tmp_path.glob("damaged-*")}
    assert saved == {"damaged-evaluation.json": "{", "damaged-evaluation-1.json": "["}


@pytest.mark.parametrize("state", ["before its JSON", "after its JSON"])
def test_a_record_killed_between_its_two_files_is_whole(tmp_path: Path, state: str) -> None:
    """The rows are written aside, then the JSON, then the rows take their place."""
    written(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("evaluation.*")}
    written(tmp_path, "pgd20")
    after = {p.name: p.read_bytes() for p in tmp_path.glob("evaluation.*")}
    (tmp_path / ".evaluation.next.safetensors").write_bytes(after["evaluation.safetensors"])
    (tmp_path / "evaluation.safetensors").write_bytes(before["evaluation.safetensors"])
    if state == "before its JSON":
        (tmp_path / "evaluation.json").write_bytes(before["evaluation.json"])
    stored = ["clean"] if state == "before its JSON" else ["clean", "pgd20"]
    assert sorted(records.load(tmp_path).rows) == stored
    broken = Record({"sha256": "0"}, {}, [], {"t": object()}, {"aa": torch.zeros(4)})
    with pytest.raises(TypeError):  # between its two files once more
        records.save(tmp_path, broken, Notes())
    assert sorted(records.load(tmp_path).rows) == stored
    written(tmp_path, "aa")
    assert sorted(records.load(tmp_path).rows) == sorted([*stored, "aa"])
    assert not (tmp_path / ".evaluation.next.safetensors").exists()


MANY = 8


def written_many(folder: str) -> int:
    """What each of two processes writes."""
    for i in range(MANY):
        written(Path(folder), f"{'ab'[shard().rank]}{i}")
    return MANY


def test_evaluations_that_write_at_once_lose_no_figure(tmp_path: Path) -> None:
    assert every_rank(written_many, str(tmp_path)) == [MANY, MANY]
    names = {figure.name for figure in records.load(tmp_path).figures}
    assert names == {f"{name}{i}" for name in "ab" for i in range(MANY)}
    assert set(records.load(tmp_path).rows) == names


def test_the_attacked_images_are_saved_on_demand(tmp_path: Path) -> None:
    subject = subject_of(PixelModel(linear_model(64, 3)), DATA)._replace(folder=tmp_path)
    requested = settings_of({"attacks": ("pgd",), "only": ("robustness",), "options": QUIET})
    record = judge(subject, requested, REGISTRY, keep_adversarial=True)
    saved = load_tensors(tmp_path / "evaluation" / "adversarial-pgd20.safetensors")
    delta = (saved["x_adv"] - DATA.unit()).abs().max() * 255
    assert float(delta) == pytest.approx(record.figure("pgd20").protocol["max_delta_px"]["Linf"])
    assert torch.equal(saved["right"].bool(), record.rows["pgd20"])


@given(shift=st.floats(-1, 1), n=st.integers(30, 80), seed=st.integers(0, 99))
def test_a_paired_interval_holds_its_mean_and_is_a_point_where_all_differences_are_equal(
    shift: float, n: int, seed: int
) -> None:
    b = torch.rand(n, generator=gen(seed), dtype=torch.float64)
    mean, low, high = paired_difference(b + shift, b, gen(), resamples=50)
    assert (mean, low, high) == pytest.approx((shift, shift, shift), abs=1e-9)
    a = torch.rand(n, generator=gen(seed + 1), dtype=torch.float64)
    mean, low, high = paired_difference(a, b, gen(), resamples=400)
    assert low <= mean <= high
    wide = 1.96 * float((a - b).std()) / n**0.5  # the central limit's interval
    assert high - low == pytest.approx(2 * wide, rel=0.35)


def test_a_stranger_without_a_density_or_other_images_is_judged_all_the_same() -> None:
    record = api.evaluate(
        PixelModel(linear_model(64, 3)), Images(DATA.x[:30], DATA.y[:30]), registry=REGISTRY,
        attacks=("pgd",), options=QUIET, skip=("generation", "ood", "energies", "calibration"),
    )  # fmt: skip
    assert {"clean", "pgd20"} <= {figure.name for figure in record.figures}


def test_options_of_what_does_not_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not run; running are accuracy"):
        measured(only=("accuracy",), options={"robustness": {"indicators": False}})


def test_a_quick_look_does_not_replace_a_standard_figure(tmp_path: Path) -> None:
    standard = measured(tmp_path)
    quick = measured(tmp_path, max_images=10)
    saved = records.load(tmp_path)
    assert saved.figure("pgd20").value == standard.value("pgd20")
    assert saved.figure("pgd20").protocol["standard"]
    assert torch.equal(saved.rows["pgd20"], standard.rows["pgd20"])
    assert quick.figure("pgd20").n == 10


def test_a_run_is_judged_with_the_threads_of_its_recipe_and_torch_gets_its_own_back() -> None:
    recorded = []

    class Sees(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            recorded.append(torch.get_num_threads())
            return x.flatten(1)[:, :3]

    before = torch.get_num_threads()
    subject = subject_of(Sees(), DATA, n_classes=3)
    recorded.clear()
    for threads in (1, None):
        judge(subject._replace(threads=threads), settings_of({"only": "accuracy"}), REGISTRY)
        assert set(recorded) == {threads or before}
        recorded.clear()
    assert torch.get_num_threads() == before


def test_a_folder_is_in_use_while_a_model_is_evaluated_into_it(tmp_path: Path) -> None:
    refused = list[str]()

    def progress(*_: object) -> None:
        with pytest.raises(ConfigError, match="evaluates") as caught:
            in_use(tmp_path, alone=True).__enter__()
        refused.append(str(caught.value))

    subject = PixelModel(linear_model(64, 3))
    api.evaluate(subject, DATA, only=("accuracy",), out=tmp_path, progress=progress)
    assert refused
    with in_use(tmp_path, alone=True):
        pass
