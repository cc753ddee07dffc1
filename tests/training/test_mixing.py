"""Generated images in batches: their part, their draws, and the files that they come from."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import SHORT, jemkit
from groups import run
from hypothesis import given
from hypothesis import strategies as st
from ranks import every_rank
from strategies import seeds
from toys import gen, toy_recipe, toy_registry

from jemkit import Augmentation, Bounds, ConfigError, DataError, Loader, Views
from jemkit.runtime.checkpoint import load, newest
from jemkit.runtime.files import read_json
from jemkit.runtime.pytree import differing, same
from jemkit.runtime.work_cache import WHOLE, Shard
from jemkit.testing.toys import toy_images
from jemkit.training.build import build_run
from jemkit.training.mixing import GeneratedImages, MixedLoader

REAL, NEW = toy_images(20, 3, 8, 1, 0), toy_images(7, 3, 8, 1, 1)
BATCH = ("x", "y", "x_pos", "index", "generated")


def generated(fraction: float) -> GeneratedImages:
    x, y = NEW.x.permute(0, 2, 3, 1).numpy(), NEW.y.numpy()
    return GeneratedImages(Path("a"), x, y, fraction=fraction, channels_last=True)


def loader(
    fraction: float, batch: int = 8, seed: int = 0, shard: Shard = WHOLE, **views: Any
) -> Loader:
    form: dict[str, Any] = {
        "views": Views(**views), "bounds": Bounds(), "shard": shard,
        "augmentation": Augmentation(pad=1, flip=True),
    }  # fmt: skip
    if not fraction:
        return Loader(REAL, batch, gen(seed), **form)
    return MixedLoader(REAL, batch, gen(seed), generated(fraction), gen(seed + 1), **form)


@given(fraction=st.floats(0.05, 1), batch=st.integers(2, 20), seed=seeds)
def test_every_batch_has_its_part_of_generated_images(
    fraction: float, batch: int, seed: int
) -> None:
    n = math.floor(fraction * batch + 1e-9)
    if not n:
        with pytest.raises(ConfigError, match="less than one image"):
            loader(fraction, batch)
        return
    batches = loader(fraction, batch, seed, augment_x=False)
    assert batches.steps_per_epoch == math.ceil(20 / batch)
    clean = Bounds().from_unit(torch.cat([REAL.unit(), NEW.unit()]))
    labels = torch.cat([REAL.y, NEW.y])
    for _ in range(4):
        batch = batches.batch()
        assert batch.generated is not None
        assert int(batch.generated.sum()) == n
        assert torch.equal(batch.generated, batch.index >= 20)
        assert torch.equal(batch.x, clean[batch.index])
        assert torch.equal(batch.y, labels[batch.index])


def test_an_epoch_has_the_real_images_of_one_order_and_repeats_it_where_it_is_too_short() -> None:
    batches = loader(0.5, 6)  # four batches of three
    for _ in range(2):
        index = torch.cat([batches.batch().index for _ in range(4)])
        assert torch.equal(index[index < 20].sort().values, batches.order[:12].sort().values)
    batches = loader(0.07, 15)  # two batches of fourteen, of twenty images
    index = torch.cat([batches.batch().index for _ in range(2)])
    counts = index[index < 20].bincount(minlength=20)
    assert sorted(counts.tolist()) == [1] * 12 + [2] * 8


def test_generated_images_are_drawn_with_replacement_and_stand_anywhere() -> None:
    batches = [loader(0.5, 20).batch() for _ in range(1)]
    index = batches[0].index[batches[0].index >= 20]
    assert len(index.unique()) < len(index)  # ten of seven
    places = {tuple(batch.generated.tolist()) for batch in batches if batch.generated is not None}
    assert all(sorted(place) != list(place) for place in places)


def test_generated_images_are_augmented_too_and_reach_the_density() -> None:
    batch = loader(0.9, 20, pos_share=0.5).batch()
    assert batch.generated is not None
    plain = Bounds().from_unit(NEW.unit())[batch.index[batch.generated] - 20]
    assert not torch.equal(batch.x[batch.generated], plain)
    assert batch.generated[: len(batch.x_pos)].any()


def test_floats_are_mixed_as_floats() -> None:
    floats = REAL._replace(x=REAL.unit())
    mixed = MixedLoader(
        floats, 8, gen(), generated(0.5), gen(1), views=Views(augment_x=False), bounds=Bounds(),
        augmentation=Augmentation(),
    )  # fmt: skip
    whole = loader(0.5, 8, augment_x=False).batch()
    assert torch.allclose(mixed.batch().x, whole.x)


@given(cut=st.integers(0, 9), seed=seeds)
def test_it_goes_on_where_its_saved_state_stood(cut: int, seed: int) -> None:
    whole, again = loader(0.5, 8, seed, noise_x=0.1), loader(0.5, 8, seed + 5, noise_x=0.1)
    for _ in range(cut):
        whole.batch()
    again.load_state_dict(whole.state_dict())
    for _ in range(5):
        assert same(list(whole.batch()), list(again.batch()))


@given(size=st.sampled_from([1, 2, 4]), seed=seeds)
def test_the_processes_batches_together_are_one_processs_batch(size: int, seed: int) -> None:
    shards = (WHOLE, *(Shard(rank, size) for rank in range(size)))
    loaders = [loader(0.7, 8, seed, shard, noise_x=0.1, pos_share=0.5) for shard in shards]
    for _ in range(5):
        whole, *parts = (one.batch() for one in loaders)
        for name in BATCH:
            joined = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, getattr(whole, name)), name


def written(path: Path, n: int = 30, **arrays: Any) -> Path:
    images = toy_images(n, 3, 8, 1, 2)
    usual = {"image": images.x.permute(0, 2, 3, 1).numpy(), "label": images.y.numpy()}
    np.savez(path, **{k: v for k, v in {**usual, **arrays}.items() if v is not None})
    return path


def mixed(path: Path, fraction: float = 0.5, *more: str) -> tuple[str, ...]:
    return (f"extra.file={path}", f"extra.fraction={fraction}", *more)


def different(one: Path, other: Path) -> list[str]:
    """Where two runs' newest checkpoints differ, but for times and what config.json says."""
    ends = [newest(path / "checkpoints") for path in (one, other)]
    assert None not in ends
    differences = differing(*(load(end) for end in ends if end is not None))
    return [at for at in differences if "seconds" not in at and "config" not in at]


def test_a_run_resumes_bit_for_bit_and_keeps_what_it_was_trained_on(tmp_path: Path) -> None:
    file = written(tmp_path / "new.npz")
    run(str(tmp_path / "whole"), overrides=mixed(file))
    run(str(tmp_path / "cut"), until=2, overrides=mixed(file))
    run(str(tmp_path / "cut"), resume=True, overrides=mixed(file.rename(tmp_path / "moved.npz")))
    assert different(tmp_path / "whole", tmp_path / "cut") == []
    about = read_json(tmp_path / "whole" / "config.json")["extra_data"]
    assert (about["images"], about["fraction"], len(about["sha256"])) == (30, 0.5, 64)
    run(str(tmp_path / "plain"))
    assert different(tmp_path / "whole", tmp_path / "plain")


def test_a_changed_file_is_refused_while_resuming(tmp_path: Path) -> None:
    file = written(tmp_path / "new.npz")
    run(str(tmp_path / "cut"), until=2, overrides=mixed(file))
    written(file, n=31)
    with pytest.raises(DataError, match="not those that the run was started with, 30 images"):
        run(str(tmp_path / "cut"), resume=True, overrides=mixed(file))
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        run(str(tmp_path / "cut"), resume=True, overrides=mixed(file))


def test_with_fraction_0_a_run_is_that_without_generated_images(tmp_path: Path) -> None:
    file = written(tmp_path / "new.npz")
    run(str(tmp_path / "none"), overrides=mixed(file, 0))
    run(str(tmp_path / "plain"))
    assert different(tmp_path / "none", tmp_path / "plain") == []
    assert "extra_data" not in read_json(tmp_path / "none" / "config.json")


def ranks(folder: str, file: str) -> list[str]:
    run(f"{folder}/two", overrides=mixed(Path(file)))
    return []


def test_two_processes_repeat_bit_for_bit_with_generated_images(tmp_path: Path) -> None:
    file = written(tmp_path / "new.npz")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        every_rank(ranks, str(tmp_path / name), str(file))
    assert different(tmp_path / "a" / "two", tmp_path / "b" / "two") == []


def test_statistics_and_validation_are_of_real_images(tmp_path: Path) -> None:
    parts = [
        build_run(toy_recipe(toy_registry(), "sadajem", "pgdat", "plain", *options).recipe)
        for options in ((), mixed(written(tmp_path / "new.npz")))
    ]
    assert parts[0].task.hash == parts[1].task.hash
    assert parts[0].task.n_train == parts[1].task.n_train
    assert same(parts[0].splits.images("valid"), parts[1].splits.images("valid"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "keys": ({"image": None}, "no array image, but label"),
    "unlabelled": ({"label": None}, "no labels, an array label"),
    "size": ({"image": np.zeros((30, 32, 32, 3), np.uint8)}, r"expected \[N, 8, 8, 1\]"),
    "flat": ({"image": np.zeros((30, 64), np.uint8)}, r"expected \[N, 8, 8, 1\]"),
    "empty": ({"image": np.zeros((0, 8, 8, 1), np.uint8)}, "no images"),
    "floats": ({"image": np.full((30, 8, 8, 1), 0.5)}, "float64, with values from 0.5 to 0.5"),
    "black": ({"image": np.ones((30, 8, 8, 1), np.uint8)}, "black in 0..255"),
    "high": ({"label": np.arange(30)}, "labels run from 0 to 29; the data set has the classes 0"),
    "low": ({"label": np.full(30, -1)}, "labels run from -1 to -1"),
    "few": ({"label": np.zeros(29, np.int64)}, r"label is \[29\] of int64; expected 30"),
    "soft": ({"label": np.zeros((30, 3))}, r"label is \[30, 3\] of float64"),
    "objects": ({"image": np.array([None] * 30, dtype=object)}, "never unpickles"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_mixed_in_is_refused(tmp_path: Path, name: str) -> None:
    arrays, message = WRONG[name]
    recipe = toy_recipe(
        toy_registry(), "classifier", "pgdat", "plain",
        *mixed(written(tmp_path / "new.npz", **arrays)),
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        build_run(recipe.recipe)


def test_channels_may_come_first(tmp_path: Path) -> None:
    images = toy_images(30, 3, 8, 1, 2)
    file = written(tmp_path / "new.npz", image=images.x.numpy())
    recipe = toy_recipe(toy_registry(), "classifier", "pgdat", "plain", *mixed(file))
    loader = build_run(recipe.recipe).loader
    assert isinstance(loader, MixedLoader)
    assert torch.equal(loader.generated.take(torch.arange(30)).x, images.x)


TRAIN = (
    "train", "--backbone=sadajem", "--objective=ebjdat", "--dataset=digits", *SHORT, "--quiet",
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--extra-data=a.npz",), 3, "add --extra-fraction"),
        (("--extra-fraction=0.7",), 3, "does nothing without a file, --extra-data"),
        (("--extra-labels=a",), 3, "does nothing without a file, --extra-data"),
        (("--extra-data=a.npz", "--extra-fraction=0", "--extra-labels=a"), 3, "fraction is 0"),
        (("--extra-data=a.npz", "--extra-fraction=1.2"), 3, "less than or equal to 1"),
        (("--extra-data=a.npz", "--extra-fraction=-0.1"), 3, "greater than or equal to 0"),
        (("--extra-data=a.npz", "--extra-fraction=0.7"), 6, "a.npz is missing"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_training(
    options: tuple[str, ...], code: int, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcome = jemkit(*TRAIN, *options, "--out=run")
    assert outcome.code == code
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_model_trains_on_what_another_one_draws_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JEMKIT_CACHE", str(tmp_path / "cache"))
    assert jemkit(*TRAIN, "--out=first").code == 0
    drawn = ("--n=40", "--steps=1", "--device=cpu", "--json")
    labelled = jemkit("sample", "first", *drawn, "--class=all").record["npz"]
    share = ("--extra-fraction=0.5", f"--extra-data={labelled}")
    assert jemkit(*TRAIN, "--out=second", *share).code == 0
    assert jemkit(*TRAIN, "--dry-run", *share, "--extra-labels=first").err.endswith(
        "has labels: omit --extra-labels (extra.labels)\n"
    )
    bare = jemkit("sample", "first", *drawn).record["npz"]
    share = ("--extra-fraction=0.5", f"--extra-data={bare}", "--extra-labels=first")
    outcome = jemkit(*TRAIN, "--out=third", *share)
    assert outcome.code == 0, outcome.err
    about = read_json(tmp_path / "third" / "config.json")["extra_data"]
    assert about["labels"]["model"] == str(tmp_path / "first")
    assert len(about["labels"]["weights"]) == 64
    assert len(list((tmp_path / "cache" / "labels").iterdir())) == 1
    assert "8 of 16 in every batch" in jemkit(*TRAIN, "--dry-run", *share).out
    toys = mixed(written(tmp_path / "toys.npz", label=None), 0.5, "extra.labels=first")
    other = toy_recipe(toy_registry(), "classifier", "pgdat", "plain", *toys)  # of three classes
    with pytest.raises(DataError, match="classes"):
        build_run(other.recipe)
    Path(bare).unlink()
    judged = jemkit("evaluate", "third", "--only=calibration", "--max-images=20", "--device=cpu")
    assert judged.code == 0, judged.err
