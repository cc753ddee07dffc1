"""A record: of one model and one test split, and inside it every protocol beside the others."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Generator, Tensor
from toys import REGISTRY, linear_model

from jemkit import DataError, Images, PixelModel, evaluate
from jemkit.attacks.base import ModelAttack, Threat
from jemkit.attacks.departures import departures
from jemkit.attacks.departures import plain as plain_option
from jemkit.attacks.pgd import PGD
from jemkit.metrics import record as records
from jemkit.metrics.evaluator import Context
from jemkit.metrics.figures import Figure, share
from jemkit.metrics.record_file import Record
from jemkit.options import Options, not_a_fraction
from jemkit.testing import toy_task
from jemkit_plugins.calibration import Calibration

DATA = toy_task().images("valid")
THREAT = Threat("Linf", 8.0)
QUIET = {"robustness": {"indicators": False}}


def measured(out: Path, seed: int = 0, data: Images = DATA, **requested: Any) -> Record:
    given = {"attacks": ("fgsm",), "only": ("robustness",), "options": QUIET, **requested}
    return evaluate(
        PixelModel(linear_model(64, 3, seed=seed)), data, registry=REGISTRY, out=out, **given
    )


def names(folder: Path) -> list[tuple[str, float]]:
    return [(f.name, f.protocol["radius_px"]) for f in records.load(folder).figures]


def test_figures_at_other_radii_and_in_other_norms_stand_beside_each_other(tmp_path: Path) -> None:
    for threat in ({}, {"eps_px": 1}, {"norm": "L2", "eps_px": 20}):
        measured(tmp_path, **threat)
    record = records.load(tmp_path)
    radii = (20, 1, 8)
    assert names(tmp_path) == [(name, px) for px in radii for name in ("clean", "fgsm")]
    assert record.figure("fgsm").protocol["norm"] == "L2"
    assert record.figure("fgsm", norm="Linf", radius_px=8).protocol["radius_px"] == 8
    with pytest.raises(DataError, match="but not with radius_px 3"):
        record.figure("fgsm", radius_px=3)


def test_the_same_protocol_is_measured_once(tmp_path: Path) -> None:
    measured(tmp_path)
    one = records.load(tmp_path)
    measured(tmp_path, eps_px=1)
    measured(tmp_path)
    measured(tmp_path, eps_px=1)
    two = records.load(tmp_path)
    assert names(tmp_path) == [("clean", 1), ("fgsm", 1), ("clean", 8), ("fgsm", 8)]
    assert two.value("fgsm", radius_px=8) == one.value("fgsm")


def test_a_radius_is_one_however_its_number_is_written(tmp_path: Path) -> None:
    for radius in (None, 8, 8.0):
        measured(tmp_path, eps_px=radius)
    assert names(tmp_path) == [("clean", 8), ("fgsm", 8)]
    one, two = (share("pgd20", 1, 2, {"radius_px": radius, "bins": [8]}) for radius in (8, 8.0))
    assert one.key == two.key


def test_the_record_of_another_model_or_other_images_stays_and_comes_back(tmp_path: Path) -> None:
    first = measured(tmp_path)
    measured(tmp_path, seed=1)
    measured(tmp_path, data=Images(DATA.x.flip(0), DATA.y.flip(0)))
    assert len(records.beside(tmp_path)) == 2
    measured(tmp_path, eps_px=1)
    record = records.load(tmp_path)
    assert len(records.beside(tmp_path)) == 2
    assert record.subject == first.subject
    assert names(tmp_path) == [("clean", 1), ("fgsm", 1), ("clean", 8), ("fgsm", 8)]
    stored = records.of_weights(tmp_path, measured(tmp_path / "b", seed=1).subject["sha256"])
    assert stored is not None
    assert stored.value("fgsm") == measured(tmp_path / "b", seed=1).value("fgsm")


def test_a_damaged_record_beside_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in (0, 1, 2):
        measured(tmp_path, seed=seed)
    sha = {s: measured(tmp_path / "b", seed=s).subject["sha256"] for s in (0, 1)}
    stems = {records.load(tmp_path, s).subject["sha256"]: s for s in records.beside(tmp_path)}
    for damaged, wanted in ((0, 1), (1, 0)):
        path = tmp_path / f"{stems[sha[damaged]]}.json"
        whole = path.read_text()
        path.write_text(whole[:-9])
        record = records.of_weights(tmp_path, sha[wanted])
        assert record is not None
        assert record.subject["sha256"] == sha[wanted]
        assert records.of_weights(tmp_path, sha[damaged]) is None
        assert f"{path.name} is skipped" in caplog.text
        path.write_text(whole)


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_where_the_record_wants_a_folder_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file; --out must be a folder"):
        measured(tmp_path / "file" / below)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration leaves a picture of its table."""
    call = Calibration.__call__

    def draw(part: Calibration, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        result = call(part, subject, data, ctx)
        ctx.notes.pictures["reliability"] = json.dumps(ctx.notes.tables["reliability"]).encode()
        return result

    monkeypatch.setattr(Calibration, "__call__", draw)


@pytest.mark.usefixtures("drawn")
def test_each_figure_keeps_its_rows_and_tables(tmp_path: Path) -> None:
    requested = {"only": ("robustness", "calibration")}
    recorded = [measured(tmp_path, **requested, **more) for more in (
        {}, {"eps_px": 1}, {"max_images": 10}, {"options": {**QUIET, "calibration": {"bins": 3}}}
    )]  # fmt: skip
    record = records.load(tmp_path)
    for one in recorded:
        for figure in one.figures:
            rows, wanted = record.rows_of(figure), one.rows_of(figure)
            assert (rows is None and wanted is None) or torch.equal(rows, wanted)  # type: ignore[arg-type]
    bins = {
        name: len(record.tables[name]["count"]) for name in record.named("tables", "reliability")
    }
    assert list(bins.values()) == [20, 3, 20, 20]  # the standard one, then the newest first
    assert bins["reliability"] == 20
    assert record.card_of("tables", "reliability")["images"] == len(DATA.y)
    pictures = records.pictures(tmp_path, record)
    assert sorted(pictures) == sorted(record.named("files", "reliability"))


@pytest.mark.usefixtures("drawn")
def test_each_figure_keeps_its_pictures_while_other_models_are_measured(tmp_path: Path) -> None:
    def picture(stored: str, record: Record) -> bytes:
        return (tmp_path / record.pictures / f"{stored}.png").read_bytes()

    requested = {"only": ("calibration",), "options": {}}
    measured(tmp_path, **requested)
    measured(tmp_path, **requested, max_images=10)
    before = records.load(tmp_path)
    measured(tmp_path, seed=1, **requested)
    measured(tmp_path, **requested, max_images=20)
    after = records.load(tmp_path)
    for name in before.named("files", "reliability"):
        images = before.card_of("files", name)["images"]
        (now,) = (n for n in after.named("files", "reliability")
                  if after.card_of("files", n)["images"] == images)  # fmt: skip
        assert picture(now, after) == picture(name, before)
    assert len(set(after.named("files", "reliability"))) == 3


def test_indicators_of_one_attack_stay_where_another_is_measured(tmp_path: Path) -> None:
    recorded = {"indicators": True, "indicator_images": 4}
    some = Images(DATA.x[:12], DATA.y[:12])
    for attack in ("fgsm", "pgd", "fgsm"):
        measured(
            tmp_path, data=some, attacks=(attack,), options={"robustness": recorded}, quick=True
        )
    record = records.load(tmp_path)
    messages = [set(record.tables[name]) for name in record.named("tables", "indicators")]
    assert messages == [{"fgsm"}, {"pgd20"}]


def test_a_record_of_the_oldest_format_stays_beside_a_new_one(tmp_path: Path) -> None:
    old = measured(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    for key in ("parts", "pictures", "sha256"):
        del saved[key]
    del saved["protocol"]["test_sha256"]
    (tmp_path / "evaluation.json").write_text(json.dumps({**saved, "format": 1}))
    assert [f.name for f in records.load(tmp_path).figures] == ["clean", "fgsm"]
    measured(tmp_path, seed=1)
    (stem,) = records.beside(tmp_path)
    other = records.load(tmp_path, stem)
    assert other.figures == old.figures
    assert torch.equal(other.rows_of(other.figures[0]), old.rows_of(old.figures[0]))  # type: ignore[arg-type]


STOPS = ("write", "_write_files", "_drop_files")


@pytest.mark.parametrize("where", STOPS)
def test_a_kill_while_records_change_places_loses_nothing(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {f.key for seed in (0, 1) for f in measured(tmp_path / "whole", seed=seed).figures}
    measured(tmp_path / "a")
    original: Callable[..., Any] = getattr(records, where)
    done: list[int] = []

    def killed(*given: Any, **named: Any) -> Any:
        original(*given, **named)
        done.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(records, where, killed)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "a", seed=1)
    monkeypatch.undo()
    assert done
    measured(tmp_path / "a", seed=1)
    measured(tmp_path / "a", seed=0)
    assert {f.key for r in records.every(tmp_path / "a") for f in r.figures} == wanted
    assert len(records.beside(tmp_path / "a")) == 1


PART: dict[str, Any] = {
    "evaluator": "", "key": "k", "figures": [], "tables": {}, "rows": {}, "files": {}
}  # fmt: skip


@pytest.mark.parametrize("change", [
    {"pictures": "../elsewhere"}, {"pictures": "/tmp"},
    {"parts": [{**PART, "files": {"a": "../a"}}]}, {"parts": [{**PART, "tables": {"a": "b"}}]},
    {"parts": [{"evaluator": ""}]}, {"parts": [3]},
])  # fmt: skip
def test_a_record_that_names_what_it_cannot_have_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    measured(tmp_path)
    path = tmp_path / "evaluation.json"
    saved = json.loads(path.read_text())
    rows = saved.pop("sha256")["rows"]
    saved |= change
    text = json.dumps(saved, sort_keys=True, separators=(",", ":"))
    seal = {"record": hashlib.sha256(text.encode()).hexdigest(), "rows": rows}
    path.write_text(json.dumps({**saved, "sha256": seal}))
    with pytest.raises(DataError, match=r"evaluation\.json is damaged"):
        records.load(tmp_path)


def test_a_file_in_place_of_a_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("")
    with pytest.raises(DataError, match=r"report\.html is a file; expected the folder of a run"):
        records.load(file)


def test_the_outcome_of_a_measurement_and_its_seconds_are_no_protocol() -> None:
    card = {"attack": "pgd", "seconds": 1.0, "max_delta_px": {"L2": 1.0}, "accuracy_after": {}}
    one = share("pgd20", 1, 2, card)
    two = share("pgd20", 2, 2, {"attack": "pgd", "seconds": 2.0, "max_delta_px": {"L2": 2.0}})
    assert one.key == two.key
    assert one.key != share("pgd20", 1, 2, {**card, "seed": 1}).key
    assert one.key != share("pgd50", 1, 2, card).key


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "energy": ({"steps": 1}, {"of": "x"}, ("energy",)),
    "detector": ({"steps": 1}, {"limit": "own"}, ("detector",)),
    "eot": ({"samples": 1}, {"step_px": 1.0}, ("eot20",)),
    "apgd": ({"steps": 3}, {"restarts": 2}, ("apgd",)),
    "fgsm": ({"random_start": True}, {"random_start": True}, ("fgsm",)),
    "pgd": ({"step_px": 1.0}, {"step_px": 3.0}, ("pgd20",)),
    "cw": ({"step_px": 1.0}, {"step_px": 3.0}, ("cw20",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_figure_by_other_options_is_not_standard_and_replaces_none(
    tmp_path: Path, name: str
) -> None:
    *options, figures = OPTIONS[name]
    few = Images(DATA.x[:9], DATA.y[:9])
    requested = {"attacks": (name,), "data": few}
    default = measured(tmp_path, **requested)
    for other in options:
        changed = measured(tmp_path, **requested, options={**QUIET, name: other})
        for figure in figures:
            protocol = changed.figure(figure).protocol
            assert not protocol["standard"]
            assert protocol["options"] == other
            assert all(key in protocol["why"] for key in other)
    record = records.load(tmp_path)
    for figure in figures:
        assert default.figure(figure).protocol["standard"]
        assert record.figure(figure) == default.figure(figure)


def test_calibration_with_other_bins_is_not_standard(tmp_path: Path) -> None:
    requested = {"only": ("calibration",), "attacks": ()}
    default = measured(tmp_path, **{**requested, "options": {}})
    changed = measured(tmp_path, **{**requested, "options": {"calibration": {"bins": 3}}})
    assert default.figure("ece").protocol["standard"]
    assert not changed.figure("ece").protocol["standard"]
    assert changed.figure("clean").protocol["standard"]
    assert records.load(tmp_path).value("ece") == default.value("ece")


class Guest(Options):
    """An attack of somebody else's: its card tells nothing, its label one option."""

    everyone: ClassVar[bool] = True
    standard_at_any: ClassVar = frozenset({"verbose"})

    needed: int
    steps: int = 3
    power: float = 1.0
    shift: list[int] = Field(default_factory=list)
    step_px: float | None = None
    verbose: bool = False

    @property
    def label(self) -> str:
        return f"guest{self.steps}"

    def bind(self, subject: PixelModel, threat: Threat) -> dict[str, Callable[..., Tensor]]:
        def perturb(x: Tensor, _y: Tensor, _rng: Generator) -> Tensor:
            return (x + self.power * threat.eps / 2).clamp(0, 1)

        return {self.label: perturb}

    def card(self, threat: Threat, n_classes: int) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("options", "departing"), [
    ({}, {"needed": 1}), ({"steps": 5, "verbose": True}, {"needed": 1}),
    ({"power": 0.5}, {"needed": 1, "power": 0.5}), ({"shift": [1]}, {"needed": 1, "shift": [1]}),
    ({"step_px": 2.0}, {"needed": 1}), ({"step_px": 1.0}, {"needed": 1, "step_px": 1.0}),
])  # fmt: skip
def test_options_off_their_default_that_no_label_names_are_listed_for_any_part(
    options: dict[str, Any], departing: dict[str, Any]
) -> None:
    assert isinstance(Guest(needed=1), ModelAttack)
    assert departures(Guest(needed=1, **options), THREAT) == departing


def test_an_option_at_what_its_default_means_is_the_default() -> None:
    assert not departures(PGD(step_px=2.0, radius_px=8.0, norm="Linf"), THREAT)
    assert not departures(PGD(norm="L2"), Threat("L2", 8.0))
    assert departures(PGD(step_px=2.0), Threat("Linf", 4.0)) == {"step_px": 2.0}
    adam = partial(PGD, optimizer="adam")
    assert departures(adam(step_px=2.0), Threat("Linf", 8.0)) == {"step_px": 2.0}
    assert not departures(adam(step_px=25.5), Threat("Linf", 8.0))


def test_a_path_among_the_options_is_listed_without_its_folder() -> None:
    assert plain_option([Path("/home/me/statistics.safetensors")]) == ["statistics.safetensors"]


@pytest.mark.parametrize(("fraction", "px"), [
    (0.031, "8"), (0.0314, "8"), (0.03137, "8"), (0.03, "8"), (0.0157, "4"), (0.0039, "1"),
    (0.5, "127.5"), (0.25, "63.75"),
])  # fmt: skip
def test_a_radius_that_was_given_as_a_fraction_is_shown_in_whole_pixels(
    fraction: float, px: str
) -> None:
    with pytest.raises(ValueError, match=rf"write {px}$"):
        not_a_fraction(fraction)
