"""A model built by a user's own Python file, `my.py:build`, with its weights and preprocessing."""

import contextlib
import logging
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from jemkit.data import Dataset
from jemkit.errors import (
    ConfigError,
    DataError,
    JemkitError,
    MisfitError,
    UsageError,
    memory_ran_out,
)
from jemkit.models.networks import seeded_init
from jemkit.runtime.files import file_hash
from jemkit.runtime.opening import MIB, read_file
from jemkit.training.pinned import listed
from jemkit.training.pretrained import read_state_dict

log = logging.getLogger(__name__)


class Code(NamedTuple):
    """A function, a class or a module of a Python file that gives a torch module."""

    file: Path
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


class Preparation(NamedTuple):
    """How a module of a user's file becomes a model of images in [0, 1]."""

    weights: Path | None = None  # a file of its state_dict
    key: str | None = None  # of the state_dict, if the file has several
    mean: Sequence[float] = ()  # of each channel, subtracted; none: 0
    std: Sequence[float] = ()  # of each channel, divided by; none: 1


AS_BUILT = Preparation()  # its own weights, and images in [0, 1]


class Normalised(nn.Module):
    """(x - mean) / std for images x [B, C, H, W] in [0, 1], then a module."""

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor([*values], device="cpu").view(-1, 1, 1)
            self.register_buffer(name, column)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (self.get_buffer(name).to(x) for name in ("mean", "std"))
        return self.module((x - mean) / std)  # type: ignore[no-any-return]


def code_of(path: Path) -> Code | None:
    """The two parts of `my.py:build`; None if a path names no Python file."""
    file, colon, name = str(path).rpartition(":")
    if not colon and path.suffix == ".py" and not path.is_dir():
        raise UsageError(
            f"{path} is Python code: add the function in it that builds the model, such as "
            f"{path}:build"
        )
    if not colon or not file.endswith(".py"):
        return None
    if not name.isidentifier():
        raise UsageError(f"{path}: expected the name of a function after the colon, {file}:build")
    return Code(Path(file), name)


def numbers_of(text: str | None, option: str) -> tuple[float, ...]:
    """The numbers of an option such as 0.49,0.48,0.45."""
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text}: expected a number for each channel, such as 0.49,0.48,0.45"
        ) from None


def prepared_module(
    code: Code, how: Preparation, data: Dataset, device: torch.device
) -> Normalised:
    """The module that the code builds, with its weights, for the images of a data set."""
    if how.key is not None and how.weights is None:
        raise ConfigError(f"--key {how.key} selects weights of a file: name it with --weights")
    mean, std = _scaling(how, int(data.load("test").x.shape[1]))
    module = built(code)
    if how.weights is not None:
        load_weights(module, how.weights, code, how.key)
    return Normalised(module, mean, std).to(device)


def described(code: Code, how: Preparation, data: str) -> dict[str, Any]:
    """What a record says of the model, but for its hash."""
    card: dict[str, Any] = {"file": code.file.name, "model": code.name}
    card |= {"code_sha256": file_hash(code.file), "data": data, "trained_radius_px": None}
    if how.weights is not None:
        card |= {"weights": how.weights.name, "weights_sha256": file_hash(how.weights)}
    if how.mean or how.std:
        card |= {"mean": [*how.mean], "std": [*how.std]}
    return card


def built(code: Code) -> nn.Module:
    """Run the file and the function in it; MisfitError if that gives no torch module.

    torch's random state, default type and gradient mode are restored. What the code prints goes to
    standard error.
    """
    if not code.file.is_file():
        raise DataError(f"{code.file} does not exist, or is no file: expected Python code")
    log.warning("%s is run as Python code, with all rights that you have", code.file)
    space = _executed(code)
    if not hasattr(space, code.name):
        own = [n for n, v in vars(space).items() if callable(v) and _home(v) == space.__name__]
        has = f"it defines {listed(own)}" if own else "it defines no function"
        raise ConfigError(f"{code.file} has no {code.name}: {has}")
    made = getattr(space, code.name)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise MisfitError(f"{code} is of type {_kind(made)}: expected a function")
        with _reported(code, f"{code.name}()"):
            made = made()
    if not isinstance(made, nn.Module):
        raise MisfitError(f"{code} returns {_kind(made)}: expected a torch.nn.Module")
    return made


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _home(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


def _executed(code: Code) -> types.ModuleType:
    """The module of a file, whose folder is searched first for what it imports."""
    path = code.file.resolve()
    space = types.ModuleType(f"user_code_{path.stem}")
    space.__file__ = str(path)
    sys.modules[space.__name__] = space
    sys.path.insert(0, str(path.parent))
    content = read_file(path, 16 * MIB)
    with _reported(code, "it"):
        exec(compile(content, str(path), "exec"), vars(space))
    return space


@contextlib.contextmanager
def _reported(code: Code, what: str) -> Iterator[None]:
    """Run a user's code; whatever it raises is one message with the line."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with seeded_init(Generator().manual_seed(0)), contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if memory_ran_out(error):
            raise
        lines = _lines(error, str(code.file.resolve()))
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{code.file}{lines}: {what} raises {type(error).__name__}: {text}"
        ) from None
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def _lines(error: BaseException, file: str) -> str:
    """The last line of a file that an error comes from, as `, line 3`."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    at, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            at = trace.tb_lineno
        trace = trace.tb_next
    return "" if at is None else f", line {at}"


def load_weights(module: nn.Module, path: Path, code: Code, key: str | None = None) -> None:
    """Load a file of weights, which is not executed; every name and shape must match.

    A missing counter of batch norm, num_batches_tracked, is no error.
    """
    own = module.state_dict()
    state = read_state_dict(path, own, key)
    weights = state.weights
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    other = [n for n in weights if n not in own]
    shapes = [
        f"{n} has {list(weights[n].shape)} instead of {list(own[n].shape)}"
        for n in own
        if n in weights and weights[n].shape != own[n].shape
    ]
    faults = (("missing: ", missing), ("unexpected: ", other), ("", shapes))
    if wrong := [f"{what}{listed(names, 3)}" for what, names in faults if names]:
        source = f"{path} under {state.key}" if state.key else f"{path}"
        raise DataError(
            f"the weights of {source} do not fit the model of {code}: {'; '.join(wrong)}"
        )
    module.load_state_dict({**own, **weights})
    if state.key:
        log.warning("the weights of %s are those under the key %s", path, state.key)


def _scaling(how: Preparation, channels: int) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each channel."""
    columns = []
    for option, values, usual in (("--mean", how.mean, 0.0), ("--std", how.std, 1.0)):
        if len(values) not in (0, 1, channels):
            raise ConfigError(
                f"{option} has {len(values)} numbers, expected 1 or one for each channel of the "
                f"images, which have {channels}"
            )
        low = 0.0 if option == "--mean" else 1e-6
        if not all(low <= value <= 1 for value in values):
            raise UsageError(
                f"{option} {','.join(map(str, values))}: expected numbers in units of the pixel "
                "range [0, 1], and positive ones for --std; divide those of 0..255 by 255"
            )
        columns.append([*(values or (usual,))] * (channels if len(values) < 2 else 1))
    return columns[0], columns[1]


@contextlib.contextmanager
def first_pass(code: Code, data: str) -> Iterator[None]:
    """A block in which the module sees its first images; its errors are one message."""
    try:
        yield
    except JemkitError:
        raise
    except Exception as error:  # a user's module may raise anything
        if memory_ran_out(error):
            raise
        lines = _lines(error, str(code.file.resolve()))
        text = " ".join(str(error).split())[:300]
        raise MisfitError(
            f"the model of {code}{lines} raises {type(error).__name__} for images of {data}: "
            f"{text}. If it is for other images, name their data set (--dataset)"
        ) from None
