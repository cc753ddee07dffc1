"""A JSON file of a run with one value changed, its hashes right: refused by name, or harmless."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import toy_recipe, toy_registry

from jemkit import DataError, JemkitError, load, train
from jemkit.config.eval_settings import settings_of
from jemkit.evaluation.compare import compare
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.export import export
from jemkit.evaluation.report import write
from jemkit.evaluation.sample import draw_samples, sample_request
from jemkit.evaluation.subjects import subject_at
from jemkit.metrics import record_file
from jemkit.metrics.record_file import SEAL
from jemkit.metrics.record_file import _hash as sealed
from jemkit.training.initial_weights import initial

REGISTRY = toy_registry()
CPU = torch.device("cpu")
QUICK = settings_of({"attacks": ("fgsm",), "only": ("accuracy", "robustness"), "max_images": 4})
OPTIONS = ("run.epochs=1", "backbone.network.channels=1", "backbone.buffer.capacity=9")
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2.5, -0.5, 1e308, 10**30, -(10**30), float("nan"),
    float("inf"), "", "x", "1", "a/../b", "\udcff", "\0", [], [1], ["x"], [[]], {}, {"a": 1},
    {"use": "x"}, [{}], "9" * 5000,
]  # fmt: skip
Place = tuple[str | int, ...]


def evaluate(run: Path) -> None:
    judge(subject_at(run, REGISTRY, CPU), QUICK, REGISTRY)


def resume(run: Path) -> None:
    train(
        toy_recipe(REGISTRY, "jem", "jem", "plain", *OPTIONS), run, registry=REGISTRY, resume=True
    )


def sample(run: Path) -> None:
    request = sample_request(
        run, registry=REGISTRY, n=2, steps=1, start=None, source="chains", classes=None, seed=0,
        device="cpu", which="best",
    )  # fmt: skip
    draw_samples(request, work=run / ".drawing")


Commands = tuple[Callable[[Path], Any], ...]
RUN: Commands = (
    evaluate,
    resume,
    sample,
    lambda run: export(run, out=run / "exported", registry=REGISTRY),
    lambda run: write([run]),
    lambda run: compare([run, run.parent / "whole"]),
    lambda run: compare([run, run.parent / "whole"], seeds=True),
)
MODEL: Commands = (
    evaluate, sample, lambda folder: load(folder, registry=REGISTRY), initial,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and judged, and what it was exported as."""
    folder = tmp_path_factory.mktemp("folder")
    train(
        toy_recipe(REGISTRY, "jem", "jem", "plain", *OPTIONS), folder / "whole", registry=REGISTRY
    )
    evaluate(folder / "whole")
    export(folder / "whole", out=folder / "model", registry=REGISTRY)
    return folder


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Every place of a tree, tables and lists included."""
    if at:
        yield at
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, key))


def changed(tree: Any, at: Place, how: str, odd: Any) -> Any:
    whole = copy.deepcopy(tree)
    into = whole
    for key in at[:-1]:
        into = into[key]
    match how:
        case "leave out":
            del into[at[-1]]
        case "add":
            (into if isinstance(into, dict) else {})["added"] = odd
        case "deep":
            for _ in range(300):
                into[at[-1]] = [into[at[-1]]]
        case _:
            into[at[-1]] = odd
    return whole


HOW = ("leave out", "add", "deep", "odd", "odd", "odd")


def with_seal(tree: Any) -> Any:
    """A record whose hash is the one of what it holds."""
    if not isinstance(tree, dict) or not isinstance(tree.get(SEAL), dict):
        return tree
    plain = {name: value for name, value in tree.items() if name != SEAL}
    return {**plain, SEAL: {**tree[SEAL], "record": sealed(plain)}}


def as_it_is(tree: Any) -> Any:
    return tree


FILES: dict[str, tuple[str, str, Callable[[Any], Any], Commands]] = {
    "record": ("whole", "evaluation.json", with_seal, RUN),
    "config": ("whole", "config.json", as_it_is, RUN),
    "model": ("model", "config.json", as_it_is, MODEL),
}


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data(), how=st.sampled_from(HOW), odd=st.sampled_from(ODD))
def test_a_file_with_one_value_changed_is_refused_or_harmless(
    folder: Path, kind: str, draw: st.DataObject, how: str, odd: Any
) -> None:
    name, file, whole, commands = FILES[kind]
    tree = json.loads((folder / name / file).read_text())
    at = draw.draw(st.sampled_from([*places(tree)]))
    command = draw.draw(st.sampled_from(commands))
    tried(folder, name, file, whole(changed(tree, at, how, odd)), command)


def tried(folder: Path, name: str, file: str, tree: Any, command: Callable[[Path], Any]) -> None:
    again = folder / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(folder / name, again)
    (again / file).write_text(json.dumps(tree))
    with suppress(JemkitError):
        command(again)


@pytest.mark.parametrize("origins", [None, [], "x", {"run.seed": None}])
def test_damaged_origins_of_settings_are_harmless(folder: Path, origins: Any) -> None:
    tree = json.loads((folder / "whole" / "config.json").read_text())
    for command in RUN:
        tried(folder, "whole", "config.json", {**tree, "origins": origins}, command)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_only_written_again_is_taken(folder: Path, kind: str) -> None:
    name, file, whole, commands = FILES[kind]
    again = folder / "again"
    for command in commands:
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(folder / name, again)
        tree = whole(json.loads((again / file).read_text()))
        (again / file).write_text(json.dumps(tree, indent=3))
        command(again)


SIZES = [[1, 1, 8], [1, True, 8], [1, 8.5, 8], [3, 8, 8], [1, 8, 10**12], [1, 800, 8], [8, 8]]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("command", [sample, evaluate])
def test_a_shape_that_is_not_the_networks_is_refused(
    folder: Path, shape: list[Any], command: Callable[[Path], Any]
) -> None:
    tree = json.loads((folder / "model" / "config.json").read_text())
    again = folder / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(folder / "model", again)
    (again / "config.json").write_text(json.dumps(changed(tree, ("task", "shape"), "odd", shape)))
    with pytest.raises(JemkitError):
        command(again)


WRONG: list[tuple[Place, Any]] = [
    (("parts", 0, "figures", 0), [1]), (("parts", 0, "figures", 0), {"a": 1}),
    (("parts", 0, "tables"), {"a": 1}), (("figures", 0, "name"), 7),
    (("figures", 0, "low"), "0.5"), (("figures", 0, "n"), "many"), (("figures", 0, "n"), True),
    (("figures", 0, "n"), -1),
    (("figures", 0, "value"), "0.5"), (("figures", 0, "value"), 10**400),
    (("figures", 0, "protocol"), [1]), (("warnings", ), [3]), (("left_out", ), {"ood": None}),
]  # fmt: skip


@pytest.mark.parametrize(("at", "value"), WRONG, ids=str)
def test_a_record_that_no_evaluation_wrote_is_damaged(
    folder: Path, tmp_path: Path, at: Place, value: Any
) -> None:
    for name in ("evaluation.json", "evaluation.safetensors"):
        shutil.copy(folder / "whole" / name, tmp_path / name)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(
        json.dumps(with_seal(changed(tree, at, "odd", value)))
    )
    with pytest.raises(DataError, match=r"evaluation\.json is damaged"):
        record_file.load(tmp_path)
