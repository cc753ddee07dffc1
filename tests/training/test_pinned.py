"""A run keeps what its data were, and goes on with no others."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import CLASSES, REGISTRY, copied, photo, photo_recipe, photos
from PIL import Image
from toys import toy_recipe, toy_registry

from jemkit import ConfigError, DataError, Preempted, train
from jemkit.config.eval_settings import settings_of
from jemkit.config.registry import Registry
from jemkit.data import Images
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.evaluation.subjects import EvalTarget, subject_at
from jemkit.runtime import checkpoint
from jemkit.runtime.files import write_json
from jemkit.splits import Splits
from jemkit.testing.resume import check_run
from jemkit.training import pinned
from jemkit.training.build import splits_of

CPU = torch.device("cpu")
PARTS = ("train", "valid", "test")


def begun(recipe: Any, out: Path, steps: int = 4, registry: Registry = REGISTRY) -> Path:
    """A run that was stopped after so many steps."""
    stops = iter([False] * steps + [True])
    with pytest.raises(Preempted):
        train(recipe, out, registry=registry, stop=lambda: next(stops, True))
    return out


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def rename(root: Path, was: str = "cat", now: str = "lynx") -> None:
    for folder in sorted(root.rglob(was)):
        folder.rename(folder.with_name(now))


def fewer(root: Path) -> None:
    for path in [*root.glob("cat/00[0-3].png"), *root.glob("dog/00[0-3].png")]:
        path.unlink()


def more(root: Path) -> None:
    for label, name in enumerate(CLASSES):
        for i in range(20):
            photo(root / name / f"n{i}.png", label, 5_000 + 100 * label + i)


def others(root: Path) -> None:
    for i, path in enumerate(sorted((root / "dog").iterdir())):
        photo(path, 0, 7_000 + i)


def swapped(root: Path) -> None:
    (root / "cat").rename(root / "x")
    (root / "dog").rename(root / "cat")
    (root / "x").rename(root / "dog")


def another_class(root: Path) -> None:
    for i in range(6):
        photo(root / "owl" / f"{i}.png", 3, 9_000 + i)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fewer": (fewer, r"15 images, instead of 22.*removed: cat/000.png, cat/001.png"),
    "more": (more, r"65 images, instead of 22.*added: cat/n0.png.* and 55 more"),
    "others": (others, r"changed: dog/00"),
    "renamed": (rename, r"has the classes cat, dog, fox; .* has dog, fox, lynx"),
    "swapped": (swapped, r"22 images; .*changed: cat/00"),
    "added a class": (another_class, r"has the classes cat, dog, fox; .* has cat, dog, fox, owl"),
    "lost a class": (lambda root: shutil.rmtree(root / "fox"), r"has cat, dog\. "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_the_data_that_it_began_with_or_says_what_changed(
    name: str, tmp_path: Path
) -> None:
    change, message = CHANGES[name]
    root, out = photos(tmp_path / "data"), tmp_path / "run"
    begun(photo_recipe(root), out)
    change(root)
    with pytest.raises(DataError, match=message) as caught:
        train(photo_recipe(root), out, registry=REGISTRY, resume=True)
    assert caught.value.exit_code == 6
    assert "Restore the data" in str(caught.value)
    with pytest.raises(DataError, match=r"^the (run|training images)"):
        check_run(out, REGISTRY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose test split is drawn, and a complete run on it."""
    home = tmp_path_factory.mktemp("home")
    root = photos(home / "data")
    train(photo_recipe(root), home / "run", registry=REGISTRY)
    return root, home / "run"


def moved(run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same folder and run in another place; config.json names the new one."""
    root, out = copied(run[0], tmp_path / "data"), copied(run[1], tmp_path / "run")
    config = read(out / "config.json")
    config["recipe"]["data"]["dir"] = str(root)
    write_json(out / "config.json", config)
    return root, out


def judged(out: Path, dataset: dict[str, Any] | None = None) -> tuple[EvalTarget, Any]:
    subject = subject_at(out, REGISTRY, CPU, dataset=dataset)._replace(folder=None)
    return subject, judge(subject, settings_of({"only": ("accuracy",)}), REGISTRY)


def test_config_json_holds_class_names_counts_and_hashes(run: tuple[Path, Path]) -> None:
    data = read(run[1] / "config.json")["data"]
    assert data["classes"] == ["cat", "dog", "fox"]
    assert [data[part]["images"] for part in PARTS] == [22, 2, 6]
    listed = read(run[1] / "data.json")
    assert len({*listed["images"]["train"], *listed["images"]["test"]}) == 28
    assert min(listed["names"]) == "cat/000.png"
    assert {*listed["names"].values()} == {
        h for images in listed["images"].values() for h in images
    }


def test_a_run_and_its_data_may_be_moved(run: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = moved(run, tmp_path)
    first, second = judged(run[1])[1], judged(out)[1]
    assert first.figure("clean").value == second.figure("clean").value
    assert second.figure("clean").protocol["standard"] is True
    check_run(out, REGISTRY)


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_judged_on_its_own_data_as_they_were(
    name: str, run: tuple[Path, Path], tmp_path: Path
) -> None:
    root, out = moved(run, tmp_path)
    CHANGES[name][0](root)
    with pytest.raises(DataError, match="pass the data set"):
        judged(out)


def test_one_file_more_where_the_test_split_is_drawn_is_reported_with_the_training_images_in_it(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    root, out = moved(run, tmp_path)
    photo(root / "cat" / "aaa.png", 0, 4_000)
    with pytest.raises(DataError, match=r"added: cat/aaa\.png"):
        judged(out)
    subject, record = judged(out, {"dir": str(root)})
    known = {
        *read(out / "data.json")["images"]["train"],
        *read(out / "data.json")["images"]["valid"],
    }
    count = sum(image in known for image in pinned.image_hashes(subject.test))
    assert count == subject.trained_on > 0
    figure = record.figure("clean")
    assert figure.protocol["standard"] is False
    assert figure.protocol["trained_on"] == count
    assert any(f"{count} of the 7 test images are training" in w for w in record.warnings)


def test_a_data_set_that_is_named_must_have_the_classes_of_the_run(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    same = copied(run[0], tmp_path / "same")
    figure = judged(run[1], {"use": "folder", "dir": str(same)})[1].figure("clean")
    assert figure.protocol["standard"] is True
    other = photos(tmp_path / "other", n=12)
    subject, _ = judged(run[1], {"use": "folder", "dir": str(other)})
    assert subject.trained_on > 0  # it begins with the same pictures
    rename(other)
    for name in (str(other), "digits"):
        dataset = {"use": "digits"} if name == "digits" else {"use": "folder", "dir": name}
        with pytest.raises(
            DataError, match=r"has the classes cat, dog, fox; .* has (dog, fox, lynx|0, 1)"
        ):
            judged(run[1], dataset)


def test_where_names_are_unknown_their_number_counts_and_one_warning_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = toy_registry()
    out = tmp_path / "run"
    train(toy_recipe(registry, "classifier", "ce", "plain"), out, registry=registry)
    assert read(out / "config.json")["data"]["classes"] is None
    caplog.clear()
    subject_at(out, registry, CPU)
    assert not caplog.records
    subject_at(out, registry, CPU, dataset={"use": "toy", "n": 63})
    assert [r.message.split(":")[0] for r in caplog.records] == ["class names are missing"]
    with pytest.raises(DataError, match="has 3 classes; the digits data set has 10"):
        subject_at(out, registry, CPU, dataset={"use": "digits"})


def test_sampling_and_an_export_know_the_data_too(tmp_path: Path) -> None:
    root, out = photos(tmp_path / "data"), tmp_path / "run"
    small = ("backbone.use=jem", "backbone.steps=1", "backbone.buffer.capacity=9", "run.epochs=1")
    chosen = ("backbone.network.use=smallcnn", "backbone.network.channels=2")
    train(photo_recipe(root, *small, *chosen, "objective.use=jem"), out, registry=REGISTRY)
    model = export(out).folder
    assert read(model / "config.json")["data"]["classes"] == ["cat", "dog", "fox"]
    rename(root)
    with pytest.raises(DataError, match=r"has the classes cat, dog, fox; .* has dog, fox, lynx"):
        sample(out, registry=REGISTRY, n=2, steps=1, device="cpu")
    for path in (out, model):
        with pytest.raises(
            DataError, match=r"has the classes cat, dog, fox; .* has dog, fox, lynx"
        ):
            judged(path, {"dir": str(root)})


def test_a_run_of_jemkit_0_1_goes_on_and_is_judged_with_one_warning_each(
    run: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    begun(photo_recipe(run[0]), out)
    unpin(out)
    for go in (
        lambda: train(photo_recipe(run[0]), out, registry=REGISTRY, resume=True),
        lambda: judged(out),
    ):
        caplog.clear()
        go()
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert ["has no record of its data" in r.getMessage() for r in warnings] == [True]


def unpin(out: Path) -> None:
    """Take from a run what jemkit 0.1 did not keep."""
    config = read(out / "config.json")
    del config["data"]
    write_json(out / "config.json", config)
    (out / "data.json").unlink()
    for path in checkpoint.complete(out / "checkpoints"):
        state = checkpoint.load(path)
        del state["config"]
        checkpoint.save(path, state)


def test_a_damaged_list_of_images_costs_the_explanation_but_not_the_check(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    root, out = moved(run, tmp_path)
    (out / "data.json").write_text("{}")
    assert judged(out)[1].figure("clean").protocol["standard"] is True
    messages = judged(out, {"dir": str(photos(tmp_path / "new", n=11))})[1].warnings
    assert any("it is unknown whether the model was trained on these images" in w for w in messages)
    fewer(root)
    with pytest.raises(DataError, match=r"images, instead of \d+\. "):
        judged(out)


def test_a_pin_that_is_no_table_is_refused_by_its_place(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = moved(run, tmp_path)
    config = read(out / "config.json")
    config["data"]["train"]["images"] = "many"
    write_json(out / "config.json", config)
    with pytest.raises(DataError, match=r"data|its entry for the data"):
        judged(out)


def test_an_image_has_one_hash_whatever_holds_it() -> None:
    grey = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    y = torch.zeros(3, dtype=torch.long)
    hashes = [
        pinned.image_hashes(Images(x, y))
        for x in (
            grey.to(torch.uint8),
            grey.expand(-1, 3, -1, -1).to(torch.uint8),
            grey.float() / 255,
        )
    ]
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes[0])) == 3


class Change:
    """Something that happens to a folder of images between two commands."""

    @staticmethod
    def add(root: Path, k: int) -> None:
        photo(root / CLASSES[k % 3] / f"new{k}.png", k % 3, 20_000 + k)

    @staticmethod
    def remove(root: Path, k: int) -> None:
        (root / CLASSES[k % 3] / f"{k % 6:03d}.png").unlink(missing_ok=True)

    @staticmethod
    def redraw(root: Path, k: int) -> None:
        photo(root / CLASSES[k % 3] / f"{k % 6:03d}.png", k % 3, 30_000 + k)

    @staticmethod
    def rename_file(root: Path, k: int) -> None:
        path = root / CLASSES[k % 3] / f"{k % 6:03d}.png"
        if path.exists():
            path.rename(path.with_name(f"{k % 6:03d}{'a' if k % 2 else ''}.png"))

    @staticmethod
    def move_file(root: Path, k: int) -> None:
        path = root / CLASSES[k % 3] / f"{k % 6:03d}.png"
        if path.exists() and (root / CLASSES[(k + 1) % 3]).exists():
            path.rename(root / CLASSES[(k + 1) % 3] / f"moved{k}.png")

    @staticmethod
    def rename_class(root: Path, k: int) -> None:
        path, renamed = root / CLASSES[k % 3], root / ("zebra", "ant", "catfish")[k % 3]
        if path.exists() and not renamed.exists():
            path.rename(renamed)

    @staticmethod
    def add_class(root: Path, k: int) -> None:
        for i in range(6):
            photo(root / f"owl{k}" / f"{i}.png", 3, 40_000 + i)

    @staticmethod
    def resave(root: Path, k: int) -> None:
        """The same pixels in other bytes."""
        for path in (root / CLASSES[k % 3]).glob("*.png"):
            Image.open(path).save(path, compress_level=k % 10)

    @staticmethod
    def touch(root: Path, k: int) -> None:
        for path in root.rglob("*.png"):
            path.touch()

    @staticmethod
    def write_notes(root: Path, k: int) -> None:
        if (root / CLASSES[k % 3]).exists():
            (root / CLASSES[k % 3] / "notes.txt").write_text("not an image")


HAPPENS = sorted(name for name in vars(Change) if not name.startswith("_"))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(HAPPENS), st.integers(0, 11)), min_size=1, max_size=3),
    st.sampled_from([(), ("run.max_train=10",)]),
)
def test_whatever_happens_to_a_folder_is_harmless_or_named(
    changes: list[tuple[str, int]], overrides: tuple[str, ...]
) -> None:
    """Harmless is what leaves every split's images, labels and order, and the classes' names."""
    with tempfile.TemporaryDirectory() as home:
        root, folder = photos(Path(home) / "data", n=6), Path(home) / "run"
        folder.mkdir()
        recipe = photo_recipe(root, *overrides).recipe
        before = splits_of(recipe)
        table = pinned.write(folder, *pinned.pin(before))
        write_json(folder / "config.json", {"data": table})
        for name, k in changes:
            getattr(Change, name)(root, k)
        guarded = splits_of(recipe, pinned.read(folder / "config.json"))
        assert refused(guarded) is not same_data(before, splits_of(recipe))


def refused(splits: Splits) -> bool:
    try:
        for part in PARTS:
            splits.images(part)
    except DataError:
        return True
    return False


def same_data(before: Splits, now: Splits) -> bool:
    """Whether a folder still has its classes' names, and every split its images and labels."""
    try:
        pairs = [(before.images(part), now.images(part)) for part in PARTS]
        named = pinned.class_names(now.dataset) == CLASSES
    except (DataError, ConfigError):
        return False
    return named and all(
        a.shape == b.shape and torch.equal(a, b)
        for pair in pairs
        for a, b in zip(*pair, strict=True)
    )
