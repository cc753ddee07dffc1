"""An exported model's folder: checked before anything is read, written whole, pushed to a hub."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from jemkit.config.recipe import Recipe
from jemkit.data import Task
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.extras import install
from jemkit.runtime.files import (
    file_hash,
    new_folder,
    read_json,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from jemkit.runtime.opening import refuse_link
from jemkit.runtime.run_dir import versions
from jemkit.sampling.moments import MOMENTS
from jemkit.splits import Splits
from jemkit.training.model_card import CARD, CONFIG, FIGURES, SAMPLES, WEIGHTS, page
from jemkit.training.pinned import DETAILS, Size

FORMAT = 1
FILES = (CONFIG, WEIGHTS, CARD, MOMENTS, FIGURES, SAMPLES, DETAILS)
"""All files that an exported model may have."""


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported or imported model, and not a run."""
    return (folder / CONFIG).exists() and (folder / WEIGHTS).exists()


def verify(folder: Path) -> str:
    """Check a model's files against its config.json; returns the SHA-256 of its weights."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        came = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise DataError(f"{folder} has export format {came!r}; this jemkit reads {FORMAT}")
    hashes = config.get("sha256")
    wanted = hashes if isinstance(hashes, dict) else {}
    for name in dict.fromkeys([WEIGHTS, *map(str, wanted)]):
        path, sha = folder / name, wanted.get(name)
        if Path(name).name != name or not path.is_file() or file_hash(path) != sha:
            raise DataError(f"{path} is missing or damaged: its SHA-256 is not {sha}")
    return str(wanted[WEIGHTS])


class TaskTable(BaseModel):
    """The table `task` of config.json: what the parts must know of the data, to build a model."""

    shape: tuple[Size, Size, Size]
    n_classes: int = Field(ge=1)
    radius_px: float = Field(ge=0)
    n_train: int
    total_steps: int
    hash: str


def task_table(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in TaskTable.model_fields}


def saved_task(config: Mapping[str, Any], recipe: Recipe, splits: Splits) -> Task | None:
    """The task in config.json; None if it has none, as in 0.1.0."""
    if config.get("task") is None:
        return None
    try:
        table = TaskTable.model_validate(config["task"])
    except ValidationError:
        raise DataError(f"{CONFIG}: [task] is damaged; export or import the model again") from None
    return Task(**dict(table), images=splits.images, augmentation=recipe.data.augmentation)


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    card: str,
    *,
    beside: Mapping[str, bytes | Mapping[str, Any]] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    license: str = "unknown",
    check: Callable[[Path], object] | None = None,
) -> str:
    """Write the folder of a model, whole or not at all; returns the SHA-256 of the weights.

    `config` has the recipe; `card` is the text of the model card; `beside` are additional files,
    `moments` the Gaussians of the initial distribution. `check` reads the folder at the end.
    """
    check_vacant(folder)
    extra = beside or {}
    with new_folder(folder) as work:
        sha = write_tensors(work / WEIGHTS, weights)
        hashes = {WEIGHTS: sha}
        if moments:
            hashes[MOMENTS] = write_tensors(work / MOMENTS, moments)
        for name, content in extra.items():
            if isinstance(content, bytes):
                write_bytes(work / name, content)
            else:
                write_json(work / name, content)
        made = {"format": FORMAT, "jemkit": versions()["jemkit"], "sha256": hashes}
        write_json(work / CONFIG, {"versions": versions(), **config, **made})
        text = page(
            folder.name, config["recipe"], card, task=config.get("task"), sha=sha,
            license=license, samples=SAMPLES in extra,
        )  # fmt: skip
        write_text(work / CARD, text)
        if check is not None:
            check(work)
        check_vacant(folder)  # another process may have been faster
    return sha


def push(folder: Path, repo: str) -> str:
    """Upload an exported model to the Hugging Face hub; returns its address."""
    verify(folder)
    hub = _hub("--push")
    try:
        api = hub.HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder)))
    except (OSError, ValueError) as error:  # the hub's errors are of these types
        raise DataError(f"{folder} was not pushed to {repo}: {error}") from None


def pull(repo: str, revision: str | None = None) -> Path:
    """Download an exported model from the Hugging Face hub, or find it in the hub's cache.

    Only the files of an exported model are fetched, and never code. Returns the folder.
    """
    hub = _hub(f"{repo} is not a folder here, and to download it from the Hugging Face hub jemkit")
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*FILES]))
    except Exception as error:  # the hub's libraries raise many types
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{repo} is not a folder here, and it was not downloaded from the Hugging Face hub: "
            f"{type(error).__name__}: {reason}"
        ) from None


def _hub(purpose: str) -> Any:
    """The package huggingface_hub."""
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package huggingface_hub ({error}): {install('hub')}"
        ) from None


def check_vacant(folder: Path) -> None:
    """Reject a folder that an export cannot use."""
    refuse_link(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{folder} already exists and is not empty; choose another folder")
    if folder.absolute() == Path.cwd():
        raise ConfigError(
            f"{folder} is the working folder, which an export would replace as a whole; choose "
            f"another one, such as --out model"
        )
