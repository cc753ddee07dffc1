"""Files that are written whole or not at all, and read without running anything in them."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from jemkit.errors import DataError


def write_bytes(path: Path, content: bytes) -> None:
    """Write through a temporary file beside `path`, fsynced, then renamed over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    packed: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        if t.untyped_storage().data_ptr() in stored:  # safetensors takes no tied tensors
            t = t.clone()
        stored.add(t.untyped_storage().data_ptr())
        packed[name] = t
    write_bytes(path, safetensors.torch.save(packed))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own; nothing in it is executed."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a safetensors file, or a damaged one: {error}") from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """$JEMKIT_CACHE, else the user's cache."""
    named = os.environ.get("JEMKIT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jemkit"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
