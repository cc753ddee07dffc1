"""A run's model as a folder for others: config.json, model.safetensors and a model card."""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from jemkit import checkpoint, pinned, record
from jemkit.assembly import splits_of, task_of
from jemkit.backbone import Task
from jemkit.card import figures_table, page, table_of
from jemkit.errors import ConfigError, DataError, JemkitError
from jemkit.exported import (
    CARD,
    CONFIG,
    FIGURES,
    FORMAT,
    SAMPLES,
    WEIGHTS,
    is_exported,
    task_table,
    verify,
)
from jemkit.extras import install
from jemkit.moments import MOMENTS
from jemkit.pixels import LoadedModel, PixelModel
from jemkit.recipe import Recipe, resolve
from jemkit.record import Record
from jemkit.registry import Registry, installed
from jemkit.restoring import Which, chosen, restored, run_folder, saved_state
from jemkit.runtime.files import (
    load_tensors,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from jemkit.runtime.folder import versions
from jemkit.runtime.opening import read_file, refuse_link
from jemkit.saved import weights_of
from jemkit.starts import MomentStart

__all__ = [
    "CARD", "CONFIG", "FORMAT", "Exported", "check_vacant", "export", "load", "push", "verify",
    "write_model",
]  # fmt: skip

log = logging.getLogger(__name__)

LARGEST_PICTURE = 16 * 2**20
"""Bytes of a sample grid that goes with a model."""


class Exported(NamedTuple):
    """What was written, and from what."""

    folder: Path
    checkpoint: str
    weights: str  # averaged or live
    sha256: str  # of model.safetensors
    figures: int  # of the run's record
    note: str  # why the card has none


def export(
    run: Path,
    *,
    out: Path | None = None,
    which: Which = "best",
    registry: Registry | None = None,
    license: str = "unknown",
) -> Exported:
    """Write a run's model, its weights averaged where it keeps an average.

    The folder stands alone: what must be known of the data is in config.json.
    """
    _check_run(run)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,40}", license):
        raise ConfigError(f"license {license!r}: wanted an identifier such as mit or cc-by-4.0")
    source = run_folder(run)
    saved = chosen(source, which)
    folder = source.path / "export" if out is None else out
    check_vacant(folder)
    state = saved_state(source.path, saved)
    exported, averaged = weights_of(state, saved)
    sha = checkpoint.verify(saved)[checkpoint.MODEL]
    config = source.config
    if not isinstance(config.get("recipe"), dict):
        raise DataError(f"{source.path / CONFIG} holds no recipe; it is not a run's config")
    config = _without_home(config)
    weights = "averaged" if averaged else "live"
    about = {"run": source.path.name, "checkpoint": saved.name, "sha256": sha, "weights": weights}
    found, note = _record_of(source.path, sha, config)
    card = _about_run(config["recipe"], about) + "\n"
    card += figures_table(found.figures, found.protocol) if found else f"{note}\n"
    config, hashes = pinned.for_others(config, source.path)
    beside: dict[str, bytes | Mapping[str, Any]] = {**_samples(source.path), **hashes}
    if found:
        beside[FIGURES] = found.to_json()
    task, moments = _of_data(source.path / CONFIG, registry or installed())
    written = write_model(
        folder, {**config, "source": about, **task}, exported, card, beside=beside,
        moments=moments, license=license,
    )  # fmt: skip
    count = len(found.figures) if found else 0
    return Exported(folder, saved.name, weights, written, count, note)


def load(
    folder: str | Path, *, registry: Registry | None = None, device: str = "cpu"
) -> PixelModel:
    """The model of an exported or imported folder: [0, 1] images to logits, in eval mode.

    No image of any data set is read for it. A run of `jemkit train` gives its best checkpoint, with
    averaged weights where it keeps an average; that reads the run's data.
    """
    path = Path(folder)
    if is_exported(path):
        verify(path)
        weights = load_tensors(path / WEIGHTS)
    elif (path / "checkpoints").is_dir():
        path = run_folder(path).path
        saved = chosen(run_folder(path), "best")
        weights, _ = weights_of(saved_state(path, saved), saved)
    else:
        raise DataError(
            f"{path} is neither an exported model, which has {CONFIG} and {WEIGHTS}, nor a run of "
            "`jemkit train`"
        )
    on = torch.device(device)
    found = restored(path / CONFIG, weights, registry or installed(), on)
    density = found.backbone.density if found.backbone.has_density else None
    pixels = LoadedModel(found.backbone.model, found.task.bounds, density)
    return pixels.eval()


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
    """Write the folder of a model, whole or not at all; give back the weights' SHA-256.

    `config` has the recipe; `card` is the model card's text; `beside` are files that go with it,
    `moments` the Gaussians that chains begin from. `check` reads the folder before it is put in
    its place.
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
    """Upload an exported model to the Hugging Face hub; give back where it is."""
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
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise DataError(f"{folder} was not pushed to {repo}: {error}") from None


def check_vacant(folder: Path) -> None:
    """Refuse a folder that an export cannot have."""
    refuse_link(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{folder} exists already and is not empty; choose another --out")
    if folder.absolute() == Path.cwd():
        raise ConfigError(
            f"{folder} is the folder that this command runs in, and the model's folder is put in "
            "its place as a whole; name another one, such as --out model"
        )


def _check_run(run: Path) -> None:
    if (run / checkpoint.MANIFEST).exists():
        raise DataError(f"{run} is a checkpoint; give its run, {run.resolve().parents[1]}")
    if (run / WEIGHTS).exists() and not (run / "checkpoints").exists():
        raise DataError(f"{run} is an exported model already; wanted a run of `jemkit train`")


def _record_of(run: Path, sha: str, config: Mapping[str, Any]) -> tuple[Record | None, str]:
    """The record of these weights on the run's own test images, or why there is none."""
    if not (run / record.JSON).exists():
        return None, "No figure was measured yet: `jemkit evaluate` measures them."
    data, pin = config["recipe"]["data"]["use"], config.get("data")
    test_sha256 = pin.get("test_sha256") if isinstance(pin, dict) else None
    found = record.of_weights(run, sha, data, test_sha256)
    if found is None:
        return None, (
            "The run's record is of other weights than these, or of other images than those of "
            f"{data}, so its figures are left out: `jemkit evaluate` measures them anew."
        )
    return found, ""


def _about_run(recipe: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    network = recipe["backbone"].get("network", {})
    shown = ", ".join(f"{key} {value}" for key, value in network.items() if key != "use")
    return table_of(
        [
            ("backbone", recipe["backbone"]["use"]),
            ("network", f"{network.get('use', '')} ({shown})"),
            ("objective", recipe["objective"]["use"]),
            ("data set", recipe["data"]["use"]),
            *about.items(),
        ]
    )


def _of_data(config: Path, registry: Registry) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the run's data tell, and the moments of its start; nothing where they are not at hand.

    They are needed by who samples from the model, and asked for then.
    """
    try:
        recipe = resolve(registry, config=config).recipe
        splits = splits_of(recipe, pinned.read(config))
        task = replace(task_of(recipe, splits), fill=False)
        return {"task": task_table(task)}, _moments(recipe, task)
    except JemkitError as error:
        log.warning("the model does not stand alone, its data are not at hand: %s", error)
        return {}, {}


def _moments(recipe: Recipe, task: Task) -> dict[str, Tensor]:
    backbone = recipe.backbone.build(task, Generator().manual_seed(0))
    start = backbone.density.start if backbone.has_density else None
    return start.tensors() if isinstance(start, MomentStart) else {}


def _without_home(value: Any) -> Any:
    """A config whose paths do not name the user: a model is given to others, ~ is anybody's."""
    if isinstance(value, dict):
        return {key: _without_home(inner) for key, inner in value.items()}
    home = f"{Path.home()}{os.sep}"
    if isinstance(value, str) and value.startswith(home) and len(home) > 2:
        return f"~/{value.removeprefix(home)}"
    return value


def _samples(run: Path) -> dict[str, bytes]:
    """The newest grid of samples that the run drew."""
    grids = [p for p in (run / "samples").glob("*.png") if p.is_file() and not p.is_symlink()]
    newest = max(grids, key=lambda p: (p.stat().st_mtime, p.name), default=None)
    if newest is None or newest.stat().st_size > LARGEST_PICTURE:
        return {}
    return {SAMPLES: read_file(newest, LARGEST_PICTURE)}
