"""A folder of images is read as a careful person would, or refused; what is left out is said."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import process
from folder_lines import counts, said
from forked import forked
from imagefolders import image, split_folder
from PIL import Image

from jemkit.data import OffersValidation
from jemkit.errors import DataError
from jemkit.splits import Splits
from jemkit_plugins.folder import Folder
from jemkit_plugins.folder.layout import role_of


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

    def test_a_plain_folder_is_logged_once_in_a_process(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        line = said(caplog, split_folder(tmp_path))
        assert line.endswith("2 classes (cat, dog), 4 images to train on, 4 to test")
        Folder(dir=tmp_path).load("train")
        assert len(caplog.records) == 1


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
