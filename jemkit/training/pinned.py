"""The data that a run was trained on: class names, images and files; other data are rejected."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jemkit.data import Dataset, Images, NamesClasses, images_hash
from jemkit.errors import DataError, MisfitError
from jemkit.runtime.files import file_hash, read_json, write_json
from jemkit.runtime.work_cache import tensors_hash
from jemkit.splits import Part, Splits

log = logging.getLogger(__name__)

CONFIG, DETAILS = "config.json", "data.json"
"""The file with a hash and a file name for each image, next to a run's config.json."""
PARTS: tuple[Part, ...] = ("train", "valid", "test")
LISTED = 5
"""Names that a message lists before it counts the rest."""
AGAIN = "Restore the data, or start a new run"
JUDGED = (
    "Restore the data, or pass the data set to evaluate the model on (--dataset, --data-dir), with "
    "these classes in this order"
)
SAMPLED = "Restore the data"
NAMED = "Pass a data set with the run's classes, in their order"
"""The advice for each purpose."""


Size = Annotated[int, Field(gt=0, le=2**16, strict=True)]
"""The side of an image, or the number of its channels."""


class SplitPin(BaseModel):
    """The images of a split at the start of the run."""

    model_config = ConfigDict(frozen=True, strict=True)

    images: int = Field(ge=0)
    sha256: str  # of pixels and labels, in order


class Table(BaseModel):
    """The table `data` of config.json."""

    model_config = ConfigDict(frozen=True)

    n_classes: int = Field(ge=1)
    classes: tuple[str, ...] | None = None  # in the order of the labels; None: unknown
    shape: tuple[Size, Size, Size] | None = None  # of an image; None: unknown
    train: SplitPin | None = None
    valid: SplitPin | None = None
    test: SplitPin | None = None
    test_sha256: str | None = None  # of the test images, as in the record of an evaluation
    details: str | None = None  # the SHA-256 of data.json


class Details(BaseModel):
    """data.json: a hash for each image of each split, and by the name of its file."""

    model_config = ConfigDict(frozen=True, strict=True)

    images: dict[Part, list[str]]
    names: dict[str, str] = {}  # none if the data set lists no files


class Pin(NamedTuple):
    """The pinned data of the run or exported model in `folder`; the `Pinned` of `Splits`."""

    table: Table
    folder: Path
    advice: str = AGAIN

    def check_classes(self, dataset: Dataset) -> None:
        """Reject a data set whose classes, in their order, are not the run's."""
        known, came = self.table.classes, class_names(dataset)
        if known is None or came is None:
            if self.table.n_classes != dataset.n_classes:
                raise DataError(
                    f"the run in {self.folder} has {self.table.n_classes} classes; "
                    f"{described(dataset)} has {dataset.n_classes}. {self.advice}"
                )
        elif came != known:
            order = ""
            if Counter(known) == Counter(came):
                at = next(i for i, name in enumerate(known) if came[i] != name)
                order = f", in another order: label {at} was {known[at]} and is now {came[at]}"
            raise DataError(
                f"the run in {self.folder} has the classes {names(known, came)}; "
                f"{described(dataset)} has {names(came, known)}{order}. {self.advice}"
            )

    def named(self, dataset: Dataset) -> "Pin":
        """The same for another data set that the user passes: it must have the run's classes."""
        named = self._replace(advice=NAMED)
        named.check_classes(dataset)
        if self.table.classes is None or class_names(dataset) is None:
            log.warning(
                "class names are missing: whether %s has the classes of the run in %s, in their "
                "order, cannot be checked", described(dataset), self.folder,
            )  # fmt: skip
        return named

    def check_images(self, splits: Splits, split: Part, images: Images) -> None:
        """Reject images that differ from those at the start of the run, and say which differ."""
        wanted: SplitPin | None = getattr(self.table, split)
        if wanted is None or images_hash(images) == wanted.sha256:
            return
        count, details = len(images.y), self.details()
        now = f"{count} images" + (f", instead of {wanted.images}" * (count != wanted.images))
        reasons = [] if details is None else _reasons(details, splits, split, images)
        difference = "; ".join([now, *reasons])
        raise DataError(
            f"the {SPLIT_NAMES[split]} images of {described(splits.dataset)} differ from those "
            f"that the run in {self.folder} started with: {difference}. {self.advice}"
        )

    def details(self) -> Details | None:
        """The contents of data.json; None if it is missing or was changed."""
        path = self.folder / DETAILS
        if self.table.details is None:
            return None
        try:
            if file_hash(path) != self.table.details:
                return None
            return Details.model_validate(read_json(path))
        except (DataError, LookupError, ValidationError):
            return None

    def overlap(self, test: Images) -> tuple[int, list[str]]:
        """How many of other test images the run was trained or validated on, with a warning."""
        own = self.table.test
        if own is None or images_hash(test) == own.sha256:
            return 0, []
        details = self.details()
        if details is None:
            return 0, [
                f"{self.folder / DETAILS} is missing, damaged or from another run: it is unknown "
                "whether the model was trained on these images"
            ]
        known = {*details.images["train"], *details.images["valid"]}
        count = sum(image in known for image in image_hashes(test))
        warning = (
            f"{count} of the {len(test.y)} test images are training or validation images of the "
            "run: the figures are not on held-out images"
        )
        return count, [warning] * bool(count)


SPLIT_NAMES: dict[Part, str] = {"train": "training", "valid": "validation", "test": "test"}


def pin(splits: Splits) -> tuple[Table, Details]:
    """What a run stores about its data: in config.json, and in data.json."""
    dataset, images = splits.dataset, {part: splits.images(part) for part in PARTS}
    fields: dict[str, Any] = {
        part: SplitPin(images=len(own.y), sha256=images_hash(own)) for part, own in images.items()
    }
    table = Table(
        n_classes=dataset.n_classes, classes=class_names(dataset),
        shape=tuple(images["train"].x.shape[1:]),
        test_sha256=tensors_hash(images["test"]._asdict()), **fields,
    )  # fmt: skip
    hashed = {part: image_hashes(own) for part, own in images.items()}
    files = files_of(dataset)
    pairs = (zip(_names(files, splits, part), hashed[part], strict=True) for part in PARTS)
    return table, Details(images=hashed, names=dict(chain(*pairs)) if files else {})


def write(folder: Path, table: Table, details: Details) -> dict[str, Any]:
    """Write data.json; the table for config.json."""
    sha = write_json(folder / DETAILS, details.model_dump())
    return table.model_copy(update={"details": sha}).model_dump(mode="json")


def for_others(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A run's config.json and data.json for an exported model, without file names."""
    table = config.get("data")
    details = None if table is None else Pin(Table.model_validate(table), folder).details()
    if details is None:
        return config, {}
    shared = details.model_copy(update={"names": {}}).model_dump()
    content = json.dumps(shared, sort_keys=True).encode()
    sha = hashlib.sha256(content).hexdigest()
    return {**config, "data": {**config["data"], "details": sha}}, {DETAILS: content}


def read(config: Path, advice: str = AGAIN) -> Pin | None:
    """The pinned data of a config.json; None, and a warning, if there are none."""
    content = read_json(config)
    table = content.get("data") if isinstance(content, dict) else None
    if table is None:
        log.warning(
            "%s has no record of its data, as in jemkit 0.1: whether its classes and images are "
            "unchanged cannot be checked", config,
        )  # fmt: skip
        return None
    try:
        return Pin(Table.model_validate(table), config.parent, advice)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("data", *first["loc"])))
        raise DataError(f"{config} is damaged: {where}: {first['msg']}") from None


def class_names(dataset: Dataset) -> tuple[str, ...] | None:
    """A data set's class names in the order of the labels, if it provides them."""
    if not isinstance(dataset, NamesClasses):
        return None
    return tuple(_texts(dataset.class_names, dataset, "class_names", "each class, its name"))


def files_of(dataset: Dataset) -> dict[str, list[str]]:
    """The names of a data set's files by its splits, in the order of its images."""
    files: Any = getattr(dataset, "files", None)
    given: dict[str, Any] = {}
    for part in PARTS if callable(files) else ():
        try:
            given[part] = files(part)
        except (LookupError, ValueError):  # a split that the data set does not have
            continue
        except TypeError as error:
            raise _misfit(dataset, f"files({part!r})", f"an error, {error}", NAME_EACH) from error
    return {
        part: _texts(names, dataset, f"files({part!r})", NAME_EACH) for part, names in given.items()
    }


def _names(files: Mapping[str, list[str]], splits: Splits, part: Part) -> list[str]:
    """The file of each image of a run's split."""
    split = part if files.get(part) else "train"
    own, rows = files.get(split, []), splits.rows(part)
    if rows and max(rows) >= len(own):
        count = f"{len(own)} names, for at least {max(rows) + 1} images"
        raise _misfit(splits.dataset, f"files({split!r})", count, NAME_EACH)
    return [own[row] for row in rows]


NAME_EACH = "each image, the name of its file, in the order of `load`"


def _texts(names: Any, dataset: Dataset, what: str, wanted: str) -> list[str]:
    """Names that any file can store; one that is not Unicode has its bytes escaped."""
    several = isinstance(names, Iterable) and not isinstance(names, str | bytes)
    each = list(names) if several else [names]
    strange = [name for name in each if not isinstance(name, str)] if several else each
    if strange:
        raise _misfit(dataset, what, repr(strange[0])[:80], wanted)
    return [name.encode("utf-8", "backslashreplace").decode() for name in each]


def _misfit(dataset: Dataset, what: str, came: str, wanted: str) -> MisfitError:
    name, plugin = type(dataset).__name__, type(dataset).__module__
    return MisfitError(
        f"`{what}` of the data set {name}, of the plug-in {plugin}, gives {came}; "
        f"expected a string for {wanted}. Correct the plug-in, or install another version"
    )


def image_hashes(images: Images) -> list[str]:
    """64 bits for each image, from its pixels as 8-bit RGB, whatever their type."""
    hashes: list[str] = []
    for x in torch.split(images.x, 1000):
        pixels = (Images(x, images.y).unit() * 255).round().to(torch.uint8)
        rows = pixels.expand(-1, 3, -1, -1).contiguous().numpy()
        hashes += [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]
    return hashes


def described(dataset: Dataset) -> str:
    """A data set by its name and its folder."""
    name, folder = type(dataset).__name__.lower(), getattr(dataset, "dir", None)
    return f"the {name} data set" + (f" in {folder}" if folder is not None else "")


def listed(names: Iterable[str], most: int = LISTED) -> str:
    """The first few names, and how many there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def names(names: Sequence[str], others: Sequence[str]) -> str:
    """All class names if they are few, else those that the other side lacks."""
    if len(names) <= 10:
        return ", ".join(names)
    own = [name for name in names if name not in set(others)]
    return f"{len(names)} classes" + (f", among them {listed(own)}" if own else "")


def _reasons(details: Details, splits: Splits, split: Part, images: Images) -> list[str]:
    """How a split differs from the pinned one."""
    was, now = details.images[split], image_hashes(images)
    gone, new = Counter(was) - Counter(now), Counter(now) - Counter(was)
    reasons: list[str] = []
    if gone or new:
        reasons.append(f"{new.total()} are new and {gone.total()} are missing")
    elif was == now:
        reasons.append("their labels differ, or their pixels by less than 8-bit precision")
    else:
        reasons.append("they are the same in another order")
    for part in PARTS:
        moved = new & Counter(details.images[part])
        if part != split and moved:
            reasons.append(f"{moved.total()} of the new ones were {SPLIT_NAMES[part]} images")
    files = files_of(splits.dataset)
    if not (files and details.names):
        return reasons
    known, there = set(details.names), set(chain(*files.values()))
    pairs = zip(_names(files, splits, split), now, strict=True)
    changed = {name for name, image in pairs if details.names.get(name, image) != image}
    groups = {"added": there - known, "removed": known - there, "changed": changed}
    return [f"{how}: {listed(sorted(group))}" for how, group in groups.items() if group] + reasons
