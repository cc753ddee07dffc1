"""A run's model as a folder for others: config.json, model.safetensors and a model card."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from jemkit import checkpoint, record
from jemkit.errors import ConfigError, DataError
from jemkit.figures import Figure
from jemkit.record import Record
from jemkit.restoring import Which, chosen, run_folder
from jemkit.runtime.files import read_json, sync_folder, write_json, write_tensors, write_text
from jemkit.runtime.folder import versions
from jemkit.subjects import WEIGHTS

FORMAT = 1
"""Of an exported model's folder."""

CONFIG, CARD = "config.json", "README.md"


class Exported(NamedTuple):
    """What was written, and from what."""

    folder: Path
    checkpoint: str
    weights: str  # averaged or live
    sha256: str  # of model.safetensors
    figures: int  # in the card
    note: str  # why the card has none


def export(run: Path, *, out: Path | None = None, which: Which = "best") -> Exported:
    """Write a run's model, its weights averaged where it keeps an average."""
    _check_run(run)
    source = run_folder(run)
    saved = chosen(source, which)
    folder = source.path / "export" if out is None else out
    check_vacant(folder)
    state = checkpoint.load(saved)
    averaged = state["ema"] is not None
    sha = checkpoint.verify(saved)[checkpoint.MODEL]
    config = source.config
    if not isinstance(config.get("recipe"), dict):
        raise DataError(f"{source.path / CONFIG} holds no recipe; it is not a run's config")
    weights = "averaged" if averaged else "live"
    about = {"run": source.path.name, "checkpoint": saved.name, "sha256": sha, "weights": weights}
    found, note = _record_of(source.path, sha)
    card = _about_run(config["recipe"], about) + "\n" + (_figures(found) if found else f"{note}\n")
    written = write_model(
        folder, {**config, "source": about}, state["ema"] if averaged else state["model"], card
    )
    count = len(found.figures) if found else 0
    return Exported(folder, saved.name, weights, written, count, note)


def write_model(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], card: str
) -> str:
    """Write the folder of a model, whole or not at all; give back the weights' SHA-256.

    `config` has the recipe; `card` is the model card's text.
    """
    check_vacant(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write_tensors(work / WEIGHTS, weights)
        sha = checkpoint.file_hash(work / WEIGHTS)
        made = {"format": FORMAT, "jemkit": versions()["jemkit"], "sha256": {WEIGHTS: sha}}
        write_json(work / CONFIG, {"versions": versions(), **config, **made})
        write_text(work / CARD, _page(folder.name, config["recipe"], card, sha))
        os.chmod(work, 0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return sha


def verify(folder: Path) -> str:
    """Check an exported model's weights against its config.json; give back their SHA-256."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise DataError(f"{folder} has export format {found!r}; this jemkit reads {FORMAT}")
    wanted = config.get("sha256", {}).get(WEIGHTS)
    if not (folder / WEIGHTS).is_file() or checkpoint.file_hash(folder / WEIGHTS) != wanted:
        raise DataError(f"{folder / WEIGHTS} is missing or damaged: its SHA-256 is not {wanted}")
    return str(wanted)


def push(folder: Path, repo: str) -> str:
    """Upload an exported model to the Hugging Face hub; give back where it is."""
    verify(folder)
    try:
        hub = import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"--push needs the package huggingface_hub ({error}): pip install 'jemkit[hub]'"
        ) from None
    try:
        api = hub.HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder)))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        raise DataError(f"{folder} was not pushed to {repo}: {error}") from None


def check_vacant(folder: Path) -> None:
    """Refuse a folder that an export cannot have."""
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{folder} exists already and is not empty; choose another --out")


def _check_run(run: Path) -> None:
    if (run / checkpoint.MANIFEST).exists():
        raise DataError(f"{run} is a checkpoint; give its run, {run.resolve().parents[1]}")
    if (run / WEIGHTS).exists() and not (run / "checkpoints").exists():
        raise DataError(f"{run} is an exported model already; wanted a run of `jemkit train`")


def _record_of(run: Path, sha: str) -> tuple[Record | None, str]:
    """The record of these weights, or why there is none."""
    if not (run / record.JSON).exists():
        return None, "No figure was measured yet: `jemkit evaluate` measures them."
    found = record.load(run)
    if found.subject.get("sha256") != sha:
        return None, (
            "The run's record is of other weights than these, so its figures are left out: "
            "`jemkit evaluate` measures them anew."
        )
    return found, ""


def _page(name: str, recipe: Mapping[str, Any], card: str, sha: str) -> str:
    parts = [recipe[table]["use"] for table in ("backbone", "objective")]
    tags = "\n".join(f"- {tag}" for tag in ("joint-energy-based-model", *parts))
    head = f"---\nlibrary_name: jemkit\npipeline_tag: image-classification\ntags:\n{tags}\n---\n"
    return (
        f"{head}\n# {name}\n\n{card}\n## Use\n\n"
        f"```\njemkit evaluate {name}\n```\n\n"
        f"`{WEIGHTS}` has SHA-256 `{sha}`; `{CONFIG}` holds the recipe. Images go in as [0, 1].\n"
    )


def _about_run(recipe: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    network = recipe["backbone"].get("network", {})
    shown = ", ".join(f"{key} {value}" for key, value in network.items() if key != "use")
    rows = [
        ("backbone", recipe["backbone"]["use"]),
        ("network", f"{network.get('use', '')} ({shown})"),
        ("objective", recipe["objective"]["use"]),
        ("data set", recipe["data"]["use"]),
        *((key, value) for key, value in about.items()),
    ]
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"| | |\n| --- | --- |\n{lines}\n"


def _figures(found: Record) -> str:
    """Every figure, and below how each was measured."""
    rows = "\n".join(
        f"| {f.name}{_label(f)} | {f.value:.4g} | {_interval(f)} | {f.n} |" for f in found.figures
    )
    cards = "\n".join(_protocol(f, found.protocol) for f in found.figures)
    return (
        f"## Figures\n\n| figure | value | 95 % interval | n |\n| --- | --- | --- | --- |\n{rows}\n"
        f"\n## How they were measured\n\nAll of them: {_told(found.protocol)}.\n\n{cards}\n"
    )


def _label(figure: Figure) -> str:
    return "" if figure.protocol.get("standard", True) else " (NON-STANDARD protocol)"


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{figure.low:.4g} to {figure.high:.4g}"


def _protocol(figure: Figure, common: Mapping[str, Any]) -> str:
    own = {k: v for k, v in figure.protocol.items() if k not in common or common[k] != v}
    return f"- {figure.name}: {_told(own)}"


def _told(protocol: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} ({_told(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in protocol.items()
    )
