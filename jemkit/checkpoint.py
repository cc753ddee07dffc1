"""Checkpoints: a folder of safetensors and JSON, with a manifest of hashes written last."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jemkit.errors import DataError
from jemkit.runtime.files import load_tensors, read_json, sync_folder, write_json, write_tensors

FORMAT = 1
MODEL, TENSORS = "model.safetensors", "state.safetensors"
TREE, MANIFEST = "state.json", "manifest.json"
FILES = (MODEL, TENSORS, TREE)


def save(path: Path, state: dict[str, Any]) -> str:
    """Write `state` as the folder `path`, whole or not at all; give back the model's SHA-256.

    `state["model"]` is a state dict; the rest may be any tree of dicts, lists, tensors and plain
    values, keys of dicts being strings or integers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        write_tensors(work / MODEL, state["model"])
        tensors: dict[str, Tensor] = {}
        rest = {name: value for name, value in state.items() if name != "model"}
        tree = _packed(rest, "", tensors)
        write_tensors(work / TENSORS, tensors)
        write_json(work / TREE, {"format": FORMAT, "tree": tree})
        hashes = {name: file_hash(work / name) for name in FILES}
        write_json(work / MANIFEST, {"format": FORMAT, "sha256": hashes})
        os.chmod(work, 0o755)
        _put(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return hashes[MODEL]


def _put(work: Path, path: Path) -> None:
    """Rename `work` to `path`; what stood there is deleted last, or put back on an error."""
    aside = work.with_name(f"{work.name}.old")
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(work, path)
    except BaseException:
        if aside.exists():
            os.replace(aside, path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote; a DataError where a file is missing, damaged or not ours."""
    verify(path)
    saved = read_json(path / TREE)
    state = _unpacked(saved["tree"], load_tensors(path / TENSORS))
    return {**state, "model": load_tensors(path / MODEL)}


def load_weights(path: Path) -> dict[str, Tensor]:
    """The model's weights: of a checkpoint folder, of a run's newest one, or a safetensors file."""
    if path.is_file():
        return load_tensors(path)
    folder = path if (path / MANIFEST).exists() else newest(path / "checkpoints")
    if folder is None:
        raise DataError(f"{path} is no checkpoint, no run with checkpoints and no safetensors file")
    verify(folder)
    return load_tensors(folder / MODEL)


def verify(path: Path) -> dict[str, str]:
    """Check every file against the manifest; give the hashes back."""
    if not path.is_dir():
        raise DataError(f"{path} is no checkpoint folder: it is missing or a single file")
    manifest = read_json(path / MANIFEST)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or set(hashes) != set(FILES):
        raise DataError(f"{path / MANIFEST} is not a manifest of jemkit")
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this jemkit reads {FORMAT}"
        )
    for name, wanted in hashes.items():
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing; go back to an earlier checkpoint")
        if file_hash(path / name) != wanted:
            raise DataError(
                f"{path / name} is damaged: its SHA-256 is not the manifest's; "
                "go back to an earlier checkpoint"
            )
    return dict(hashes)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint `step-N` of a folder."""
    found = [p for p in folder.glob("step-*") if (p / MANIFEST).exists()]
    return max(found, key=lambda p: p.name, default=None)


def prune(folder: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints; clear what interrupted writes left behind."""
    found = sorted(p for p in folder.glob("step-*") if (p / MANIFEST).exists())
    for old in found[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for aside in folder.glob(".best.*.old"):  # a kill between two renames left no best
        if not (folder / "best").exists():
            os.replace(aside, folder / "best")
    for orphan in [*folder.glob(".step-*"), *folder.glob(".best.*")]:
        shutil.rmtree(orphan, ignore_errors=True)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packed(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; its tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):
        items = [[k, _packed(v, f"{key}/{k}", tensors)] for k, v in value.items()]
        return {"items": items}
    if isinstance(value, list | tuple):
        return {"list": [_packed(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {key})")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [_unpacked(v, tensors) for v in value["list"]]
    return {k: _unpacked(v, tensors) for k, v in value["items"]}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict) and isinstance(b, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
