"""Every file below a directory: the images of each split and class, and the ignored files."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jemkit import DataError
from jemkit_plugins.folder.layout import (
    Layout,
    Role,
    hidden,
    is_folder,
    is_image,
    layout,
    scanned,
    shown,
)

Sample = tuple[str, int]  # an image file and its label
Group = tuple[Role, int]  # a split's folder and a class
Identity = tuple[int, int] | str  # identity of a file, whatever its name

HIDDEN, UNSORTED, BESIDE = "hidden", "in no class folder", "beside the class folders"
BROKEN, LOOP = "broken links", "links to a folder above or to one that is read already"
AGAIN, SPECIAL = "further names of one file", "not regular files"
THUMBNAILS = frozenset(("thumbs", "thumbnails", "_thumbs", "_thumbnails"))


class Listing(NamedTuple):
    """The files below a directory; each is an image of one split, or ignored."""

    layout: Layout
    images: dict[Role, list[Sample]]
    left_out: Counter[str]  # number of files by reason
    nested: int  # images in a folder inside a class


def listing(root: Path) -> Listing:
    """List every file once; no file is opened."""
    ordered = layout(root)
    walk = _Walk(ordered)
    walk.run()
    images = {role: walk.samples(role) for role in ordered.splits}
    for role, samples in images.items():
        labels = {label for _, label in samples}
        empty = [name for label, name in enumerate(ordered.classes) if label not in labels]
        if empty:
            names = ", ".join(map(shown, empty[:5]))
            raise DataError(
                f"{shown(ordered.splits[role])}: no images of the classes {names}. Put images "
                "there, or remove the folder"
            )
    return Listing(ordered, images, walk.left_out, walk.nested)


class _Folder(NamedTuple):
    """A folder to be listed."""

    path: str
    group: Group | None  # None: above or beside the class folders
    real: Path
    jumps: tuple[Path, ...] = ()  # folders on the path here that were reached by links
    deep: bool = False  # inside a class folder
    why: str = ""  # everything below is ignored


class _Walk:
    """Real files come before links, so that a second name of a file is ignored, not the file."""

    def __init__(self, ordered: Layout) -> None:
        self.groups: dict[str, Group] = {
            os.path.normpath(path / name): (role, label)
            for role, path in ordered.splits.items()
            for label, name in enumerate(ordered.classes)
        }
        self.above = {str(p) for group in self.groups for p in Path(group).parents}
        self.left_out: Counter[str] = Counter()
        self.nested = 0
        self._files: dict[Group, list[tuple[str, str]]] = {g: [] for g in self.groups.values()}
        self._owner: dict[Identity, tuple[Group, str]] = {}
        self._visited: set[tuple[Group | None, Path]] = set()
        self._queue = [_Folder(str(ordered.root), None, ordered.root.resolve())]
        self._links: list[tuple[_Folder, os.DirEntry[str]]] = []

    def run(self) -> None:
        while self._queue or self._links:
            if self._queue:
                self._look(self._queue.pop())
            else:
                links, self._links = self._links, []
                for folder, entry in links:
                    self._follow(folder, entry)

    def samples(self, role: Role) -> list[Sample]:
        """The images of a split, by class, folder and name."""
        return [
            (os.path.join(folder, name), group[1])
            for group in sorted(g for g in self._files if g[0] == role)
            for folder, name in sorted(self._files[group])
        ]

    def _look(self, folder: _Folder) -> None:
        self._visited.add((folder.group, folder.real))
        device = os.stat(folder.path).st_dev
        for entry in sorted(self._entries(folder), key=lambda e: e.name):
            why = folder.why or (HIDDEN if hidden(entry.name) else "")
            if folder.group is not None and entry.name.casefold() in THUMBNAILS:
                why = why or HIDDEN
            if entry.is_dir(follow_symlinks=False):
                self._queue.append(self._below(folder, entry, why))
            elif why:
                self.left_out[why] += 1
            elif entry.is_symlink():
                self._links.append((folder, entry))
            elif entry.is_file(follow_symlinks=False):
                self._take(folder, entry, (device, entry.inode()) if entry.inode() else entry.path)
            else:
                self.left_out[SPECIAL] += 1

    def _entries(self, folder: _Folder) -> "list[os.DirEntry[str]]":
        try:
            return scanned(Path(folder.path))
        except DataError:
            if not folder.why:
                raise
            self.left_out[folder.why] += 1  # a folder without read permission, such as lost+found
            return []

    def _below(self, folder: _Folder, entry: "os.DirEntry[str]", why: str) -> _Folder:
        at = os.path.normpath(entry.path)
        group = folder.group or self.groups.get(at)
        if group is None and not why and at not in self.above:
            why = BESIDE
        deep = folder.group is not None
        real = folder.real / entry.name
        return _Folder(entry.path, group, real, folder.jumps, deep, why)

    def _follow(self, folder: _Folder, entry: "os.DirEntry[str]") -> None:
        try:
            target = os.stat(entry.path)
        except OSError:
            self.left_out[BROKEN] += 1
            return
        if is_folder(entry):
            self._enter(folder, entry)
        elif stat.S_ISREG(target.st_mode):
            same = (target.st_dev, target.st_ino)
            self._take(folder, entry, same if target.st_ino else os.path.realpath(entry.path))
        else:
            self.left_out[SPECIAL] += 1

    def _enter(self, folder: _Folder, entry: "os.DirEntry[str]") -> None:
        """Follow a link to a folder, unless it leads back to a folder on the path."""
        below, real = self._below(folder, entry, ""), Path(os.path.realpath(entry.path))
        way = (*folder.jumps, folder.real)
        read = below.group is not None and (below.group, real) in self._visited
        if below.why or read or any(real == at or real in at.parents for at in way):
            self.left_out[below.why or LOOP] += 1
            return
        self._queue.append(below._replace(real=real, jumps=way))

    def _take(self, folder: _Folder, entry: "os.DirEntry[str]", same: Identity) -> None:
        if not is_image(entry.name):
            ending = os.path.splitext(entry.name)[1].lower()
            self.left_out[shown(ending) if ending else "without an extension"] += 1
        elif folder.group is None:
            self.left_out[UNSORTED] += 1
        elif same not in self._owner:
            self._owner[same] = folder.group, entry.path
            self._files[folder.group].append((folder.path, entry.name))
            self.nested += folder.deep
        elif self._owner[same][0] == folder.group:
            self.left_out[AGAIN] += 1
        else:
            raise DataError(
                f"{shown(self._owner[same][1])} and {shown(entry.path)} are the same file, in "
                f"two classes or splits: remove one of them, or the link"
            )


def sentences(files: Listing) -> Iterator[str]:
    """The decisions about the folder and the ignored files, as text."""
    if files.layout.note:
        yield files.layout.note
    if files.nested:
        yield f"{files.nested} of them in folders inside a class"
    classes = files.layout.classes
    if all(name.isascii() and name.isdigit() for name in classes):
        numbers = sorted(classes, key=int)
        if numbers != classes:
            yield "labels follow the names in text order: 10 comes before 2"
    if files.left_out:
        counts = ", ".join(f"{why} {n}" for why, n in files.left_out.most_common())
        yield f"ignored: {counts}"
