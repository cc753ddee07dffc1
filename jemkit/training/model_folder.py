"""A model's folder, written whole or not at all, and pushed to a hub."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from jemkit.errors import ConfigError, DataError
from jemkit.runtime import checkpoint
from jemkit.runtime.extras import install
from jemkit.runtime.files import sync_folder, write_bytes, write_json, write_tensors, write_text
from jemkit.runtime.opening import refuse_link
from jemkit.runtime.run_dir import versions
from jemkit.sampling.moments import MOMENTS
from jemkit.training.model_card import page
from jemkit.training.model_files import CARD, CONFIG, FORMAT, SAMPLES, WEIGHTS, verify


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
    `moments` the Gaussians of the initial distribution. `check` reads the folder before it is
    renamed to its final name.
    """
    check_vacant(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    extra = beside or {}
    try:
        write_tensors(work / WEIGHTS, weights)
        sha = checkpoint.file_hash(work / WEIGHTS)
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
        os.chmod(work, 0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return sha


def push(folder: Path, repo: str) -> str:
    """Upload an exported model to the Hugging Face hub; returns its address."""
    verify(folder)
    try:
        hub = import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"--push needs the package huggingface_hub ({error}): {install('hub')}"
        ) from None
    try:
        api = hub.HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder)))
    except (OSError, ValueError) as error:  # the hub's errors are of these types
        raise DataError(f"{folder} was not pushed to {repo}: {error}") from None


def check_vacant(folder: Path) -> None:
    """Reject a folder that an export cannot use."""
    refuse_link(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{folder} already exists and is not empty; choose another --out")
    if folder.absolute() == Path.cwd():
        raise ConfigError(
            f"{folder} is the working folder, which an export would replace as a whole; choose "
            f"another one, such as --out model"
        )
