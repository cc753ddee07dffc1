"""Folders of image files as a data set."""

import logging
import multiprocessing
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from jemkit import Augmentation, DataError, Dataset, Images, Options, Split, checked, hookimpl
from jemkit.options import SIZES
from jemkit.splits import stratified_parts
from jemkit_plugins.folder.layout import Role, layout, listed, shown
from jemkit_plugins.folder.listing import Listing, Sample, listing, sentences
from jemkit_plugins.folder.pixels import pixels, survey

log = logging.getLogger("jemkit.data")


class Folder(Options):
    """Image files, one folder per class: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*.

    Splits may have any of their usual names. The images of valid/ beside train/ and test/ are the
    validation split. EXIF orientation is applied, and transparent pixels are blended with white.
    """

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation()  # flips may change a class

    dir: Path  # folder of the images
    size: int | None = Field(None, ge=SIZES[0], le=SIZES[1])  # px: centre square, resized

    @property
    def n_classes(self) -> int:
        return len(layout(self.dir).classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the class folders."""
        return tuple(layout(self.dir).classes)

    def files(self, split: Role) -> tuple[str, ...]:
        """The image files of a split below `dir`, in the order of its images."""
        paths = (Path(path) for path, _ in _parts(listing(self.dir))[split])
        return tuple(path.relative_to(self.dir).as_posix() for path in paths)

    def load(self, split: Split) -> Images:
        """All images of a split; greyscale if both splits are. Float pixels must be in [0, 1]."""
        return self._load(split)

    def validation(self) -> Images | None:
        """The images of valid/, if it exists beside train/ and test/."""
        return self._load("valid") if "valid" in layout(self.dir).splits else None

    def _load(self, split: Role) -> Images:
        files = listing(self.dir)
        parts = _parts(files)
        headers = survey([path for part in parts.values() for path, _ in part], self.size)
        _log_contents(files, parts, headers.remarks)
        x = [pixels(path, grey=headers.grey, size=self.size) for path, _ in parts[split]]
        if any(image.is_floating_point() for image in x):
            x = [image if image.is_floating_point() else image / 255 for image in x]
        y = torch.tensor([label for _, label in parts[split]])
        source = f"{split} images in {shown(self.dir)}"
        return checked(Images(torch.stack(x), y), len(files.layout.classes), source)


@hookimpl
def jemkit_datasets() -> Mapping[str, type[Dataset]]:
    return {"folder": Folder}


def _parts(files: Listing) -> dict[Role, list[Sample]]:
    """The image files of each split; without a test folder a fifth is the test split."""
    if "test" in files.images:
        return {"train": files.images["train"], "valid": [], **files.images}
    samples, classes = files.images["train"], files.layout.classes
    label, fewest = Counter(label for _, label in samples).most_common()[-1]
    if fewest < 5:
        raise DataError(
            f"{shown(files.layout.root)}: {shown(classes[label])} has {fewest} images, expected 5 "
            "or more of each class to hold out a fifth for testing; add images, or sort them into "
            "train and test folders"
        )
    parts = stratified_parts(torch.tensor([label for _, label in samples]), test_size=0.2)
    return {
        "valid": [],
        **{split: [samples[i] for i in index.tolist()] for split, index in parts.items()},
    }


def _log_contents(
    files: Listing,
    parts: Mapping[Role, list[Sample]],
    remarks: list[str],
) -> None:
    """Print the contents of the folder and the ignored files, once per process."""
    classes = files.layout.classes
    counts = [f"{len(parts['train'])} images to train on, {len(parts['test'])} to test"]
    if "test" not in files.images:
        counts[0] += " (a fixed fifth of each class)"
    if parts["valid"]:
        counts.append(f"{len(parts['valid'])} to validate, in place of run.valid_fraction")
    contents = "; ".join([", ".join(counts), *sentences(files), *remarks])
    line = f"{shown(files.layout.root)}: {len(classes)} classes ({listed(classes)}), {contents}"
    if multiprocessing.parent_process() is None:
        _log_once(line, remarkable=len(counts) > 1 or bool(remarks) or any(sentences(files)))


@cache
def _log_once(line: str, *, remarkable: bool) -> None:
    log.log(logging.WARNING if remarkable else logging.INFO, "%s", line)
