"""Export of a run's model: config.json, model.safetensors and a model card."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Generator, Tensor

from jemkit.config.recipe import Recipe, resolve
from jemkit.config.registry import Registry, installed
from jemkit.data import Task
from jemkit.errors import ConfigError, DataError, JemkitError
from jemkit.metrics import record
from jemkit.metrics.record_file import Record
from jemkit.runtime import checkpoint
from jemkit.runtime.files import load_tensors, new_folder, read_json, write_bytes
from jemkit.runtime.opening import read_file
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.init_dists import MomentStart
from jemkit.sampling.moments import MOMENTS, brought
from jemkit.training import pinned
from jemkit.training.build import splits_of, task_of
from jemkit.training.model_card import CONFIG, FIGURES, SAMPLES, WEIGHTS, figures_table, table_of
from jemkit.training.model_folder import (
    FILES,
    check_vacant,
    is_exported,
    task_table,
    write_model,
)
from jemkit.training.opened import Opened, Which, open_model, run_folder
from jemkit.training.pinned import DETAILS
from jemkit.training.restore import pinned_task

log = logging.getLogger(__name__)

LARGEST_PICTURE = 16 * 2**20  # bytes of a sample grid that goes with a model


class Exported(NamedTuple):
    """The files that were written, and their source."""

    folder: Path
    checkpoint: str
    weights: str  # EMA or current
    sha256: str  # of model.safetensors
    figures: int  # of the run's record
    note: str  # why the card has no figures


def export(
    run: Path,
    *,
    out: Path | None = None,
    which: Which = "best",
    registry: Registry | None = None,
    license: str = "unknown",
    moments: bool = True,
) -> Exported:
    """Write a run's model, with averaged weights if the run has an EMA.

    The folder is self-contained: config.json contains what is needed of the data. Without
    `moments` chains that start from Gaussians of the training images need these images.
    """
    _check_run(run)
    _check_license(license)
    folder = run_folder(run).path / "export" if out is None else out
    check_vacant(folder)
    parts = registry or installed()
    return _exported(open_model(run, which), folder, parts, license, moments=moments)


def _exported(
    opened: Opened, folder: Path, registry: Registry, license: str, *, moments: bool = True
) -> Exported:
    """The weights of a run as they were saved, with the run's figures and samples."""
    source, about = RunFolder(opened.folder), opened.about
    config = _portable(source.config)
    stored, note = _record_of(source.path, about["sha256"], config)
    card = _about_run(config["recipe"], about) + "\n"
    card += figures_table(stored.figures, stored.protocol) if stored else f"{note}\n"
    config, hashes = pinned.for_others(config, source.path)
    beside: dict[str, bytes | Mapping[str, Any]] = {**_samples(source.path), **hashes}
    if stored:
        beside[FIGURES] = stored.to_json()
    task, gaussians = _of_data(opened, registry, moments=moments)
    written = write_model(
        folder, {**config, "source": about, **task}, opened.weights, card, beside=beside,
        moments=gaussians, license=license,
    )  # fmt: skip
    count = len(stored.figures) if stored else 0
    return Exported(folder, about["checkpoint"], about["weights"], written, count, note)


def save_model(
    opened: Opened,
    weights: Mapping[str, Tensor],
    folder: Path,
    registry: Registry,
    *,
    license: str | None = None,
) -> None:
    """Write these weights of an opened model to a folder, with what it was read from.

    Unchanged weights of a run are exported, and an exported model is copied. With changed weights
    figures and samples are left out.
    """
    _check_license(license or "unknown")
    check_vacant(folder)
    again = _again(opened)
    changed = again is None or not same(again.weights, {n: t.cpu() for n, t in weights.items()})
    exported = is_exported(opened.folder)
    if again is not None and not changed and not exported:
        _exported(again, folder, registry, license or "unknown")
        return
    if not changed and license is None:
        _copied(opened.folder, folder)
        return
    config = _portable(read_json(opened.folder / CONFIG))
    source, gaussians = opened.about, {}
    beside = _files(opened.folder, (DETAILS,) if changed else (DETAILS, FIGURES, SAMPLES))
    if exported:
        source = config.get("source")
        if brought(opened.folder / CONFIG) is not None:
            gaussians = load_tensors(opened.folder / MOMENTS)
    else:
        config, beside = pinned.for_others(config, opened.folder)
        task, gaussians = _of_data(again or opened, registry)
        config = {**config, **task}
    about = dict(source) if isinstance(source, dict) else {}
    if again is None:
        about["changed"] = "the checkpoint is gone, so the weights could not be compared with it"
    elif changed:
        about["changed"] = "the weights were changed after they were loaded"
    figures = f"The figures are in `{FIGURES}`." if FIGURES in beside else UNMEASURED
    card = f"{_about_run(config['recipe'], about)}\n{figures}\n"
    write_model(
        folder, {**config, "source": about}, weights, card, beside=beside, moments=gaussians,
        license=license or "unknown",
    )  # fmt: skip


UNMEASURED = "No figure of these weights was measured yet: `jemkit evaluate` measures them."


def _again(opened: Opened) -> Opened | None:
    """The same, read once more with its weights; None if its files are gone."""
    name = opened.about.get("checkpoint")
    path = opened.folder / "checkpoints" / name if name else opened.folder
    try:
        return open_model(path)
    except JemkitError:
        return None


def _files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of those files of a folder that exist."""
    return {name: read_file(folder / name) for name in names if (folder / name).is_file()}


def _copied(folder: Path, to: Path) -> None:
    """Copy the files of an exported model."""
    with new_folder(to) as work:
        for name in FILES:
            for content in _files(folder, [name]).values():
                write_bytes(work / name, content)


def _check_license(license: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,40}", license):
        raise ConfigError(f"license {license!r}: expected an identifier such as mit or cc-by-4.0")


def _check_run(run: Path) -> None:
    if (run / checkpoint.MANIFEST).exists():
        raise DataError(f"{run} is a checkpoint; give its run, {run.resolve().parents[1]}")
    if (run / WEIGHTS).exists() and not (run / "checkpoints").exists():
        raise DataError(f"{run} is an exported model already; expected a run of `jemkit train`")


def _record_of(run: Path, sha: str, config: Mapping[str, Any]) -> tuple[Record | None, str]:
    """The record of these weights on the run's own test images, or the reason why there is none."""
    if not (run / record.JSON).exists():
        return None, "No figure was measured yet: `jemkit evaluate` measures them."
    data, pin = config["recipe"]["data"]["use"], config.get("data")
    test_sha256 = pin.get("test_sha256") if isinstance(pin, dict) else None
    stored = record.of_weights(run, sha, data, test_sha256)
    if stored is None:
        return None, (
            "The run's record is of other weights than these, or of other images than those of "
            f"{data}, so its figures are left out: `jemkit evaluate` measures them again."
        )
    return stored, ""


def _about_run(recipe: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    network = recipe["backbone"].get("network", {})
    shown = ", ".join(f"{key} {value}" for key, value in network.items() if key != "use")
    return table_of(
        [
            ("backbone", recipe["backbone"]["use"]),
            ("network", f"{network.get('use', '')} ({shown})"),
            ("objective", recipe["objective"]["use"]),
            ("updater", recipe.get("updater", {}).get("use", "plain")),
            ("data set", recipe["data"]["use"]),
            *about.items(),
        ]
    )


def _of_data(
    opened: Opened, registry: Registry, *, moments: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts about the run's data, and the Gaussians of its initial distribution, if available.

    They are needed for sampling; without them the data set is requested then.
    """
    try:
        config = opened.folder / CONFIG
        recipe, pin = resolve(registry, config=config).recipe, pinned.read(config)
        splits = splits_of(recipe, pin)
        task = pinned_task(recipe, splits, pin, opened.state) or task_of(recipe, splits)
        task = replace(task, fill=False)
        return {"task": task_table(task)}, _moments(recipe, task) if moments else {}
    except JemkitError as error:
        log.warning(
            "the exported model is not self-contained, since its data are missing: %s", error
        )
        return {}, {}


def _moments(recipe: Recipe, task: Task) -> dict[str, Tensor]:
    backbone = recipe.backbone.build(task, Generator().manual_seed(0))
    density = backbone.density_or_none
    start = density.start if density else None
    return start.tensors() if isinstance(start, MomentStart) else {}


def _portable(config: Any) -> Any:
    """A config without user names and folders of this machine, since a model may be published."""
    shared = _without_home(config)
    if isinstance(start := config.get("init_from"), dict):
        run = _run_name(Path(str(start.get("path", ""))))
        shared = {**shared, "init_from": {"given": run, "path": run}}
    try:
        json.dumps(shared, allow_nan=False)
    except ValueError:
        raise DataError(f"{CONFIG} is damaged: it has a number that is not finite") from None
    if not isinstance(origins := shared.get("origins"), dict):
        return shared
    return {**shared, "origins": {key: _short(origin) for key, origin in origins.items()}}


def _run_name(path: Path) -> str:
    """The name of the run whose folder, checkpoint or export this is."""
    inside = [i for i, part in enumerate(path.parts) if part in ("checkpoints", "export")]
    return path.parts[inside[-1] - 1] if inside and inside[-1] > 0 else path.name


def _short(origin: Any) -> Any:
    """The file of a setting without its folder."""
    return Path(origin).name if isinstance(origin, str) and os.path.isabs(origin) else origin


def _without_home(value: Any) -> Any:
    """Paths in the home folder begin with ~."""
    if isinstance(value, dict):
        return {key: _without_home(inner) for key, inner in value.items()}
    home = f"{Path.home()}{os.sep}"
    if isinstance(value, str) and value.startswith(home) and len(home) > 2:
        return f"~/{value.removeprefix(home)}"
    return value


def _samples(run: Path) -> dict[str, bytes]:
    """The newest sample grid of the run; links are not followed."""
    folder = run / "samples"
    pictures = [] if folder.is_symlink() else folder.glob("*.png")
    grids = [p for p in pictures if p.is_file() and not p.is_symlink()]
    newest = max(grids, key=lambda p: (p.stat().st_mtime, p.name), default=None)
    if newest is None or newest.stat().st_size > LARGEST_PICTURE:
        return {}
    return {SAMPLES: read_file(newest, LARGEST_PICTURE)}
