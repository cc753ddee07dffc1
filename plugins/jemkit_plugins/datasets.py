"""Published data sets: scikit-learn's digits, CIFAR-10 and -100, SVHN."""

import logging
import tarfile
from collections.abc import Callable, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from jemkit import Augmentation, DataError, Dataset, Images, Options, Split, checked, hookimpl
from jemkit.runtime.files import read_json
from jemkit.runtime.torchvision_compat import torchvision

Published = dict[Path, str]  # files, each with its published md5
Size = Literal[8, 16, 32]
"""Height and width in pixels; below 32 a pixel is the mean of a square of published ones."""

LARGEST = 2**28
"""In bytes; the largest published file, the training images of SVHN, has 182 million."""

DIGIT_NAMES = tuple("0123456789")
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
    couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
    house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket
    rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
    turtle wardrobe whale willow_tree wolf woman worm
"""
"""The classes of CIFAR-10, and the fine classes of CIFAR-100, in the publishers' order."""


class Digits(Options):
    """8 x 8 greyscale digits (Alpaydin and Kaynak 1998), which are included in scikit-learn."""

    radius_px: ClassVar[float] = 25.5
    augmentation: ClassVar[Augmentation] = Augmentation()
    shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)

    @property
    def n_classes(self) -> int:
        return 10

    @property
    def class_names(self) -> tuple[str, ...]:
        return DIGIT_NAMES

    def load(self, split: Split) -> Images:
        table = torch.from_numpy(_digits())
        x = table[:, :64].float().view(-1, 1, 8, 8) / 16
        index = torch.tensor(read_json(SPLIT)[split])
        return checked(Images(x, table[:, 64]).take(index), self.n_classes, "digits")


SPLIT = Path(__file__).with_name("digits.json")
"""The stratified split of the digits that scikit-learn draws, with 500 test images.

It is stored, since drawing it would import all of scikit-learn.
"""


def _digits() -> NDArray[np.float64]:
    """Pixels and labels [1797, 65], read from scikit-learn's own file.

    Importing scikit-learn would take longer than the rest of a run's start-up. It is imported only
    if its release has the file elsewhere.
    """
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


class _Colour(Options):
    """Published colour images of 32 px, in files that may be downloaded."""

    radius_px: ClassVar[float] = 8

    dir: Path = Path("data")  # folder of its files
    download: bool = False  # fetch missing files
    size: Size = 32  # px of a side; smaller: means over squares of pixels

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(pad=self.size // 8, flip=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


class CIFAR10(_Colour):
    """CIFAR-10 (Krizhevsky 2009), read from the published python batches."""

    @property
    def n_classes(self) -> int:
        return 10

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(CIFAR10_CLASSES.split())

    def load(self, split: Split) -> Images:
        images = _cifar(torchvision().datasets.CIFAR10, self.dir, self.download, split)
        return checked(reduced(images, self.size), self.n_classes, f"cifar10 in {self.dir}")


class CIFAR100(_Colour):
    """CIFAR-100 (Krizhevsky 2009) with its fine labels, read from the published python batches."""

    @property
    def n_classes(self) -> int:
        return 100

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(CIFAR100_CLASSES.split())

    def load(self, split: Split) -> Images:
        images = _cifar(torchvision().datasets.CIFAR100, self.dir, self.download, split)
        return checked(reduced(images, self.size), self.n_classes, f"cifar100 in {self.dir}")


class SVHN(_Colour):
    """Street View House Numbers (Netzer et al. 2011), cropped digits; without its extra set."""

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(pad=self.size // 8)  # a mirrored digit is not a digit

    @property
    def n_classes(self) -> int:
        return 10

    @property
    def class_names(self) -> tuple[str, ...]:
        return DIGIT_NAMES

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
        return checked(reduced(images, self.size), self.n_classes, f"svhn in {self.dir}")


def reduced(images: Images, size: int) -> Images:
    """Images of `size` px: each pixel is the mean of a square, rounded to 8 bits."""
    side = images.x.shape[-1] // size
    if side == 1:
        return images
    n, channels = images.x.shape[:2]
    squares = images.x.view(n, channels, size, side, size, side)
    total = squares.sum((3, 5), dtype=torch.int16)
    area = side**2
    return images._replace(x=((total + area // 2) // area).to(torch.uint8))


@hookimpl
def jemkit_datasets() -> Mapping[str, type[Dataset]]:
    return {
        "digits": Digits,
        "cifar10": CIFAR10,
        "cifar100": CIFAR100,
        "svhn": SVHN,
    }


def _cifar(kind: Any, root: Path, download: bool, split: Split) -> Images:
    """Read the batches with torchvision's class, after every file has been verified."""
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
    """Reject a missing or changed file before anything in it is unpickled."""
    if flaw := _flaw(files):
        raise DataError(flaw)


def _flaw(files: Published) -> str:
    """The error of the first file that is missing or changed; empty if there is none."""
    for path, published in files.items():
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a regular file; put the original there")
        if not path.is_file():
            return f"{path} is missing; give --data-dir DIR where it is, or --download"
        if path.stat().st_size > LARGEST:
            return (
                f"{path} is damaged: it has {path.stat().st_size} bytes, and no published one has "
                "so many; put the original there, or --download"
            )
        try:
            came = torchvision().datasets.utils.calculate_md5(path)
        except OSError as error:
            return f"{path} cannot be read ({error})"
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
