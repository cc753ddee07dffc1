"""Data sets hold what they claim; a file that is missing, damaged or unfit is named."""

import contextlib
import hashlib
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from jemkit.data import Augmentation, Dataset, NamesClasses, Split
from jemkit.errors import DataError
from jemkit.runtime.torchvision_compat import torchvision
from jemkit.splits import stratified_parts
from jemkit_plugins.datasets import CIFAR10, CIFAR100, SVHN, Digits, jemkit_datasets
from jemkit_plugins.folder import Folder
from jemkit_plugins.folder import jemkit_datasets as jemkit_folders

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"

few = settings(deadline=None, max_examples=10)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a download nobody asked for")

    for name in ("download_url", "download_and_extract_archive"):
        monkeypatch.setattr(torchvision().datasets.utils, name, refuse)
        monkeypatch.setattr(torchvision().datasets.cifar, name, refuse, raising=False)
        monkeypatch.setattr(torchvision().datasets.svhn, name, refuse, raising=False)


class TestParts:
    def test_every_data_set_is_offered_by_its_name(self, tmp_path: Path) -> None:
        offered = {**jemkit_datasets(), **jemkit_folders()}
        assert sorted(offered) == ["cifar10", "cifar100", "digits", "folder", "svhn"]
        folder = Folder(dir=sorted_folder(tmp_path))
        for name, part in offered.items():
            assert isinstance(folder if name == "folder" else part(), Dataset)

    def test_every_data_set_names_its_classes_in_the_order_of_the_labels(
        self, tmp_path: Path
    ) -> None:
        folder = Folder(dir=sorted_folder(tmp_path))
        for part in (Digits(), CIFAR10(), CIFAR100(), SVHN(), folder):
            assert isinstance(part, NamesClasses)
            assert len(part.class_names) == len(set(part.class_names)) == part.n_classes
        assert folder.class_names == ("cat", "dog")
        assert (CIFAR10().class_names[0], CIFAR10().class_names[9]) == ("airplane", "truck")
        assert (CIFAR100().class_names[0], CIFAR100().class_names[99]) == ("apple", "worm")
        assert Digits().class_names == SVHN().class_names == tuple("0123456789")

    @pytest.mark.parametrize(
        ("part", "n_classes", "radius_px", "augmentation"),
        [
            (Digits, 10, 25.5, Augmentation()),
            (CIFAR10, 10, 8, Augmentation(pad=4, flip=True)),
            (CIFAR100, 100, 8, Augmentation(pad=4, flip=True)),
            (SVHN, 10, 8, Augmentation(pad=4)),
        ],
    )
    def test_what_is_known_without_a_file(
        self, part: Any, n_classes: int, radius_px: float, augmentation: Augmentation
    ) -> None:
        known = (part().n_classes, part.radius_px, part.augmentation)
        assert known == (n_classes, radius_px, augmentation)

    def test_unknown_or_changed_options_are_refused(self) -> None:
        with pytest.raises(ValidationError):
            CIFAR10(root="data")  # type: ignore[call-arg]
        with pytest.raises(ValidationError):
            CIFAR10().download = True  # type: ignore[misc]
        for size in (7, 65):
            with pytest.raises(ValidationError):
                Folder(dir=Path(), size=size)


class TestDigits:
    def test_the_split_is_stratified_fixed_and_without_overlap(self) -> None:
        from sklearn.datasets import load_digits

        train, test = Digits().load("train"), Digits().load("test")
        assert train.x.shape == (1297, 1, 8, 8)
        assert test.x.shape == (500, 1, 8, 8)
        shares = test.y.bincount() / (test.y.bincount() + train.y.bincount())
        assert (shares - 500 / 1797).abs().max() < 0.005
        assert test.y[:12].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8, 4, 5]
        pixels = torch.cat([train.x, test.x]).flatten(1) * 16
        rows = sorted(map(tuple, pixels.round().int().tolist()))
        assert rows == sorted(map(tuple, load_digits().data.astype(int).tolist()))

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_the_split_is_the_one_that_scikit_learn_draws(self, split: Split) -> None:
        from sklearn.datasets import load_digits

        whole = load_digits()
        y = torch.from_numpy(whole.target)
        index = stratified_parts(y, test_size=500)[split]
        x = torch.from_numpy(whole.images).float().unsqueeze(1) / 16
        kept = Digits().load(split)
        assert torch.equal(kept.x, x[index])
        assert torch.equal(kept.y, y[index])

    def test_pixels_fill_the_unit_range(self) -> None:
        x, y = Digits().load("train")
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (x.min(), x.max()) == (0, 1)

    def test_every_load_is_the_same(self) -> None:
        for first, second in zip(Digits().load("test"), Digits().load("test"), strict=True):
            assert torch.equal(first, second)


class SideEffect:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def publish(kind: Any, root: Path, monkeypatch: pytest.MonkeyPatch, *, label: str) -> Path:
    """A small CIFAR of two images a batch, and its md5 sums as if they were the published ones."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def put(name: str, content: Any) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        listed = []
        for seed, (name, _) in enumerate(getattr(kind, part)):
            batch = {"data": noise(seed, 2, 3072), label: [seed, seed + 1]}
            listed.append([name, put(name, batch)])
        monkeypatch.setattr(kind, part, listed)
    md5 = put(kind.meta["filename"], {kind.meta["key"]: ["a class"]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small CIFAR-10."""
    return publish(torchvision().datasets.CIFAR10, tmp_path, monkeypatch, label="labels")


class TestCIFAR:
    def test_batches_are_read_in_order_as_channels_of_rows(self, small: Path) -> None:
        x, y = CIFAR10(dir=small.parent).load("train")
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert x.is_contiguous()
        expected = np.concatenate([noise(seed, 2, 3072) for seed in range(5)])
        np.testing.assert_array_equal(x.numpy(), expected.reshape(10, 3, 32, 32))
        assert y.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        assert len(CIFAR10(dir=small.parent).load("test").x) == 2

    def test_cifar100_has_its_fine_labels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = torchvision().datasets.CIFAR100
        publish(kind, tmp_path, monkeypatch, label="fine_labels")
        assert CIFAR100(dir=tmp_path).load("test").y.tolist() == [0, 1]

    @pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4", "test_batch", "batches.meta"])
    def test_a_truncated_file_is_refused_by_name(self, small: Path, name: str) -> None:
        whole = (small / name).read_bytes()
        (small / name).write_bytes(whole[:-1])
        with pytest.raises(DataError, match=f"{name} is damaged: its md5 is .*--download"):
            CIFAR10(dir=small.parent).load("test")

    @pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
    def test_a_missing_file_is_refused_by_name(self, small: Path, name: str) -> None:
        (small / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing; give --data-dir DIR .*--download"):
            CIFAR10(dir=small.parent).load("train")

    @pytest.mark.parametrize(
        ("part", "first"),
        [
            (CIFAR10, "cifar-10-batches-py/data_batch_1"),
            (CIFAR100, "cifar-100-python/train"),
            (SVHN, "train_32x32.mat"),
        ],
    )
    def test_an_empty_folder_names_the_first_missing_file(
        self, tmp_path: Path, part: Any, first: str
    ) -> None:
        with pytest.raises(DataError) as told:
            part(dir=tmp_path).load("train")
        assert str(told.value).startswith(f"{tmp_path / first} is missing")

    @pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
    def test_a_changed_file_is_never_unpickled(self, small: Path, name: str) -> None:
        ran = small / "ran"
        (small / name).write_bytes(pickle.dumps(SideEffect(ran)))
        for split in ("train", "test"):
            with pytest.raises(DataError, match=name):
                CIFAR10(dir=small.parent).load(split)
        assert not ran.exists()
        pickle.loads((small / name).read_bytes())
        assert ran.exists()  # the trap was live

    def test_labels_out_of_range_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = torchvision().datasets.CIFAR10
        folder = publish(kind, tmp_path, monkeypatch, label="labels")
        wrong = pickle.dumps({"data": noise(0, 2, 3072), "labels": [3, 10]})
        (folder / "test_batch").write_bytes(wrong)
        md5 = hashlib.md5(wrong).hexdigest()
        monkeypatch.setattr(kind, "test_list", [["test_batch", md5]])
        with pytest.raises(DataError, match=r"cifar10 .*label 10"):
            CIFAR10(dir=tmp_path).load("test")

    def test_a_download_is_made_only_where_it_is_asked_for_and_needed(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = (small / "test_batch").read_bytes()
        asked = []

        def download(url: str, root: Path, filename: str, md5: str) -> None:
            asked.append((url, root, filename, md5))
            (small / "test_batch").write_bytes(whole)

        utils = torchvision().datasets.utils
        monkeypatch.setattr(utils, "download_and_extract_archive", download)
        fetching = CIFAR10(dir=small.parent, download=True)
        fetching.load("test")
        assert asked == []
        (small / "test_batch").write_bytes(whole[:-1])
        fetching.load("test")
        kind = torchvision().datasets.CIFAR10
        assert asked == [(kind.url, small.parent, kind.filename, kind.tgz_md5)]

    def test_a_failed_download_is_told_with_its_address(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(torchvision().datasets.utils, "download_and_extract_archive", fail)
        with pytest.raises(DataError, match=r"https://.*download failed .no route to host"):
            CIFAR10(dir=tmp_path, download=True).load("test")


@pytest.fixture(scope="session")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published CIFAR-10 batches."""
    if not (SHARED / "restore.py").is_file():
        pytest.skip("no CIFAR-10 in ../shared/data/cifar10")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, SHARED / "restore.py", root], check=True, capture_output=True)
    return root


class TestPublishedCIFAR10:
    @pytest.mark.parametrize(("split", "each"), [("train", 5000), ("test", 1000)])
    def test_the_real_batches_are_whole(self, restored: Path, split: Any, each: int) -> None:
        x, y = CIFAR10(dir=restored).load(split)
        assert x.shape == (10 * each, 3, 32, 32)
        assert y.bincount().tolist() == [each] * 10
        if split == "train":
            means = x.float().mean((0, 2, 3)) / 255  # as every paper gives them
            torch.testing.assert_close(
                means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0
            )

    def test_one_truncated_real_batch_is_refused_by_name(
        self, restored: Path, tmp_path: Path
    ) -> None:
        theirs = restored / "cifar-10-batches-py"
        ours = tmp_path / theirs.name
        ours.mkdir()
        for file in theirs.iterdir():
            (ours / file.name).symlink_to(file)
        (ours / "data_batch_3").unlink()
        (ours / "data_batch_3").write_bytes((theirs / "data_batch_3").read_bytes()[:1_000_000])
        with pytest.raises(DataError, match="data_batch_3 is damaged"):
            CIFAR10(dir=tmp_path).load("train")


@pytest.mark.parametrize("kind", ["fifo", "zero", "sparse", "folder"])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (CIFAR10, "cifar-10-batches-py/data_batch_1"),
        (CIFAR100, "cifar-100-python/train"),
        (SVHN, "train_32x32.mat"),
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_what_is_no_published_file_is_refused_unread(
    tmp_path: Path, part: Any, name: str, kind: str, download: bool
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**40)
        download = False
    with pytest.raises(DataError, match=rf"{name} is (not a regular file|damaged: it has)"):
        part(dir=tmp_path, download=download).load("train")


class TestSVHN:
    @pytest.fixture
    def pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
        """A test set of three images, [32, 32, 3, N] and labels 1..10, as the publisher's are."""
        from scipy.io import savemat

        x = noise(0, 32, 32, 3, 3)
        file = tmp_path / "test_32x32.mat"
        savemat(file, {"X": x, "y": np.array([[10], [1], [9]], np.uint8)})
        kind = torchvision().datasets.SVHN
        url, name, _ = kind.split_list["test"]
        listed = [url, name, hashlib.md5(file.read_bytes()).hexdigest()]
        monkeypatch.setattr(kind, "split_list", {**kind.split_list, "test": listed})
        return x

    def test_digit_ten_is_zero_and_images_come_first(
        self, tmp_path: Path, pixels: np.ndarray
    ) -> None:
        x, y = SVHN(dir=tmp_path).load("test")
        np.testing.assert_array_equal(x.numpy(), pixels.transpose(3, 2, 0, 1))
        assert y.tolist() == [0, 1, 9]

    @pytest.mark.usefixtures("pixels")
    def test_a_changed_file_is_refused_by_name(self, tmp_path: Path) -> None:
        with (tmp_path / "test_32x32.mat").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(DataError, match=r"test_32x32\.mat is damaged"):
            SVHN(dir=tmp_path).load("test")


def put(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def sorted_folder(root: Path, *, n: int = 2, shape: tuple[int, ...] = (8, 8)) -> Path:
    """root/{train,test}/{cat,dog}/0..n.png"""
    seed = 0
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(n):
                seed += 1
                put(root / split / name / f"{i}.png", noise(seed, *shape))
    return root


class TestFolder:
    @few
    @given(
        seed=st.integers(0, 2**31),
        size=st.integers(8, 12),
        colour=st.booleans(),
        n=st.integers(1, 3),
    )
    def test_pixels_and_labels_come_back_as_they_were_saved(
        self, seed: int, size: int, colour: bool, n: int
    ) -> None:
        shape = (size, size, 3) if colour else (size, size)
        saved = noise(seed, 2 * n, *shape)
        with tempfile.TemporaryDirectory() as root:
            for i, pixels in enumerate(saved):
                label = "dog" if i >= n else "cat"
                put(Path(root) / "train" / label / f"{i}.png", pixels)
                put(Path(root) / "test" / label / f"{i}.png", 255 - pixels)
            data = Folder(dir=Path(root))
            assert data.n_classes == 2
            train, test = data.load("train"), data.load("test")
        x = saved.transpose(0, 3, 1, 2) if colour else saved[:, None]
        np.testing.assert_array_equal(train.x.numpy(), x)
        np.testing.assert_array_equal(test.x.numpy(), 255 - x)
        assert train.y.tolist() == test.y.tolist() == [0] * n + [1] * n

    def test_the_files_of_a_split_are_named_in_the_order_of_its_images(
        self, tmp_path: Path
    ) -> None:
        data = Folder(dir=sorted_folder(tmp_path))
        assert data.files("test") == tuple(
            f"test/{c}/{i}.png" for c in ("cat", "dog") for i in "01"
        )
        for split in ("train", "test"):
            images = data.load(split)
            for pixels, name in zip(images.x, data.files(split), strict=True):
                np.testing.assert_array_equal(pixels[0], np.asarray(Image.open(tmp_path / name)))

    def test_one_colour_image_makes_both_splits_colour(self, tmp_path: Path) -> None:
        data = Folder(dir=sorted_folder(tmp_path))
        assert data.load("train").x.shape == (4, 1, 8, 8)
        put(tmp_path / "test" / "cat" / "9.png", noise(0, 8, 8, 3))  # neither first nor last
        x = data.load("train").x
        assert x.shape == (4, 3, 8, 8)
        assert torch.equal(x[:, 0], x[:, 2])

    def test_the_classes_are_known_without_reading_a_pixel(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c", ".hidden"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.png").write_bytes(b"no image")
        assert Folder(dir=tmp_path).n_classes == 3

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        for name in ("plane", "train"):
            for i in range(5):
                put(tmp_path / name / f"{i}.png", noise(i, 8, 8))
        data = Folder(dir=tmp_path)
        assert (data.n_classes, len(data.load("train").x)) == (2, 8)

    def test_without_test_folders_a_fixed_stratified_fifth_is_set_apart(
        self, tmp_path: Path
    ) -> None:
        for i in range(30):
            put(
                tmp_path / ("cat" if i < 10 else "dog") / f"{i:02}.png", np.full((8, 8), i, "uint8")
            )
        data = Folder(dir=tmp_path)
        train, test = data.load("train"), data.load("test")
        assert (train.y.bincount().tolist(), test.y.bincount().tolist()) == ([8, 16], [2, 4])
        ids = torch.cat([train.x, test.x])[:, 0, 0, 0]
        assert ids.sort().values.tolist() == list(range(30))
        assert torch.equal((ids >= 10).long(), torch.cat([train.y, test.y]))
        assert torch.equal(data.load("test").x, test.x)

    @few
    @given(counts=st.lists(st.integers(4, 12), min_size=2, max_size=4))
    def test_every_class_is_in_both_parts_or_has_too_few_images(self, counts: list[int]) -> None:
        with tempfile.TemporaryDirectory() as root:
            for label, n in enumerate(counts):
                for i in range(n):
                    put(Path(root) / f"class{label}" / f"{i}.png", noise(i, 8, 8))
            data = Folder(dir=Path(root))
            if min(counts) < 5:
                with pytest.raises(DataError, match=r"class\d has 4 images, expected 5"):
                    data.load("test")
            else:
                parts = data.load("train").y, data.load("test").y
                assert [len(set(y.tolist())) for y in parts] == [len(counts)] * 2
                assert len(parts[1]) == math.ceil(sum(counts) / 5)

    def test_images_of_two_sizes_are_refused_with_the_way_out(self, tmp_path: Path) -> None:
        odd = put(sorted_folder(tmp_path) / "test" / "dog" / "9.png", noise(0, 10, 12))
        first = tmp_path / "train" / "cat" / "0.png"
        with pytest.raises(DataError) as told:
            Folder(dir=tmp_path).load("train")
        assert f"{odd} is 12 x 10 px, {first} is 8 x 8" in str(told.value)
        assert "--set data.size=32" in str(told.value)
        for split, n in (("train", 4), ("test", 5)):
            assert Folder(dir=tmp_path, size=16).load(split).x.shape == (n, 1, 16, 16)

    def test_images_that_are_not_square_are_refused_with_the_way_out(self, tmp_path: Path) -> None:
        sorted_folder(tmp_path, shape=(8, 10))
        with pytest.raises(DataError, match=r"0\.png is 10 x 8 px.*--set data\.size"):
            Folder(dir=tmp_path).load("train")

    def test_resizing_keeps_the_centre_square(self, tmp_path: Path) -> None:
        wide = np.zeros((16, 32), np.uint8)
        wide[:, 8:24] = 200
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                put(tmp_path / split / name / "0.png", wide)
        assert (Folder(dir=tmp_path, size=8).load("train").x == 200).all()

    @few
    @given(cut=st.floats(0, 1))
    def test_a_truncated_image_is_refused_by_name(self, cut: float) -> None:
        with tempfile.TemporaryDirectory() as root:
            path = sorted_folder(Path(root)) / "train" / "dog" / "1.png"
            whole = path.read_bytes()
            path.write_bytes(whole[: int(cut * (len(whole) - 40))])  # the last 40 hold no pixels
            with pytest.raises(DataError, match=r"dog.1\.png: cannot be read as an image"):
                Folder(dir=Path(root)).load("train")

    @settings(deadline=None, max_examples=40)
    @given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
    def test_a_changed_byte_never_escapes_as_another_error(self, place: float, byte: int) -> None:
        with tempfile.TemporaryDirectory() as root:
            path = sorted_folder(Path(root), n=1) / "train" / "dog" / "0.png"
            whole = bytearray(path.read_bytes())
            whole[int(place * len(whole))] = byte
            path.write_bytes(whole)
            with contextlib.suppress(DataError):
                assert Folder(dir=Path(root)).load("train").x.shape[2:] == (8, 8)

    def test_float_images_are_taken_as_they_are(self, tmp_path: Path) -> None:
        x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        put(sorted_folder(tmp_path) / "train" / "cat" / "9.tiff", x)
        images = Folder(dir=tmp_path).load("train")
        assert images.x.shape == (5, 1, 8, 8)
        np.testing.assert_array_equal(images.x[2, 0].numpy(), x)
        np.testing.assert_array_equal(images.x[0, 0].numpy(), noise(1, 8, 8).astype("f4") / 255)
        assert Folder(dir=tmp_path, size=16).load("train").x.max() <= 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01])
    @pytest.mark.parametrize("size", [None, 16])
    def test_float_pixels_that_are_none_are_refused_by_name(
        self, tmp_path: Path, value: float, size: int | None
    ) -> None:
        x = np.full((8, 8), 0.5, np.float32)
        x[3, 4] = value
        put(sorted_folder(tmp_path) / "train" / "cat" / "9.tiff", x)
        with pytest.raises(DataError, match=r"9\.tiff: float pixels"):
            Folder(dir=tmp_path, size=size).load("train")

    @pytest.mark.parametrize("ending", ["png", "tiff"])
    def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(
        self, tmp_path: Path, ending: str
    ) -> None:
        wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
        put(sorted_folder(tmp_path) / "train" / "cat" / f"9.{ending}", wide)
        x = Folder(dir=tmp_path).load("train").x
        assert x.shape == (5, 1, 8, 8)
        np.testing.assert_allclose(x[2, 0].numpy(), wide / 65535, rtol=1e-6)

    def test_an_empty_class_folder_is_refused_by_name(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            (sorted_folder(tmp_path) / split / "emu").mkdir()
        with pytest.raises(DataError, match=r"train: no images of the classes emu.*Put images"):
            Folder(dir=tmp_path).load("train")

    def test_train_and_test_must_have_the_same_classes(self, tmp_path: Path) -> None:
        put(sorted_folder(tmp_path) / "test" / "emu" / "0.png", noise(0, 8, 8))
        data = Folder(dir=tmp_path)
        for read in (lambda: data.n_classes, lambda: data.load("train")):
            with pytest.raises(DataError, match="only test has emu"):
                read()

    def test_a_train_folder_alone_is_refused_with_the_way_out(self, tmp_path: Path) -> None:
        shutil.rmtree(sorted_folder(tmp_path) / "test")
        with pytest.raises(DataError, match=r"no test folder.*--data-dir .*train: a fifth"):
            Folder(dir=tmp_path).load("train")

    @pytest.mark.parametrize("make", [False, True])
    def test_a_folder_without_classes_is_refused_by_name(self, tmp_path: Path, make: bool) -> None:
        root = tmp_path / "pictures"
        if make:
            (root / "cat").mkdir(parents=True)
        with pytest.raises(DataError, match=rf"pictures: .*got {int(make)}; pass --data-dir"):
            Folder(dir=root).load("train")

    def test_images_too_small_for_the_networks_are_refused(self, tmp_path: Path) -> None:
        sorted_folder(tmp_path, shape=(4, 4))
        with pytest.raises(DataError, match="4 px"):
            Folder(dir=tmp_path).load("train")
