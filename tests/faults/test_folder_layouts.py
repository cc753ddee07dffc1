"""Folders of any layout are read as a careful person would read them, or refused by name."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagefolders import image

from jemkit.errors import DataError
from jemkit_plugins.folder import Folder
from jemkit_plugins.folder.layout import is_image
from jemkit_plugins.folder.listing import listing

TRAINS = ("train", "Train", "TRAIN", "training", "Training", "training_set", "trainset", "trn")
TESTS = ("test", "Test", "TEST", "testing", "Testing", "test_set", "testset", "tst")
VALIDS = ("valid", "val", "Validation", "dev", "val_set")
CLASSES = ("cat", "dog", "fox", "[red]", "a b", "1", "10", "a station", "\u00e9t\u00e9", "x.png")
ENDINGS = (".png", ".PNG", ".jpg", ".jpeg", ".gif", ".bmp", ".jfif", ".tiff", ".webp")


class Tree(NamedTuple):
    """A folder as it was made, and what a careful person would count in it."""

    root: Path
    images: dict[str, Counter[str]]  # of each split, how many of each class; "" is not divided
    left_out: int
    refused: bool  # whether there is something that nobody can decide


@st.composite
def trees(draw: st.DrawFn, root: Path) -> Tree:
    """Splits and classes of usual names, with what lies about in folders."""
    classes = draw(st.lists(st.sampled_from(CLASSES), min_size=2, max_size=3, unique=True))
    valid = draw(st.booleans())
    named = {"train": draw(st.sampled_from(TRAINS)), "test": draw(st.sampled_from(TESTS))}
    named |= {"valid": draw(st.sampled_from(VALIDS))} if valid else {}
    splits = draw(st.sampled_from([named, {"": ""}]))
    images = {split: Counter[str]() for split in splits}
    fewest = 5 if "" in splits else 1
    serial = 0
    for split, folder in splits.items():
        for name in classes:
            for _ in range(draw(st.integers(fewest, fewest + 2))):
                serial += 1
                end = draw(st.sampled_from(ENDINGS))
                image(root / folder / name / f"{serial}{end}", serial)
                images[split][name] += 1
    tree = Tree(root, images, 0, False)
    for i in range(draw(st.integers(0, 4))):
        what = draw(st.sampled_from(sorted(LITTER)))
        split = draw(st.sampled_from(sorted(splits)))
        name = draw(st.sampled_from(classes))
        tree = LITTER[what](tree, Place(split, root / splits[split], name, i))
    return tree


class Place(NamedTuple):
    """Where something is put."""

    split: str
    at: Path  # the split's folder
    name: str  # of a class
    i: int


Litter = Callable[[Tree, Place], Tree]


def counted(tree: Tree, split: str, name: str) -> Tree:
    tree.images[split][name] += 1
    return tree


def left(tree: Tree) -> Tree:
    return tree._replace(left_out=tree.left_out + 1)


def hidden_folder(tree: Tree, to: Place) -> Tree:
    image(to.at / to.name / (".thumbnails", "@eaDir", ".git")[to.i % 3] / f"h{to.i}.png")
    return left(tree)


def hidden_class(tree: Tree, to: Place) -> Tree:
    image(to.at / (".cache", "__MACOSX", "lost+found")[to.i % 3] / to.name / f"h{to.i}.png")
    return left(tree)


def hidden_file(tree: Tree, to: Place) -> Tree:
    (to.at / to.name / f"._{to.i}.png").write_bytes(b"\0\5\x16\7")
    return left(tree)


def text(tree: Tree, to: Place) -> Tree:
    place = (to.at / to.name, to.at, tree.root)[to.i % 3]
    (place / f"note{to.i}{('.txt', '.heic', '', '.png.part')[to.i % 4]}").write_text("x")
    return left(tree)


def stray(tree: Tree, to: Place) -> Tree:
    image((to.at, tree.root)[to.i % 2] / f"stray{to.i}.png")
    return left(tree)


def nested(tree: Tree, to: Place) -> Tree:
    image(to.at / to.name / "more" / f"deep{to.i}.png", 1000 + to.i)
    return counted(tree, to.split, to.name)


def linked(tree: Tree, to: Place) -> Tree:
    store = tree.root.parent / "store"
    (to.at / to.name / f"linked{to.i}.png").symlink_to(image(store / f"{to.i}.png", 2000 + to.i))
    return counted(tree, to.split, to.name)


def again(tree: Tree, to: Place) -> Tree:
    first = min(p for p in (to.at / to.name).iterdir() if p.is_file() and p.stem.isdigit())
    (os.link, os.symlink)[to.i % 2](first, to.at / to.name / f"again{to.i}.png")
    return left(tree)


def shared(tree: Tree, to: Place) -> Tree:
    other = max(p.name for p in to.at.iterdir() if p.name in CLASSES and p.name != to.name)
    first = min(p for p in (to.at / other).iterdir() if p.is_file() and p.stem.isdigit())
    (os.link, os.symlink)[to.i % 2](first, to.at / to.name / f"shared{to.i}.png")
    return tree._replace(refused=True)


def loop(tree: Tree, to: Place) -> Tree:
    (to.at / to.name / f"loop{to.i}").symlink_to(
        (to.at / to.name, to.at, tree.root, tree.root.parent)[to.i % 4]
    )
    return left(tree)


def dangling(tree: Tree, to: Place) -> Tree:
    (to.at / to.name / f"gone{to.i}.png").symlink_to(f"nowhere{to.i}.png")
    return left(tree)


def circle(tree: Tree, to: Place) -> Tree:
    (to.at / to.name / f"circle{to.i}.png").symlink_to(f"circle{to.i}.png")
    return left(tree)


def fifo(tree: Tree, to: Place) -> Tree:
    os.mkfifo((to.at / to.name, to.at, tree.root)[to.i % 3] / f"fifo{to.i}.png")
    return left(tree)


def device(tree: Tree, to: Place) -> Tree:
    (to.at / to.name / f"zero{to.i}.png").symlink_to("/dev/zero")
    return left(tree)


def damaged(tree: Tree, to: Place) -> Tree:
    (to.at / to.name / f"bad{to.i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" * to.i)
    return tree._replace(refused=True)


def empty_class(tree: Tree, to: Place) -> Tree:
    (to.at / f"nothing{to.i}").mkdir()
    return tree._replace(refused=True)


def unlabelled(tree: Tree, to: Place) -> Tree:
    image(tree.root / "unlabelled" / f"u{to.i}.png")
    if "" in tree.images:  # beside classes it would be one of too few images
        return tree._replace(refused=True)
    return left(tree)


LITTER: dict[str, Litter] = {
    f.__name__: f
    for f in (
        hidden_folder, hidden_class, hidden_file, text, stray, nested, linked, again, shared, loop,
        dangling, circle, fifo, device, damaged, empty_class, unlabelled,
    )
}  # fmt: skip


def by_class(data: Folder, split: str) -> Counter[str]:
    y = data.load(split).y.tolist()  # type: ignore[arg-type]
    return Counter(data.class_names[label] for label in y)


def all_files(root: Path) -> int:
    """Files, links and the like below a folder, none of them followed."""
    return sum(
        len(files) + sum(Path(at, name).is_symlink() for name in folders)
        for at, folders, files in os.walk(root)
    )


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_image_is_counted_once_by_its_class_or_the_folder_is_refused(
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        tree = data.draw(trees(Path(temporary).resolve() / "data"))
        folder = Folder(dir=tree.root)
        if tree.refused:
            with pytest.raises(DataError, match=str(tree.root)):
                folder.load("train")
            return
        parts = ("train", "test") if "valid" not in tree.images else ("train", "valid", "test")
        if "" in tree.images:
            assert sum((by_class(folder, p) for p in parts), Counter()) == tree.images[""]
        else:
            assert {p: by_class(folder, p) for p in ("train", "test")} == {
                p: tree.images[p] for p in ("train", "test")
            }
            valid = folder.validation()
            assert (valid is not None) == ("valid" in tree.images)
            assert valid is None or len(valid.y) == tree.images["valid"].total()
        assert sum(listing(tree.root).left_out.values()) == tree.left_out
        read = sum(counter.total() for counter in tree.images.values())
        assert read + tree.left_out == all_files(tree.root)


POOL = (
    "train", "Train", "test", "TEST", "valid", "val", "cat", "dog", "Cat", "images", "more",
    ".hidden", "@eaDir", "train_set", "data",
)  # fmt: skip
FILES = ("a.png", "b.PNG", "c.gif", "d.txt", ".e.png", "noend")


@st.composite
def wild(draw: st.DrawFn, root: Path) -> Path:
    """Files, folders and links under names that mean something, anywhere."""
    names = st.lists(st.sampled_from(POOL), min_size=0, max_size=3)
    places = [root]
    for i in range(draw(st.integers(1, 14))):
        place = root.joinpath(*draw(names))
        path = place / f"{i}{draw(st.sampled_from(FILES))}"
        place.mkdir(parents=True, exist_ok=True)
        places.append(place)
        kind = draw(st.sampled_from(["image", "image", "image", "image", "link", "hard", "fifo"]))
        known = sorted(p for p in root.rglob("*.png") if p.is_file() and not p.is_symlink())
        if kind == "link":
            path.symlink_to(draw(st.sampled_from([*places, *known])))
        elif kind == "hard" and known:
            os.link(draw(st.sampled_from(known)), path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif is_image(path.name):
            image(path, i)
        else:
            path.write_text("x")
    return root


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_lies_in_a_folder_no_image_counts_twice_and_no_file_is_lost(
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = data.draw(wild(Path(temporary).resolve() / "data"))
        folder = Folder(dir=root)
        refusal = ""
        try:
            images = folder.load("train")
        except DataError as error:
            refusal = str(error)
        if refusal:
            assert str(root) in refusal
            return
        files = {split: folder.files(split) for split in ("train", "valid", "test")}  # type: ignore[arg-type]
        names = folder.class_names
        read = [name for part in files.values() for name in part]
        stats = [os.stat(root / name) for name in read]
        assert len({(s.st_dev, s.st_ino) for s in stats}) == len(read)
        for name, label in zip(files["train"], images.y.tolist(), strict=True):
            assert names[label] in Path(name).parts
            assert not any(part.startswith((".", "@")) for part in Path(name).parts)
        left_out = sum(listing(root).left_out.values())
        linked = [p for p in root.rglob("*") if p.is_symlink() and p.is_dir()]
        if not linked:
            assert len(read) + left_out == all_files(root)
        assert len(read) + left_out >= all_files(root) - len(linked)
