"""Which folders of a directory are classes, and which are splits."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from jemkit import DataError

Role = Literal["train", "valid", "test"]

WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout"), "test"),
}
"""Usual names of splits."""

FILLERS = frozenset(
    (
        "set", "sets", "data", "dataset", "split", "splits", "image", "images", "img", "imgs",
        "picture", "pictures", "pics", "photo", "photos", "sample", "samples", "folder", "dir",
        "seg", "final", "clean", "cropped", "resized", "part", "subset",
    )
)  # fmt: skip
"""Words in a split's folder name that do not change its meaning."""

HIDDEN = frozenset(
    name.casefold()
    for name in (
        "@eaDir", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "__pycache__", "lost+found",
        "$RECYCLE.BIN", "System Volume Information", "Network Trash Folder", "Thumbs.db",
        "ehthumbs.db", "desktop.ini", "Icon\r",
    )
)  # fmt: skip
"""Files and folders that operating systems create; names that begin with a dot are hidden, too."""

ENDINGS = frozenset(
    f".{ending}"
    for ending in (
        "png", "apng", "jpg", "jpeg", "jpe", "jfif", "bmp", "dib", "gif", "tif", "tiff", "webp",
        "avif", "avifs", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "tga", "pcx",
    )
)  # fmt: skip
"""File extensions that are read, in any case."""


class Layout(NamedTuple):
    """The layout of a data set: where its classes are."""

    root: Path
    classes: list[str]
    splits: dict[Role, Path]  # no test: a part of `train` is held out
    note: str  # decisions that a user might not expect


def hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in HIDDEN


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS


def shown(name: object) -> str:
    """A name or path as printable text."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def listed(names: Iterable[str], most: int = 8) -> str:
    """A list of names as text, shortened in the middle if long."""
    each = [shown(name) for name in names]
    if len(each) > most:
        each = [*each[: most - 2], "...", each[-1]]
    return ", ".join(each)


def role_of(name: str) -> Role | None:
    """The split that a folder's name means: `Train`, `test_set`, `seg_test`, `X_train`."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+", name)
    roles: list[Role] = []
    for word in (word.lower() for word in words):
        stem = re.sub(r"(set|data|images|imgs|split|dir|folder)$", "", word) or word
        if stem in WORDS:
            roles.append(WORDS[stem])
        elif word not in FILLERS and len(word) > 1:
            return None
    letters = all(c.isalnum() or c in " _-.()" for c in name)
    return roles[0] if len(roles) == 1 and letters else None


def folders(path: Path) -> list[str]:
    """The visible folders in a folder, without links to it or to a folder above it."""
    above = {path.resolve(), *path.resolve().parents}
    return sorted(
        entry.name
        for entry in scanned(path)
        if not hidden(entry.name) and is_folder(entry) and not _leads_up(entry, above)
    )


def _leads_up(entry: "os.DirEntry[str]", above: set[Path]) -> bool:
    return entry.is_symlink() and Path(entry.path).resolve() in above


def is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def scanned(path: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}") from None


def holds_images(path: Path) -> bool:
    """Whether images are directly in a folder."""
    return any(
        is_image(entry.name) and not hidden(entry.name) and not is_folder(entry)
        for entry in scanned(path)
    )


def layout(root: Path) -> Layout:
    """The layout of a data set's folder; ambiguous layouts are rejected."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        _refuse(root, f"{what}; {WANTED}, got 0; {WHERE}")
    names = folders(root)
    roles = {name: role for name in names if (role := role_of(name)) is not None}
    nested = [name for name in roles if folders(_inner(root / name))]
    if nested:
        return _of_splits(root, names, roles, nested)
    _check_flat_splits(root, roles, len(names))
    if len(names) < 2:
        _refuse(root, f"{WANTED}, got {len(names)}; {_hint(root, names)}")
    _check_classes(root, names)
    return Layout(root, names, {"train": root}, "")


WANTED = "expected two or more class folders, in it or in its train and test"
WHERE = "pass --data-dir DIR with their location"


def _hint(root: Path, names: list[str]) -> str:
    if len(names) == 1 and len(folders(root / names[0])) > 1:
        return f"they seem to be one level deeper: pass --data-dir {shown(root / names[0])}"
    return WHERE


def _inner(path: Path) -> Path:
    """The split inside a folder of the same name: some archives unpack to `train/train`."""
    inside = folders(path)
    while len(inside) == 1 and role_of(inside[0]) == role_of(path.name) and not holds_images(path):
        path = path / inside[0]
        inside = folders(path)
    return path


def _check_flat_splits(root: Path, roles: dict[str, Role], n_folders: int) -> None:
    """Reject images directly inside splits; among other classes, train or valid may be a class."""
    flat = sorted(roles)
    if not any(holds_images(root / name) for name in flat):
        return
    if len(flat) == 1 and n_folders > 1 and flat[0].lower() in ("train", "valid"):
        return
    _refuse(
        root,
        f"{listed(flat)} hold{'s' if len(flat) == 1 else ''} no class folders: if these are "
        f"splits, sort their images into one folder per class; if one of them is a class, rename "
        f"it, for example to class-NAME",
    )


def _check_classes(root: Path, names: list[str]) -> None:
    """Reject folders that look like splits of unknown names, or like splits inside classes."""
    inside = {name: folders(root / name) for name in names}
    for name, below in inside.items():
        roles = {role_of(folder) for folder in below} - {None}
        if len(roles) > 1:
            raise DataError(
                f"{shown(root / name)} holds {listed(below)}: expected train and test outside "
                f"the classes, as in train/{shown(name)}; or give --data-dir {shown(root / name)} "
                "if that is a separate data set"
            )
    shared = set.intersection(*map(set, inside.values()))
    if len(shared) > 1 and not any(holds_images(root / name) for name in names):
        _refuse(
            root,
            f"each of {listed(names)} holds {listed(sorted(shared))}: they may be splits or parts "
            "of one data set, or classes. Name splits train and test; give --data-dir "
            f"{shown(root / names[0])} for one of them alone; put the images of a class directly "
            "into its folder",
        )
    _check_case(root, names)


def _check_case(root: Path, names: list[str]) -> None:
    by_plain_name: dict[str, str] = {}
    for name in names:
        other = by_plain_name.setdefault(_plain(name), name)
        if other != name:
            _refuse(
                root,
                f"the class folders {shown(other)} and {shown(name)} differ only in case or in "
                "their Unicode form: merge them, or rename one",
            )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()


def _of_splits(root: Path, names: list[str], roles: dict[str, Role], nested: list[str]) -> Layout:
    by_role: dict[Role, list[str]] = {}
    for name, role in roles.items():
        by_role.setdefault(role, []).append(name)
    for role, several in by_role.items():
        if len(several) > 1:
            _refuse(
                root, f"{listed(several)} all mean {role}: merge them, or move all but one away"
            )
    beside = [name for name in names if name not in roles and _holds_any(root / name)]
    unsorted = [name for name in roles if name not in nested]
    train, test, valid = (by_role.get(role, [""])[0] for role in ("train", "test", "valid"))
    if unsorted:
        _refuse(
            root,
            f"{listed(unsorted)} contain{'s' if len(unsorted) == 1 else ''} no class folders, "
            f"and so no labels, unlike {listed(nested)}: sort the images into one folder per "
            f"class, or move it "
            f"away{f'; --data-dir {shown(root / train)} holds out test images' * bool(train)}",
        )
    if not train:
        _refuse(root, f"{listed(nested)} without train: {WANTED}")
    if not test and not valid:
        more = f", and {listed(beside)} beside it may be classes: then rename train" * bool(beside)
        _refuse(
            root,
            f"{shown(train)} has no test folder next to it{more}. Pass --data-dir "
            f"{shown(root / train)}: a fifth of its images is then held out for testing",
        )
    splits: dict[Role, Path] = {"train": _inner(root / train)}
    note = "" if test else f"{shown(valid)} is the test split, since there is no test folder"
    splits["test"] = _inner(root / (test or valid))
    if test and valid:
        splits["valid"] = _inner(root / valid)
    return Layout(root, _common(root, splits, set(beside)), splits, note)


def _holds_any(path: Path) -> bool:
    """Whether there are images anywhere below a folder."""
    queue = [path]
    while queue:
        at = queue.pop()
        if holds_images(at):
            return True
        queue += [at / name for name in folders(at) if not (at / name).is_symlink()]
    return False


def _refuse(root: Path, why: str) -> NoReturn:
    raise DataError(f"{shown(root)}: {why}")


def _common(root: Path, splits: dict[Role, Path], beside: set[str]) -> list[str]:
    """The class folders, the same in every split."""
    by_role = {role: folders(path) for role, path in splits.items()}
    classes = by_role["train"]
    for role, names in by_role.items():
        if names == classes:
            continue
        only = {"train": set(classes) - set(names), role: set(names) - set(classes)}
        only_in = "; ".join(f"only {k} has {listed(sorted(v))}" for k, v in only.items() if v)
        near = {_plain(n) for n in only["train"]} & {_plain(n) for n in only[role]}
        hint = f" (the same except for case or Unicode form: {listed(sorted(near))})"
        _refuse(
            root,
            f"train and {role} must have the same class folders, but {only_in}"
            f"{hint if near else ''}",
        )
    if len(classes) < 2:
        _refuse(root, f"{WANTED}, got {len(classes)}; {WHERE}")
    if both := sorted(beside & set(classes)):
        _refuse(root, f"{listed(both)} is both inside train and next to it; keep one")
    for path in splits.values():
        _check_classes(path, classes)
    return classes
