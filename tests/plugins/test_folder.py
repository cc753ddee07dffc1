"""A folder of images is read as a careful person would, or refused; what is left out is said."""

import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import process
from forks import forked
from imagefolders import image, split_folder
from PIL import Image

from jemkit.data import OffersValidation
from jemkit.errors import DataError
from jemkit.splits import Splits
from jemkit_plugins.folder import Folder
from jemkit_plugins.folder.layout import role_of
from jemkit_plugins.folder.listing import listing
from jemkit_plugins.folder.pixels import opened, pixels


def counts(root: Path) -> dict[str, int]:
    return {split: len(Folder(dir=root).load(split).y) for split in ("train", "test")}  # type: ignore[arg-type]


def said(caplog: pytest.LogCaptureFixture, root: Path) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jemkit.data"):
        Folder(dir=root).load("train")
        Folder(dir=root).load("test")
    (line,) = [record.getMessage() for record in caplog.records]
    return line


class TestSplits:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("Training", "Testing"),
            ("training_set", "test_set"), ("trainingSet", "testSet"), ("trainset", "testset"),
            ("TrainSet", "TestSet"), ("train-images", "test-images"), ("trn", "tst"),
            ("seg_train", "seg_test"), ("train2017", "test2017"),
            ("training data", "testing data"), ("train.split", "test.split"), ("Train", "test"),
            ("train", "val"), ("Training", "Validation"), ("train", "valid"), ("train", "dev"),
            ("X_train", "X_test"), ("trainA", "testA"),
        ],
    )  # fmt: skip
    def test_splits_of_any_usual_name_are_splits(
        self, tmp_path: Path, train: str, test: str
    ) -> None:
        root = split_folder(tmp_path, (train, test), ("cat", "dog", "fox"))
        data = Folder(dir=root)
        assert data.class_names == ("cat", "dog", "fox")
        assert all(name.startswith(f"{train}/") for name in data.files("train"))
        assert all(name.startswith(f"{test}/") for name in data.files("test"))

    @pytest.mark.parametrize(
        "name",
        ["train_station", "test_tube", "contest", "trained", "cat", "2017", "te", "tränn"],
    )  # fmt: skip
    def test_names_that_only_contain_such_a_word_are_no_splits(self, name: str) -> None:
        assert role_of(name) is None

    def test_valid_beside_train_and_test_validates(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = Folder(dir=split_folder(tmp_path, ("train", "valid", "test"), n=3))
        assert isinstance(data, OffersValidation)
        splits = Splits(data)
        files = {split: data.files(split) for split in ("train", "valid", "test")}  # type: ignore[arg-type]
        assert [len(splits.images(split).y) for split in files] == [6, 6, 6]  # type: ignore[arg-type]
        valid = splits.images("valid")
        for x, row in zip(valid.x, splits.rows("valid"), strict=True):
            name = files["valid"][row]
            np.testing.assert_array_equal(x[0], np.asarray(Image.open(tmp_path / name)))
        assert "6 to validate, in place of run.valid_fraction" in said(caplog, _moved(tmp_path))

    def test_without_a_test_folder_val_is_the_test_split_and_that_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = split_folder(tmp_path, ("train", "val"))
        assert "val is the test split" in said(caplog, root)
        assert Folder(dir=root).validation() is None

    def test_a_folder_of_the_same_split_inside_it_is_unpacked(self, tmp_path: Path) -> None:
        split_folder(tmp_path / "seg_train", ("seg_train",))
        split_folder(tmp_path / "seg_test", ("seg_test",))
        assert counts(tmp_path) == {"train": 4, "test": 4}

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            (("train", "Train", "test"), "Train, train all mean train"),
            (("train", "test", "val", "valid"), "val, valid all mean valid"),
            (("test",), "test without train"),
            (("test", "valid"), "without train"),
            (("dataset/train", "dataset/test"), r"one level deeper: pass --data-dir .*dataset"),
            (("a/train", "a/test", "b/train", "b/test"), r"a holds test, train"),
            (("fold1", "fold2"), "each of fold1, fold2 holds cat, dog"),
            (("one", "two", "three"), "Name splits train and test"),
        ],
    )
    def test_what_can_be_read_in_two_ways_is_refused(
        self, tmp_path: Path, splits: tuple[str, ...], message: str
    ) -> None:
        data = Folder(dir=split_folder(tmp_path, splits))
        for read in (lambda: data.n_classes, lambda: data.load("train")):
            with pytest.raises(DataError, match=message):
                read()

    @pytest.mark.parametrize("name", ["train", "valid"])
    def test_a_class_among_others_may_be_called_so(self, tmp_path: Path, name: str) -> None:
        root = split_folder(tmp_path, ("",), ("bus", "car", name), n=5)
        assert Folder(dir=root).class_names == ("bus", "car", name)

    @pytest.mark.parametrize("names", [
        ("cat", "dog", "test"), ("test", "train"), ("Train", "val"),
        ("testA", "testB", "trainA", "trainB"),
    ])  # fmt: skip
    def test_images_right_inside_a_split_are_refused(
        self, tmp_path: Path, names: tuple[str, ...]
    ) -> None:
        root = split_folder(tmp_path, ("",), names, n=5)
        with pytest.raises(DataError, match=r"no class folders.*if one of them is a class.*rename"):
            Folder(dir=root).load("train")

    def test_a_test_split_without_labels_is_refused_with_the_way_out(self, tmp_path: Path) -> None:
        split_folder(tmp_path, ("train",), n=5)
        image(tmp_path / "test" / "1.png")
        with pytest.raises(DataError, match=r"test contains no class folders.*--data-dir .*train"):
            Folder(dir=tmp_path).load("train")
        assert counts(tmp_path / "train") == {"train": 8, "test": 2}

    def test_splits_inside_classes_are_refused(self, tmp_path: Path) -> None:
        split_folder(tmp_path, ("cat", "dog"), ("train", "test"))
        with pytest.raises(DataError, match=r"cat holds test, train: expected train and"):
            Folder(dir=tmp_path).load("train")

    def test_classes_that_differ_in_case_are_named(self, tmp_path: Path) -> None:
        split_folder(tmp_path / "a", ("train",), ("Cat", "dog"))
        split_folder(tmp_path / "a", ("test",), ("cat", "dog"))
        with pytest.raises(DataError, match=r"only train has Cat; only test has cat.*except for"):
            Folder(dir=tmp_path / "a").load("train")
        root = split_folder(tmp_path / "b", ("",), ("Cat", "cat", "dog"), n=5)
        with pytest.raises(DataError, match="Cat and cat differ only in case"):
            Folder(dir=root).load("train")

    def test_a_class_that_also_lies_beside_the_splits_is_refused(self, tmp_path: Path) -> None:
        image(split_folder(tmp_path) / "cat" / "0.png")
        with pytest.raises(DataError, match="cat is both inside train and next to it"):
            Folder(dir=tmp_path).load("train")

    def test_a_folder_without_images_beside_classes_is_refused(self, tmp_path: Path) -> None:
        (split_folder(tmp_path, ("",), n=5) / "annotations").mkdir()
        (tmp_path / "annotations" / "a.xml").write_text("<a/>")
        with pytest.raises(DataError, match="no images of the classes annotations"):
            Folder(dir=tmp_path).load("train")


def _moved(root: Path) -> Path:
    """The same folder elsewhere: what was said of it once is said again."""
    there = root.with_name(f"{root.name}-moved")
    shutil.copytree(root, there)
    return there


class TestLeftOut:
    @pytest.mark.parametrize(
        "name",
        [".ipynb_checkpoints/a.png", ".thumbnails/a.png", "@eaDir/a.png", "__MACOSX/._a.png",
         "._a.png", ".a.png", "lost+found/a.png", "$RECYCLE.BIN/a.png", "Thumbnails/a.png"],
    )  # fmt: skip
    def test_what_is_hidden_inside_a_class_is_no_data(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        image(split_folder(tmp_path) / "train" / "cat" / name)
        assert counts(tmp_path) == {"train": 4, "test": 4}
        assert "ignored: hidden 1" in said(caplog, _moved(tmp_path))

    def test_all_that_is_left_out_is_counted_by_why(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cat = split_folder(tmp_path) / "train" / "cat"
        image(tmp_path / "extra" / "deep" / "x.png")
        image(tmp_path / "train" / "stray.png")
        for name in ("a.txt", "b.TXT", "c.heic", "none"):
            (cat / name).write_text("x")
        (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
        (cat / "again.png").symlink_to(cat / "0.png")
        (cat / "up").symlink_to(tmp_path)
        os.mkfifo(cat / "fifo.png")
        line = said(caplog, tmp_path)
        assert line.count("\n") == 0
        for part in (".txt 2", ".heic 1", "without an extension 1", "broken links 1",
                     "or to one that is read already 1", "further names of one file 1",
                     "not regular files 1", "in no class folder 1",
                     "beside the class folders 1"):  # fmt: skip
            assert part in line
        assert "2 classes (cat, dog), 4 images to train on, 4 to test" in line

    @pytest.mark.parametrize(
        "name", ["a.PNG", "a.gif", "a.GIF", "a.jfif", "a.jpe", "a.JPG", "a.jpeg", "a.bmp", "a.dib",
                 "a.tif", "a.TIFF", "a.webp", "a.ppm", "a.pgm", "a.tga"],
    )  # fmt: skip
    def test_every_usual_kind_of_image_is_read(self, tmp_path: Path, name: str) -> None:
        image(split_folder(tmp_path) / "train" / "cat" / name)
        assert f"train/cat/{name}" in Folder(dir=tmp_path).files("train")
        assert counts(tmp_path)["train"] == 5

    def test_images_of_a_class_may_lie_in_folders(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        image(split_folder(tmp_path) / "train" / "cat" / "siamese" / "x.png")
        assert "5 images to train on" in (line := said(caplog, tmp_path))
        assert "1 of them in folders inside a class" in line

    def test_a_program_is_never_run_to_read_an_image(self, tmp_path: Path) -> None:
        path = split_folder(tmp_path) / "train" / "cat" / "a.png"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
        with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
            Folder(dir=tmp_path).load("train")

    def test_numbers_that_sort_as_text_are_said_to(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = split_folder(tmp_path, classes=("1", "2", "10"))
        assert "labels follow the names in text order" in said(caplog, root)
        assert Folder(dir=root).class_names == ("1", "10", "2")

    def test_a_folder_that_is_plain_is_told_once_in_a_process(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        line = said(caplog, split_folder(tmp_path))
        assert line.endswith("2 classes (cat, dog), 4 images to train on, 4 to test")
        Folder(dir=tmp_path).load("train")
        assert len(caplog.records) == 1


class TestLinks:
    def test_images_and_folders_that_lie_elsewhere_may_be_linked(self, tmp_path: Path) -> None:
        store = split_folder(tmp_path / "store")
        root = tmp_path / "data"
        for split in ("train", "test"):
            (root / split / "cat").mkdir(parents=True)
            (root / split / "dog").symlink_to(store / split / "dog")
            for i in range(2):
                (root / split / "cat" / f"{i}.png").symlink_to(store / split / "cat" / f"{i}.png")
        assert counts(root) == {"train": 4, "test": 4}

    @pytest.mark.parametrize("place", ["up", "train/up", "train/cat/up", "test/dog/up"])
    @pytest.mark.parametrize("target", [".", "train", "train/cat", ".."])
    def test_a_link_to_a_folder_above_adds_no_image(
        self, tmp_path: Path, place: str, target: str
    ) -> None:
        root = split_folder(tmp_path / "data")
        (root / place).symlink_to(root / target)
        with suppress(DataError):  # one that makes a class or a split ambiguous
            assert counts(root) == {"train": 4, "test": 4}

    @pytest.mark.parametrize("hard", [True, False])
    @pytest.mark.parametrize("place", ["test/cat", "train/dog"])
    def test_one_file_in_two_splits_or_classes_is_refused_by_both_names(
        self, tmp_path: Path, hard: bool, place: str
    ) -> None:
        first = split_folder(tmp_path) / "train" / "cat" / "0.png"
        second = tmp_path / place / "again.png"
        if hard:
            os.link(first, second)
        else:
            second.symlink_to(first)
        with pytest.raises(DataError, match="are the same file, in two classes or") as error:
            Folder(dir=tmp_path).load("train")
        assert str(first) in str(error.value)
        assert str(second) in str(error.value)

    def test_a_split_that_is_another_one_is_refused(self, tmp_path: Path) -> None:
        split_folder(tmp_path, ("train",))
        (tmp_path / "test").symlink_to("train")
        with pytest.raises(DataError, match="are the same file, in two"):
            Folder(dir=tmp_path).load("train")

    def test_a_web_of_links_is_walked_once(self, tmp_path: Path) -> None:
        cat = split_folder(tmp_path) / "train" / "cat"
        rooms = [cat / f"room{i}" for i in range(12)]
        for i, room in enumerate(rooms):
            image(room / f"{i}.png", 100 + i)
        for room in rooms:
            for other in rooms:
                (room / f"to-{other.name}").symlink_to(other)
        assert counts(tmp_path)["train"] == 16


class TestSpecialFiles:
    @pytest.mark.parametrize("place", ["", "train", "train/cat", ".hidden"])
    @pytest.mark.parametrize("kind", ["fifo", "socket", "zero", "tty"])
    @pytest.mark.parametrize("name", ["x.png", "test2.txt"])
    def test_they_are_never_opened(
        self, tmp_path: Path, place: str, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = split_folder(tmp_path) / place / name
        path.parent.mkdir(exist_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
        else:
            path.symlink_to(f"/dev/{kind}")
        assert counts(tmp_path) == {"train": 4, "test": 4}
        assert sum(listing(tmp_path).left_out.values()) == 1

    def test_one_that_comes_in_place_of_an_image_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x.png")
        with pytest.raises(DataError, match="not a regular file"), opened(str(tmp_path / "x.png")):
            pass

    def test_a_data_folder_that_is_none_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "data")
        for path in (tmp_path / "data", Path("/dev/zero")):
            with pytest.raises(DataError, match="is not a folder"):
                Folder(dir=path).load("train")


class TestPixels:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_images_are_upright_as_their_exif_says(self, tmp_path: Path, orientation: int) -> None:
        grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / "a.png"
        Image.fromarray(grey).save(path, exif=exif)
        turned = {
            1: grey, 2: grey[:, ::-1], 3: grey[::-1, ::-1], 4: grey[::-1], 5: grey.T,
            6: np.rot90(grey, -1), 7: np.rot90(grey, 2).T, 8: np.rot90(grey),
        }  # fmt: skip
        np.testing.assert_array_equal(
            pixels(str(path), grey=True, size=None)[0], turned[orientation]
        )

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
    @pytest.mark.parametrize("alpha", [0, 102, 255])
    def test_transparent_images_are_laid_on_white(
        self, tmp_path: Path, mode: str, alpha: int
    ) -> None:
        path = tmp_path / "a.png"
        Image.new("RGBA", (8, 8), (50, 50, 50, alpha)).convert(
            "LA" if mode == "LA" else "RGBA"
        ).save(path)
        found = pixels(str(path), grey=False, size=None)
        assert found.shape == (3, 8, 8)
        assert (found.int() - (255 - (255 - 50) * alpha // 255)).abs().max() <= 1

    def test_a_palette_may_have_a_transparent_colour(self, tmp_path: Path) -> None:
        picture = Image.new("P", (8, 8), 1)
        picture.putpalette([0, 0, 0, 200, 0, 0])
        picture.putpixel((0, 0), 0)
        picture.save(tmp_path / "a.png", transparency=1)
        found = pixels(str(tmp_path / "a.png"), grey=False, size=None)
        assert found[:, 0, 0].tolist() == [0, 0, 0]
        assert found[:, 1, 1].tolist() == [255, 255, 255]

    def test_how_images_are_read_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cat = split_folder(tmp_path) / "train" / "cat"
        image(cat / "clear.png", mode="RGBA")
        frames = [Image.new("L", (8, 8), value) for value in (0, 200)]
        frames[0].save(cat / "moving.gif", save_all=True, append_images=frames[1:])
        line = said(caplog, tmp_path)
        assert "1 with transparency, blended with white" in line
        assert "1 with several frames, of which the first is read" in line
        x = Folder(dir=tmp_path).load("train").x
        assert (x[3] == 0).all()

    def test_other_colour_spaces_are_converted(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
        Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
        for name in ("a.jpg", "b.png"):
            found = pixels(str(tmp_path / name), grey=False, size=None)
            assert (found == 255).all()

    def test_an_image_of_too_many_pixels_is_refused_without_decoding_it(
        self, tmp_path: Path
    ) -> None:
        path = split_folder(tmp_path) / "train" / "cat" / "a.ppm"
        path.write_bytes(b"P5 30000 30000 255\n")
        with pytest.raises(DataError, match=r"a\.ppm: .*too many pixels"):
            Folder(dir=tmp_path, size=8).load("train")

    def test_images_larger_than_the_networks_are_refused_before_any_is_decoded(
        self, tmp_path: Path
    ) -> None:
        split_folder(tmp_path)
        for path in tmp_path.rglob("*.png"):
            image(path, size=224)
        with pytest.raises(DataError, match=r"224 x 224 px.*--set data\.size=64"):
            Folder(dir=tmp_path).load("train")
        assert Folder(dir=tmp_path, size=64).load("train").x.shape[-1] == 64


def test_a_folder_that_is_not_there_is_a_fault_of_the_data(tmp_path: Path) -> None:
    train = ("train", "--dataset", "folder", "--data-dir", str(tmp_path / "gone"), "--dry-run")
    done = forked(*train, cwd=tmp_path)
    assert done.code == DataError.exit_code
    assert "gone: does not exist" in done.err
    assert "Traceback" not in done.err


def test_a_command_shows_how_many_images_the_folder_has(tmp_path: Path) -> None:
    root = split_folder(tmp_path / "data", n=30)
    image(root / "train" / "cat" / ".hidden" / "x.png")
    train = ("train", "--dataset", "folder", "--data-dir", str(root), "--backbone", "classifier",
             "--objective", "ce", "--network", "mlp", "--dry-run", "--out", "run")  # fmt: skip
    done = process(*train, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("60 images to train on, 60 to test; ignored: hidden 1") == 1
    assert not (tmp_path / "run").exists()
    assert torch.is_tensor(Folder(dir=root).load("train").x)
