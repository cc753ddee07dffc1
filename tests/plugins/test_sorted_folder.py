"""A folder of images sorted by class: its pixels, labels and cache, and what is refused."""

import contextlib
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sorted_images import noise, put, sorted_folder

from jemkit.errors import DataError
from jemkit_plugins.folder import Folder

few = settings(deadline=None, max_examples=10)


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
        with pytest.raises(DataError) as raised:
            Folder(dir=tmp_path).load("train")
        assert f"{odd} is 12 x 10 px, {first} is 8 x 8" in str(raised.value)
        assert "--set data.size=32" in str(raised.value)
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
