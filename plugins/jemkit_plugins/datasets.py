"""Data sets: scikit-learn's digits, CIFAR-10 and -100, SVHN, and folders of image files."""

import logging
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from jemkit.data import SIZES, Augmentation, Dataset, Images, Split, checked
from jemkit.errors import DataError
from jemkit.hookspecs import hookimpl
from jemkit.options import Options
from jemkit.vision import torchvision

Published = dict[Path, str]  # files, each with the md5 its publisher gives
Sample = tuple[str, int]  # an image file and its label


class Digits(Options):
    """8 x 8 grey digits (Alpaydin and Kaynak 1998), which come with scikit-learn."""

    radius_px: ClassVar[float] = 25.5
    augmentation: ClassVar[Augmentation] = Augmentation()

    @property
    def n_classes(self) -> int:
        return 10

    def load(self, split: Split) -> Images:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        y = torch.from_numpy(digits.target)
        index = _parts(y, test_size=500)[split]
        return checked(Images(x, y).take(index), self.n_classes, "digits")


class CIFAR10(Options):
    """CIFAR-10 (Krizhevsky 2009), from the published python batches."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation(pad=4, flip=True)

    dir: Path = Path("data")
    download: bool = False

    @property
    def n_classes(self) -> int:
        return 10

    def load(self, split: Split) -> Images:
        images = _cifar(torchvision().datasets.CIFAR10, self.dir, self.download, split)
        return checked(images, self.n_classes, f"cifar10 in {self.dir}")


class CIFAR100(Options):
    """CIFAR-100 (Krizhevsky 2009) with its fine labels, from the published python batches."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation(pad=4, flip=True)

    dir: Path = Path("data")
    download: bool = False

    @property
    def n_classes(self) -> int:
        return 100

    def load(self, split: Split) -> Images:
        images = _cifar(torchvision().datasets.CIFAR100, self.dir, self.download, split)
        return checked(images, self.n_classes, f"cifar100 in {self.dir}")


class SVHN(Options):
    """Street View House Numbers (Netzer et al. 2011), cropped digits; without its extra set."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation(pad=4)  # a mirrored digit is no digit

    dir: Path = Path("data")
    download: bool = False

    @property
    def n_classes(self) -> int:
        return 10

    def load(self, split: Split) -> Images:
        kind = torchvision().datasets.SVHN
        url, name, md5 = kind.split_list[split]
        files = {self.dir / name: md5}
        if self.download and _flaw(files):
            fetch = torchvision().datasets.utils.download_url
            _fetch(url, lambda: fetch(url, self.dir, name, md5))
        _intact(files)
        raw = kind(self.dir, split=split)
        images = Images(torch.from_numpy(raw.data).contiguous(), torch.from_numpy(raw.labels))
        return checked(images, self.n_classes, f"svhn in {self.dir}")


class Folder(Options):
    """Image files in a folder a class: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*."""

    radius_px: ClassVar[float] = 8
    augmentation: ClassVar[Augmentation] = Augmentation()  # nobody knows what a flip means here

    dir: Path
    size: int | None = Field(None, ge=SIZES[0], le=SIZES[1])  # px: the centre square, resized

    @property
    def n_classes(self) -> int:
        return len(_classes(self.dir))

    def load(self, split: Split) -> Images:
        """All images of a split; grey where all of both are. Float pixels are taken as [0, 1]."""
        samples = _samples(self.dir)
        grey = _survey([path for part in samples.values() for path, _ in part], self.size)
        x = [_pixels(path, grey=grey, size=self.size) for path, _ in samples[split]]
        if any(image.is_floating_point() for image in x):
            x = [image if image.is_floating_point() else image / 255 for image in x]
        y = torch.tensor([label for _, label in samples[split]])
        return checked(Images(torch.stack(x), y), self.n_classes, f"{split} images in {self.dir}")


@hookimpl
def jemkit_datasets() -> Mapping[str, type[Dataset]]:
    return {
        "digits": Digits,
        "cifar10": CIFAR10,
        "cifar100": CIFAR100,
        "svhn": SVHN,
        "folder": Folder,
    }


def _parts(y: Tensor, *, test_size: float) -> dict[Split, Tensor]:
    """The fixed stratified split: the indices of each part, the same on every call."""
    from sklearn.model_selection import train_test_split

    index = np.arange(len(y))
    train, test = train_test_split(index, test_size=test_size, stratify=y.numpy(), random_state=0)
    return {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}


def _cifar(kind: Any, root: Path, download: bool, split: Split) -> Images:
    """Read the batches with torchvision's class, once every file is known to be the original."""
    listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    files = {root / kind.base_folder / name: md5 for name, md5 in listed}
    if download and _flaw(files):
        fetch = torchvision().datasets.utils.download_and_extract_archive
        _fetch(kind.url, lambda: fetch(kind.url, root, filename=kind.filename, md5=kind.tgz_md5))
    _intact(files)
    raw = kind(root, train=split == "train")
    x = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
    return Images(x, torch.tensor(raw.targets))


def _intact(files: Published) -> None:
    """Refuse a missing or changed file before anything in it is unpickled."""
    if flaw := _flaw(files):
        raise DataError(flaw)


def _flaw(files: Published) -> str:
    """What is wrong with the first file that is missing or changed; empty where none is."""
    for path, published in files.items():
        if not path.is_file():
            return f"{path} is missing; give --data-dir DIR where it is, or --download"
        came = torchvision().datasets.utils.calculate_md5(path)
        if came != published:
            return (
                f"{path} is damaged: its md5 is {came}, the published one is {published}; "
                "put the original there, or --download"
            )
    return ""


def _fetch(url: str, download: Callable[[], None]) -> None:
    logging.getLogger("jemkit").info("downloading %s", url)
    try:
        download()
    except (OSError, EOFError, RuntimeError, HTTPException, tarfile.TarError) as error:
        raise DataError(f"{url}: the download failed ({error})") from error


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _classes(root: Path) -> list[str]:
    """The class folders by name; train and test hold the same ones."""
    train, test = _folders(root / "train"), _folders(root / "test")
    if train != test:
        only = {"train": set(train) - set(test), "test": set(test) - set(train)}
        told = "; ".join(f"only {k} has {', '.join(sorted(v))}" for k, v in only.items() if v)
        raise DataError(f"{root}: train and test want the same class folders, but {told}")
    classes = train or _folders(root)
    if len(classes) < 2:
        raise DataError(
            f"{root}: wanted two class folders or more, in it or in its train and test, "
            f"got {len(classes)}; give --data-dir DIR where they are"
        )
    return classes


def _samples(root: Path) -> dict[Split, list[Sample]]:
    """The image files of each split; where the folders set no test images apart, a fifth is."""
    classes = _classes(root)
    if _folders(root / "train"):
        return {"train": _listed(root / "train", classes), "test": _listed(root / "test", classes)}
    samples = _listed(root, classes)
    label, fewest = Counter(label for _, label in samples).most_common()[-1]
    if fewest < 5:
        raise DataError(
            f"{root}: {classes[label]} has {fewest} images, wanted 5 of each class to set a fifth "
            "apart for testing; add images, or sort them into train and test folders"
        )
    parts = _parts(torch.tensor([label for _, label in samples]), test_size=0.2)
    return {split: [samples[i] for i in index.tolist()] for split, index in parts.items()}


def _listed(root: Path, classes: list[str]) -> list[Sample]:
    folder = torchvision().datasets.folder
    index = {name: label for label, name in enumerate(classes)}
    try:
        found: list[Sample] = folder.make_dataset(str(root), index, folder.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}. Put images there, or remove the folder") from error
    return found


def _survey(paths: list[str], size: int | None) -> bool:
    """Whether all images are grey, from their headers; refuses those that do not fit together."""
    grey, first = True, (paths[0], (0, 0))
    for path in paths:
        with _opened(path) as image:
            mode, came = image.mode, image.size
        if mode.startswith("I"):
            raise DataError(f"{path}: pixels of mode {mode}; wanted 8 bits, or floats in [0, 1]")
        first = (path, came) if path == paths[0] else first
        if size is None and (came != first[1] or came[0] != came[1]):
            raise DataError(
                f"{path} is {came[0]} x {came[1]} px, {first[0]} is {first[1][0]} x {first[1][1]}; "
                "wanted squares of one size: --set data.size=32 resizes all to 32 x 32"
            )
        grey = grey and mode in ("L", "F")
    return grey


def _pixels(path: str, *, grey: bool, size: int | None) -> Tensor:
    """One image, [C, H, W], uint8 or float32 in [0, 1]."""
    with _opened(path) as opened:
        mode = "F" if opened.mode == "F" else "L" if grey else "RGB"
        image = opened.convert(mode)
    if mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN passes neither
            raise DataError(f"{path}: float pixels outside [0, 1], NaN or inf")
    if size is not None:
        image = _centre(image).resize((size, size), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image))
    x = x.permute(2, 0, 1) if x.ndim == 3 else x.unsqueeze(0)
    return (x.clamp(0, 1) if mode == "F" else x).expand(1 if grey else 3, -1, -1)


def _centre(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
