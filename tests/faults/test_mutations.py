"""Files changed in any way are refused or read as they were; nothing else ever comes of them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_recipe, toy_registry

from jemkit import JemkitError, Trainer
from jemkit.config.recipe import complete, resolve
from jemkit.metrics import record
from jemkit.metrics.evaluator import Notes
from jemkit.metrics.figures import plain
from jemkit.runtime import checkpoint
from jemkit.runtime.checkpoint import FILES, MANIFEST
from jemkit.runtime.files import file_hash
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.training.run import resume_from

REGISTRY = toy_registry()
JSONS = ("checkpoint/manifest.json", "checkpoint/state.json", "config.json", "evaluation.json")
NAMES = [*JSONS, *(f"checkpoint/{n}" for n in FILES if n[-4:] != "json"), "evaluation.safetensors"]
SOME, MANY = settings(max_examples=60), settings(max_examples=2000)
"""Of each of five laws: 300 in all, and 10,000."""


class Saved(NamedTuple):
    """A run's files as they were written."""

    folder: Path
    trainer: Trainer
    state: dict[str, Any]
    files: dict[str, bytes]
    record: dict[str, Any]

    def changed(self, name: str, content: bytes) -> None:
        """One file changed, and all others as they were."""
        for other, whole in self.files.items():
            (self.folder / other).write_bytes(content if other == name else whole)

    def vouch(self) -> None:
        """Make the manifest agree with whatever the files hold."""
        hashes = {n: file_hash(self.folder / "checkpoint" / n) for n in FILES}
        manifest = {"format": checkpoint.FORMAT, "sha256": hashes}
        (self.folder / "checkpoint" / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("run")
    recipe = toy_recipe(REGISTRY, "jem", "ebjdat", "plain", "backbone.buffer.capacity=9")
    run = RunFolder.create(folder / "run")
    trainer = Trainer(recipe, run)
    trainer.run(until=1)
    whole = complete(recipe, REGISTRY)
    run.write_config(whole.tables, whole.origins)
    shutil.copy(run.path / "config.json", folder)
    shutil.copytree(run.checkpoints / "step-00000001", folder / "checkpoint")
    figures = [plain("clean", 0.5, 4, {"evaluator": "accuracy", "split": "test"})]
    rows = {"clean": torch.tensor([1.0, 0.0])}
    about = {"sha256": "abc", "path": "run"}
    record.save(folder, record.Record(about, {"seed": 0}, figures, {"t": [1]}, rows), Notes())
    files = {name: (folder / name).read_bytes() for name in NAMES}
    known = record.load(folder).to_json()
    return Saved(folder, trainer, checkpoint.load(folder / "checkpoint"), files, known)


def read_all(saved: Saved) -> None:
    """Whatever reads these files."""
    for read in (
        lambda: checkpoint.load(saved.folder / "checkpoint"),
        lambda: checkpoint.load_weights(saved.folder / "checkpoint"),
        lambda: resolve(REGISTRY, config=saved.folder / "config.json"),
        lambda: RunFolder(saved.folder).config,
    ):
        tried(read)
    assert tried(lambda: record.load(saved.folder).to_json()) in (None, saved.record)


def tried(read: Callable[[], Any]) -> Any:
    """What it gives, or None where it is refused; anything else fails the test."""
    try:
        return read()
    except JemkitError:
        return None


def check_bytes(saved: Saved, name: str, content: bytes) -> None:
    saved.changed(name, content)
    read_all(saved)
    loaded = tried(lambda: checkpoint.load(saved.folder / "checkpoint"))
    assert loaded is None or same(loaded, saved.state)
    if name.startswith("checkpoint") and name != "checkpoint/manifest.json":
        assert (loaded is None) == (content != saved.files[name])


def flipped(raw: bytes, flips: list[tuple[float, int]]) -> bytes:
    content = bytearray(raw)
    for share, bits in flips:
        content[int(share * len(content))] ^= bits
    return bytes(content)


shares = st.floats(0, 1, exclude_max=True)
flips = st.lists(st.tuples(shares, st.integers(1, 255)), min_size=1, max_size=4)
names = st.sampled_from(NAMES)


def check_flips(saved: Saved, name: str, flips: list[tuple[float, int]]) -> None:
    check_bytes(saved, name, flipped(saved.files[name], flips))


def check_cuts(saved: Saved, name: str, share: float, inserted: bytes, cut: int) -> None:
    """Truncated, bytes put in between, or some left out."""
    raw = saved.files[name]
    at = int(share * len(raw))
    check_bytes(saved, name, raw[:at])
    check_bytes(saved, name, raw[:at] + inserted + raw[at + cut :])


ODD: list[Any] = [
    None, True, -1, 1e308, 10**30, "", "../../x", "\x00", [], {}, [[]], [["a", 1]], {"items": 3},
    {"tensor": "/nothing"}, {"list": {}}, {"use": "jem"}, {"use": 3}, float("nan"), "0" * 64,
]  # fmt: skip


def edited(tree: Any, draw: random.Random, how: str, odd: Any) -> Any:
    """A tree with one value, at a place of `draw`'s choice, replaced, left out or added."""
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.1:
        return odd
    copy = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    key = draw.choice(list(copy))
    if draw.random() < 0.75:
        copy[key] = edited(copy[key], draw, how, odd)
    elif how == "leave out":
        del copy[key]
    elif how == "add":
        copy["added" if isinstance(tree, dict) else len(copy)] = odd
    else:
        copy[key] = odd
    return copy if isinstance(tree, dict) else list(copy.values())


edits = st.tuples(
    st.sampled_from(JSONS),
    st.integers(0, 2**32).map(random.Random),
    st.sampled_from(["replace", "leave out", "add"]),
    st.sampled_from(ODD),
)


def check_edit(saved: Saved, edit: tuple[str, random.Random, str, Any]) -> None:
    name, draw, how, odd = edit
    tree = edited(json.loads(saved.files[name]), draw, how, odd)
    saved.changed(name, json.dumps(tree).encode())
    read_all(saved)
    loaded = tried(lambda: checkpoint.load(saved.folder / "checkpoint"))
    assert loaded is None or same(loaded, saved.state)


def go_on(saved: Saved) -> None:
    """Resume from whatever now stands in the checkpoint."""
    run = saved.trainer.folder
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    shutil.copytree(saved.folder / "checkpoint", run.checkpoints / "step-00000001")
    tried(lambda: resume_from(saved.trainer, run))


def check_vouched_edit(saved: Saved, draw: random.Random, how: str, odd: Any) -> None:
    """A state that somebody edited with the manifest: whatever it says, it is data or refused."""
    tree = edited(json.loads(saved.files["checkpoint/state.json"]), draw, how, odd)
    saved.changed("checkpoint/state.json", json.dumps(tree).encode())
    saved.vouch()
    read_all(saved)
    go_on(saved)


def check_vouched_flips(saved: Saved, name: str, flips: list[tuple[float, int]]) -> None:
    saved.changed(name, flipped(saved.files[name], flips))
    saved.vouch()
    read_all(saved)
    go_on(saved)


tensor_files = st.sampled_from([f"checkpoint/{n}" for n in FILES])
near = st.lists(st.tuples(shares.map(lambda s: s**4), st.integers(1, 255)), min_size=1, max_size=3)
"""Most of them in a file's beginning, where its header is."""
LAWS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (check_flips, {"name": names, "flips": flips | near}),
    (
        check_cuts,
        {
            "name": names,
            "share": shares,
            "inserted": st.binary(max_size=9),
            "cut": st.integers(0, 9),
        },
    ),
    (check_edit, {"edit": edits}),
    (
        check_vouched_edit,
        {
            "draw": st.integers(0, 2**32).map(random.Random),
            "how": st.sampled_from(["replace", "leave out", "add"]),
            "odd": st.sampled_from(ODD),
        },
    ),
    (check_vouched_flips, {"name": tensor_files, "flips": flips | near}),
]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law[0].__name__)


@each_law
def test_changed_files_are_refused_or_read_as_they_were(saved: Saved, law: Any) -> None:
    check, values = law
    SOME(given(**values)(lambda **drawn: check(saved, **drawn)))()


@pytest.mark.slow
@pytest.mark.timeout(14400)
@each_law
def test_ten_thousand_changes_are_refused_or_read_as_they_were(saved: Saved, law: Any) -> None:
    check, values = law
    MANY(given(**values)(lambda **drawn: check(saved, **drawn)))()
