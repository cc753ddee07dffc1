"""An untrusted file of weights, checked before anything reads it and never executed."""

import hashlib
import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from jemkit.errors import DataError, memory_ran_out
from jemkit.runtime.opening import read_file
from jemkit.training.pretrained.layouts import Format
from jemkit.training.pretrained.probing import StateDict, state_dict_by, state_dict_in

LIMIT = 4 * 2**30
"""Size limit of a file; a wrn-28-10 with its buffer has 270 million bytes."""

MAGIC = 0x1950A86A20F9469CFC6C
"""The number at the start of a file of torch.save before torch 1.6."""

STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
PARTS = {
    "collections Counter",  # of a schedule's milestones
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    *(f"torch {name}Storage" for name in STORAGES),
}
"""The names that a pickle of weights may use. torch's own list is longer: it allows
bytearray(10**12)."""


def read_checkpoint(path: Path, format: Format | None = None, key: str | None = None) -> StateDict:
    """The weights of a .pt, .pth or .safetensors file; DataError if it is anything else.

    They are found by their names, under any key and prefix; if several state dicts fit, `format`
    and `key` select one.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected a checkpoint, .pt, .pth or .safetensors")
    data = read_file(path, LIMIT)
    try:
        state = state_dict_in(loaded(data), format, key)
        _check_weights(state.weights, len(data))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return state._replace(file=path.name, sha256=hashlib.sha256(data).hexdigest())


def read_state_dict(path: Path, names: Collection[str], key: str | None = None) -> StateDict:
    """The weights of a .pt, .pth or .safetensors file by these names, under any key and prefix.

    If none fits, the weights with most of the names, for a message. DataError if the file has no
    weights, or if several state dicts fit and differ; `key` selects one.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected weights, .pt, .pth or .safetensors")
    data = read_file(path, LIMIT)
    try:
        state = state_dict_by(loaded(data), names, key)
        _check_weights(state.weights, len(data))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return state


def loaded(data: bytes) -> Any:
    """The object that torch.save or safetensors wrote; DataError if it is anything else.

    An OOM is raised as it is.
    """
    try:
        return _loaded(data)
    except DataError:
        raise
    except pickle.UnpicklingError:  # torch's own text suggests loading without its protection
        raise DataError("its pickle is damaged or contains more than weights") from None
    except Exception as error:  # a damaged file raises many types of errors
        legacy = data[:2] == b"\x80\x02"  # where a damaged size can ask for any amount of memory
        if memory_ran_out(error) and not (legacy and isinstance(error, RuntimeError)):
            raise
        why = " ".join(str(error).split())[:200] or "no reason given"
        what = f"{type(error).__name__}: {why}"
        raise DataError(f"it is damaged or not a checkpoint: {what}") from None


def _loaded(data: bytes) -> Any:
    if data[:4] == b"PK\x03\x04":
        data = _clean_zip(data)
    elif data[:2] == b"\x80\x02":
        _check_legacy(data)
    elif data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        return safetensors.torch.load(data)
    else:
        raise DataError(_stranger(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _stranger(data: bytes) -> str:
    wanted = "expected a file of torch.save or safetensors"
    if not data:
        return f"the file is empty; {wanted}"
    if data[:1] == b"\x80":
        return f"a Python pickle that torch.save did not write, and pickles run code; {wanted}"
    return f"not a checkpoint: it begins with {data[:8]!r}; {wanted}"


def _clean_zip(data: bytes) -> bytes:
    """The same entries in a new archive, once each is known to be harmless and intact.

    torch's reader and Python's interpret some headers differently (torch gives uninitialised memory
    for an entry marked as a folder). From the new archive torch reads exactly what was checked.
    """
    clean = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w") as rewritten:
        _check_entries(archive, len(data))
        for entry in archive.infolist():
            content = archive.read(entry)  # checks the CRC-32
            if PurePosixPath(entry.filename).name == "data.pkl":
                _scan(io.BytesIO(content))
            rewritten.writestr(entry.filename, content)
    return clean.getvalue()


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Every entry has a name of its own inside the folder, uncompressed; one is a pickle."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise DataError(f"the archive's entry {name!r} leaves its folder; it is not read")
    if len(set(names)) < len(names):
        raise DataError("the archive holds two entries of one name; it is not read")
    last = [PurePosixPath(name).name for name in names]
    if "constants.pkl" in last:
        raise DataError("this is a TorchScript program; expected weights, a state_dict")
    declared = sum(entry.file_size for entry in entries)
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or declared > size:
        raise DataError(
            f"the archive declares {declared:,} bytes in a file with {size:,}, compressed or "
            "overlapping; torch.save stores entries uncompressed, so this may be a zip bomb and is "
            "not read"
        )
    if last.count("data.pkl") != 1:
        raise DataError("a zip archive that torch.save did not write: it has no data.pkl")


def _check_legacy(data: bytes) -> None:
    """The five pickles of a file before torch 1.6; the storages follow them as raw bytes."""
    stream = io.BytesIO(data)
    if MAGIC not in _scan(stream):
        raise DataError(_stranger(data))
    for _ in range(4):
        _scan(stream)


def _scan(stream: io.BytesIO) -> set[int]:
    """The integers of a pickle, of which nothing is executed; reject what no weights need."""
    numbers: set[int] = set()
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST") and argument not in PARTS:
            name = str(argument).replace(" ", ".")
            raise DataError(
                f"its pickle calls {name}, which no file of weights needs and which could run "
                "code; nothing was executed. Ask its author for a state_dict or safetensors"
            )
        if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise DataError(
                f"its pickle uses {operation.name}, of a protocol that torch.save does not write "
                "by default; nothing was executed. Save it again as a state_dict"
            )
        if isinstance(argument, int):
            numbers.add(argument)
    return numbers


def _check_weights(weights: Mapping[str, Tensor], size: int) -> None:
    """Reject tensors that the file cannot contain, or with which no network can compute."""
    for name, tensor in weights.items():
        stored = tensor.untyped_storage().nbytes()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise DataError(f"{name} is not a plain dense tensor")
        if tensor.nbytes > stored:
            raise DataError(
                f"{name} unfolds to {list(tensor.shape)} from {stored:,} bytes; expected one "
                "stored number per element"
            )
        if not tensor.isfinite().all():
            raise DataError(f"{name} contains NaN or inf")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in weights.values()}
    if sum(storage.nbytes() for storage in storages.values()) > size:
        raise DataError(f"its tensors declare more bytes than the file's {size:,}")
