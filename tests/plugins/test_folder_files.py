"""Links, special files and damaged pixels in a folder of images."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from folder_lines import counts, said
from imagefolders import image, split_folder
from PIL import Image

from jemkit.errors import DataError
from jemkit_plugins.folder import Folder
from jemkit_plugins.folder.listing import listing
from jemkit_plugins.folder.pixels import opened, pixels


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
        decoded = pixels(str(path), grey=False, size=None)
        assert decoded.shape == (3, 8, 8)
        assert (decoded.int() - (255 - (255 - 50) * alpha // 255)).abs().max() <= 1

    def test_a_palette_may_have_a_transparent_colour(self, tmp_path: Path) -> None:
        picture = Image.new("P", (8, 8), 1)
        picture.putpalette([0, 0, 0, 200, 0, 0])
        picture.putpixel((0, 0), 0)
        picture.save(tmp_path / "a.png", transparency=1)
        decoded = pixels(str(tmp_path / "a.png"), grey=False, size=None)
        assert decoded[:, 0, 0].tolist() == [0, 0, 0]
        assert decoded[:, 1, 1].tolist() == [255, 255, 255]

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
            decoded = pixels(str(tmp_path / name), grey=False, size=None)
            assert (decoded == 255).all()

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
