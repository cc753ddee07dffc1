"""Data sets hold what they claim; a file that is missing, damaged or unfit is named."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from pydantic import ValidationError
from sorted_images import noise, sorted_folder

from jemkit.config.registry import installed
from jemkit.data import Augmentation, Dataset, NamesClasses, Split
from jemkit.errors import DataError
from jemkit.evaluation.subjects import others_of
from jemkit.runtime.torchvision_compat import torchvision
from jemkit.splits import stratified_parts
from jemkit_plugins.datasets import CIFAR10, CIFAR100, SVHN, Digits, jemkit_datasets
from jemkit_plugins.folder import Folder
from jemkit_plugins.folder import jemkit_datasets as jemkit_folders

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"

few = settings(deadline=None, max_examples=10)


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
        known = (part().n_classes, part.radius_px, part().augmentation)
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
        saved = Digits().load(split)
        assert torch.equal(saved.x, x[index])
        assert torch.equal(saved.y, y[index])

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

    @pytest.mark.parametrize("size", [8, 16])
    def test_a_smaller_image_has_the_means_of_squares(self, small: Path, size: int) -> None:
        whole, reduced = (CIFAR10(dir=small.parent, size=px).load("train") for px in (32, size))
        side = 32 // size
        for row, column in ((0, 0), (size - 1, 3)):
            y, x = (slice(at * side, (at + 1) * side) for at in (row, column))
            mean = whole.x[..., y, x].double().mean((2, 3))
            assert (reduced.x[..., row, column].double() - mean).abs().max() <= 0.5
        assert reduced.x.dtype == torch.uint8
        assert reduced.x.shape == (10, 3, size, size)
        assert torch.equal(reduced.y, whole.y)
        part = CIFAR10(size=size)
        assert (part.shape, part.radius_px) == ((3, size, size), 8)
        assert part.augmentation == Augmentation(pad=size // 8, flip=True)

    @pytest.mark.parametrize("part", [CIFAR10, CIFAR100, SVHN])
    def test_sizes_that_do_not_divide_the_published_one_are_refused(self, part: Any) -> None:
        for size in (4, 20, 64):
            with pytest.raises(ValidationError):
                part(size=size)

    def test_other_sets_in_the_folder_are_reduced_too(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = torchvision().datasets.CIFAR100
        publish(kind, small.parent, monkeypatch, label="fine_labels")
        others = others_of(CIFAR10(dir=small.parent, size=16), installed())()
        assert {name: images.x.shape[-1] for name, images in others.items()} == {"cifar100": 16}

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
        with pytest.raises(DataError) as raised:
            part(dir=tmp_path).load("train")
        assert str(raised.value).startswith(f"{tmp_path / first} is missing")

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

    def test_a_download_is_made_only_where_it_is_requested_and_needed(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = (small / "test_batch").read_bytes()
        requested = []

        def download(url: str, root: Path, filename: str, md5: str) -> None:
            requested.append((url, root, filename, md5))
            (small / "test_batch").write_bytes(whole)

        utils = torchvision().datasets.utils
        monkeypatch.setattr(utils, "download_and_extract_archive", download)
        fetching = CIFAR10(dir=small.parent, download=True)
        fetching.load("test")
        assert requested == []
        (small / "test_batch").write_bytes(whole[:-1])
        fetching.load("test")
        kind = torchvision().datasets.CIFAR10
        assert requested == [(kind.url, small.parent, kind.filename, kind.tgz_md5)]

    def test_a_failed_download_is_reported_with_its_address(
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
