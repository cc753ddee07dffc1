"""A run goes on with the recipe that it was started with, and may be made longer."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import photo_recipe, photos
from toys import toy_recipe, toy_registry

from jemkit import ConfigError, DataError, Diverged, Preempted, train
from jemkit.config.recipe import Resolved, complete, resolve
from jemkit.errors import UsageError
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.evaluation.subjects import subject_at
from jemkit.runtime import checkpoint
from jemkit.runtime.files import write_json
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing.resume import check_run
from jemkit.training.initial_weights import initial
from jemkit.training.resuming import Change, changes, refused, resolve_for_resume

REGISTRY = toy_registry()
CE = ("classifier", "ce", "plain")


def begun(recipe: Resolved, out: Path, steps: int = 7) -> Path:
    stops = iter([False] * steps + [True])
    with pytest.raises(Preempted):
        train(recipe, out, registry=REGISTRY, stop=lambda: next(stops, True))
    return out


def read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


def edited(out: Path, key: str, value: Any) -> None:
    """config.json with another value of one setting."""
    config = read(out / "config.json")
    *path, last = key.split(".")
    table = config["recipe"]
    for name in path:
        table = table[name]
    table[last] = value
    write_json(out / "config.json", config)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(toy_recipe(REGISTRY, *CE), tmp_path_factory.mktemp("runs") / "run")


EDITS = {
    "optimizer.lr": 0.5, "run.batch_size": 3, "run.seed": 1, "run.epochs": 1,
    "schedule.decay": "cosine", "backbone.network.channels": 3, "run.valid_fraction": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("key", EDITS)
def test_a_config_that_was_changed_is_refused_with_what_it_was(key: str, stopped: Path) -> None:
    original = (stopped / "config.json").read_text()
    was = dict_at(read(stopped / "config.json")["recipe"], key)
    edited(stopped, key, EDITS[key])
    message = f"{key} is {EDITS[key]} and was {was}"
    resumed = complete(resolve(REGISTRY, config=stopped / "config.json"), REGISTRY)
    cpu = torch.device("cpu")
    for use in (
        lambda: train(resumed, stopped, registry=REGISTRY, resume=True),
        lambda: subject_at(stopped, REGISTRY, cpu),
        lambda: subject_at(stopped / "checkpoints" / "best", REGISTRY, cpu),
        lambda: sample(stopped, registry=REGISTRY, n=1, steps=1),
        lambda: export(stopped),
        lambda: check_run(stopped, REGISTRY),
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert message in str(caught.value)
    (stopped / "config.json").write_text(original)


def dict_at(tables: dict[str, Any], key: str) -> Any:
    table: Any = tables
    for name in key.split("."):
        table = table[name]
    return table


def test_another_recipe_is_refused_with_both_values(stopped: Path) -> None:
    other = toy_recipe(REGISTRY, *CE, "optimizer.lr=0.5", "run.batch_size=3")
    with pytest.raises(UsageError) as caught:
        train(other, stopped, registry=REGISTRY, resume=True)
    assert caught.value.exit_code == 2
    for message in (
        "optimizer.lr = 0.5: the run was started with 0.01",
        "run.batch_size = 3: the run was started with 9",
    ):
        assert message in str(caught.value)


def test_what_changes_no_outcome_may_differ_and_is_saved(tmp_path: Path) -> None:
    out = begun(toy_recipe(REGISTRY, *CE), tmp_path / "run")
    more = toy_recipe(REGISTRY, *CE, "run.micro_batch=3", "run.keep=5")
    train(more, out, registry=REGISTRY, resume=True)
    run = read(out / "config.json")["recipe"]["run"]
    assert (run["micro_batch"], run["keep"]) == (3, 5)
    subject_at(out, REGISTRY, torch.device("cpu"))


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "optimizer.lr": st.floats(1e-4, 1.0),
    "run.seed": st.integers(0, 99),
    "run.batch_size": st.integers(2, 40),
    "schedule.decay": st.sampled_from(["cosine", "constant"]),
    "sentinel.tries": st.integers(0, 9),
    "run.max_train": st.integers(20, 60),
    "updater.use": st.sampled_from(["plain", "sam", "awp"]),
    "backbone.use": st.sampled_from(["jem", "sadajem", "mebm"]),
    "optimizer.use": st.sampled_from(["sgd", "adam", "adamw"]),
    "backbone.network.use": st.sampled_from(["smallcnn", "wrn-10-1", "mlp-8-1"]),
}
OVERRIDES = st.fixed_dictionaries({}, optional=VALUES)


@settings(max_examples=40, deadline=None)
@given(OVERRIDES, st.sampled_from([None, "paper", "v3", "released-ce"]), st.data())
def test_the_whole_command_is_accepted_again_and_any_other_value_is_named(
    given_: dict[str, Any], preset: str | None, data: st.DataObject
) -> None:
    texts = [f"{key}={value}" for key, value in given_.items()]
    layers: dict[str, Any] = {"preset": preset, "config": None, "named": {"data": {"use": "toy"}}}
    try:
        whole = complete(resolve(REGISTRY, overrides=texts, **layers), REGISTRY)
    except ConfigError:
        return  # parts that do not go together
    with tempfile.TemporaryDirectory() as home:
        folder = RunFolder(Path(home))
        folder.write_config(whole.tables, whole.origins)
        for some in (
            texts,
            data.draw(st.lists(st.sampled_from(texts), unique=True)) if texts else [],
        ):
            again = resolve_for_resume(REGISTRY, folder.path, **{**layers, "overrides": some})
            if some == texts:
                assert not refused(whole.tables, again.tables)
        alone = {"preset": None, "config": None, "named": {}}
        assert not changes(
            whole.tables, resolve_for_resume(REGISTRY, folder.path, **alone, overrides=[]).tables
        )
        other = resolve_for_resume(
            REGISTRY, folder.path, **alone, overrides=["optimizer.lr=0.123", "run.seed=1234"]
        )
        assert set(refused(whole.tables, other.tables)) == {
            Change("optimizer.lr", whole.tables["optimizer"]["lr"], 0.123),
            Change("run.seed", whole.tables["run"]["seed"], 1234),
        }


def test_a_run_that_ended_goes_on_for_more_epochs_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    train(toy_recipe(REGISTRY, *CE), out, registry=REGISTRY)
    longer = toy_recipe(REGISTRY, *CE, "run.epochs=4")
    summary = train(longer, out, registry=REGISTRY, resume=True)
    assert summary.epochs == 4
    assert [int(row["step"]) for row in RunFolder(out).metrics()] == list(range(24))
    (event,) = events(out, "extended")
    assert "was started with 2 epochs and continues to 4" in event["message"]
    assert "not bit-for-bit identical to a run of 4 epochs" in caplog.text
    config = read(out / "config.json")
    assert config["recipe"]["run"]["epochs"] == 4
    state = checkpoint.load(out / "checkpoints" / "step-00000024")
    assert state["config"]["recipe"] == config["recipe"]
    subject_at(out, REGISTRY, torch.device("cpu"))
    train(longer, out, registry=REGISTRY, resume=True)
    assert len(events(out, "extended")) == 1


def test_its_learning_rate_is_from_there_on_that_of_the_longer_run(tmp_path: Path) -> None:
    out = begun(toy_recipe(REGISTRY, *CE, "schedule.decay=cosine"), tmp_path / "run")
    longer = toy_recipe(REGISTRY, *CE, "schedule.decay=cosine", "run.epochs=5")
    train(longer, out, registry=REGISTRY, resume=True)
    rates = [float(row["lr"]) for row in RunFolder(out).metrics()]
    schedule = longer.recipe.schedule
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.01 * schedule.factor(step, 12 if step < 7 else 30))


def test_a_kill_while_a_run_is_made_longer_leaves_one_that_goes_on(tmp_path: Path) -> None:
    out = begun(toy_recipe(REGISTRY, *CE), tmp_path / "run")
    edited(out, "run.epochs", 4)  # as it is before the next checkpoint is written
    subject_at(out, REGISTRY, torch.device("cpu"))
    saved = complete(resolve(REGISTRY, config=out / "config.json"), REGISTRY)
    assert train(saved, out, registry=REGISTRY, resume=True).epochs == 4
    assert len(events(out, "extended")) == 1


def test_a_run_cannot_be_shortened(stopped: Path) -> None:
    shorter = toy_recipe(REGISTRY, *CE, "run.epochs=1")
    with pytest.raises(UsageError, match=r"not shortened.*run\.epochs = 1.*started with 2"):
        train(shorter, stopped, registry=REGISTRY, resume=True)


def test_the_weights_that_a_run_began_with_may_be_named_again(
    stopped: Path, tmp_path: Path
) -> None:
    out, stops = tmp_path / "run", iter([False] * 3 + [True])
    recipe = toy_recipe(REGISTRY, *CE)
    with pytest.raises(Preempted):
        train(recipe, out, registry=REGISTRY, init_from=stopped, stop=lambda: next(stops, True))
    with pytest.raises(UsageError, match=f"--init-from {tmp_path}: the run was started with"):
        train(recipe, out, registry=REGISTRY, init_from=tmp_path, resume=True)
    train(recipe, out, registry=REGISTRY, init_from=stopped, resume=True)
    with pytest.raises(UsageError, match="started with randomly initialised weights"):
        train(recipe, stopped, registry=REGISTRY, init_from=stopped, resume=True)


def test_an_exported_model_is_where_a_run_may_begin(stopped: Path, tmp_path: Path) -> None:
    model = export(stopped, out=tmp_path / "model", which="last").folder
    stops = iter([True])
    with pytest.raises(Preempted):
        train(
            toy_recipe(REGISTRY, *CE), tmp_path / "run", registry=REGISTRY, init_from=model,
            stop=lambda: next(stops, True),
        )  # fmt: skip
    first = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000000")["model"]
    assert same(first, checkpoint.load_weights(stopped))
    assert same(first, initial(model).weights)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        initial(model)


@pytest.mark.parametrize(
    ("setting", "warned"),
    [
        ("schedule.warmup=0", "the first step already uses 100% of optimizer.lr"),
        ("schedule.warmup_share=1", None),
    ],
)
def test_a_start_that_may_undo_trained_weights_is_warned_of(
    setting: str, warned: str | None, stopped: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    chosen = (setting, *(("schedule.warmup_share=1",) if "warmup=" not in setting else ()))
    stops = iter([True])
    with pytest.raises(Preempted):
        train(
            toy_recipe(REGISTRY, *CE, *chosen), tmp_path / "run", registry=REGISTRY,
            init_from=stopped, stop=lambda: next(stops, True),
        )  # fmt: skip
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert (len(messages) == 1 and warned in messages[0]) if warned else not messages
    assert [event["message"] for event in events(tmp_path / "run", "init_from")] == messages


def test_weights_of_other_classes_are_never_taken_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = []
    for name, classes in (("a", ("cat", "dog", "fox")), ("b", ("dog", "fox", "lynx"))):
        root = photos(tmp_path / name, classes=classes, n=6)
        recipe = photo_recipe(root, "schedule.warmup_share=1", "run.epochs=20")
        stops = iter([True])
        with pytest.raises(Preempted):
            train(
                recipe, tmp_path / f"run-{name}", registry=REGISTRY,
                init_from=ends[0] if ends else None, stop=lambda it=stops: next(it, True),
            )  # fmt: skip
        ends.append(tmp_path / f"run-{name}")
    (message,) = [event["message"] for event in events(ends[1], "init_from")]
    assert "trained on cat, dog, fox; this run's classes are dog, fox, lynx" in message
    assert message in caplog.text


def test_a_run_that_diverged_at_once_does_not_advise_the_weights_that_it_came_from(
    stopped: Path, tmp_path: Path
) -> None:
    steep = toy_recipe(REGISTRY, *CE, "optimizer.lr=1e30", "schedule.warmup=0", "sentinel.tries=1")
    with pytest.raises(Diverged) as caught:
        train(steep, tmp_path / "run", registry=REGISTRY, init_from=stopped)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("diverged at step ")
    assert [line[:4] for line in rest] == ["  - "] * len(rest)
    assert len(rest) <= 5
    assert "optimizer.lr below" in rest[-1]
    assert "--init-from" not in str(caught.value)
    assert "backbone.steps" not in str(caught.value)  # a classifier has no chains
