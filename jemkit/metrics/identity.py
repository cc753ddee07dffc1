"""The identity of an evaluated model: a hash of its weights, code and plain attributes."""

import copyreg
import dis
import hashlib
import io
import re
import secrets
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jemkit.attacks.pixel_model import PixelModel
from jemkit.errors import memory_ran_out
from jemkit.runtime.files import file_hash
from jemkit.runtime.preemption import PreemptionCheck

MODULE_STATE = frozenset(nn.Module().__dict__)
PARTS = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
WRAPPERS = ("torch._dynamo", "torch.export", "torch.fx", "torch.nn.parallel")
"""Where torch defines modules whose attributes change no outcome besides `code` and the parts."""

BY_NAME = ("torch", "numpy", "jemkit", "jemkit_plugins", "jemkit_cli")
"""Packages whose code is identified by name; every protocol contains their versions."""

ATOMS = (type(None), bool, int, float, str, bytes, torch.layout)
CONTENTS: dict[type, tuple[str, ...]] = {
    types.ModuleType: ("__name__",),
    types.MethodType: ("__func__", "__self__"),
    types.CodeType: (
        "co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags",
        "co_argcount", "co_kwonlyargcount", "co_exceptiontable",
    ),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}  # fmt: skip
"""What pickle does not take apart, by the attributes that are hashed."""

MANGLED = re.compile(r"___torch_mangle_\d+\.?")  # in scripted code: depends on the process


class Identity(NamedTuple):
    """A model's hash; if something cannot be hashed, a hash that no other model has."""

    sha256: str
    unknown: str = ""  # what could not be hashed

    @property
    def card(self) -> dict[str, str]:
        """The note in a record for a hash that no other process can reproduce."""
        note = f"{self.unknown} cannot be hashed: no other evaluation joins this record"
        return {"identity": note} if self.unknown else {}


def identity_of(module: nn.Module | type) -> Identity:
    """The identity of a model: equal in all processes for equal weights, code and attributes.

    Code is the bytecode of its classes and of the functions that they call, with closures, defaults
    and the global names that they read. Code of torch, jemkit and other installed packages is
    identified by name and version. Objects are taken apart as for pickle.
    """
    walk = _Walk([type(module).__name__])
    try:
        return Identity(walk.digest(module))
    except Exception as error:  # a foreign type may raise anything
        if memory_ran_out(error):
            raise
        return Identity(secrets.token_hex(32), f"{'.'.join(walk.path[:9])}, of type {walk.kind},")


class _Walk:
    """One traversal of a model, in an order that depends only on the model."""

    def __init__(self, path: list[str]) -> None:
        self.hash = hashlib.sha256()
        self.path, self.kind = path, ""  # of the value that is being hashed
        self.values: dict[int, tuple[int, Any]] = {}  # by address, which is not reused meanwhile
        self.code: list[Any] = []  # classes and functions, hashed after the values

    def digest(self, value: Any) -> str:
        self.add(value)
        for item in self.code:  # grows
            self.path[:] = [item.__qualname__]
            (self._class if isinstance(item, type) else self._function)(item)
        return self.hash.hexdigest()

    def add(self, value: Any) -> None:
        self.kind = type(value).__qualname__
        value = value() if isinstance(value, weakref.ref) else value
        contents = next((names for kind, names in CONTENTS.items() if isinstance(value, kind)), ())
        if contents:
            self.add((self.kind, *(getattr(value, name) for name in contents)))
        elif type(value) in ATOMS:
            raw = f"{self.kind} {value!r}".encode(errors="surrogatepass")
            self.hash.update(f"{len(raw)}:".encode() + raw)
        elif type(value) is tuple:  # without a number: constants may be one object or two
            self.add(len(value))
            for item in value:
                self.add(item)
        elif id(value) in self.values:
            self.add(("again", self.values[id(value)][0]))
        else:
            self.values[id(value)] = len(self.values), value
            self._compound(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            self.add(("tensor", str(value.dtype), tuple(value.shape)))
            self.hash.update(plain.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self.add(("array", str(value.dtype), value.shape))
            self.hash.update(value.tobytes())
        elif isinstance(value, torch.jit.ScriptModule):
            self._scripted(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, type | types.FunctionType):
            version = version_of(_home(value))
            self.add((value.__qualname__, version, _home(value) if version is not None else None))
            if version is None or getattr(value, "__closure__", None):
                self.code.append(value)
        elif type(value) is list:
            self.add(("list", tuple(value)))
        elif type(value) is dict:
            self.add(("dict", len(value)))
            self._entries((key, value[key]) for _, key in self._ordered(value))
        elif type(value) in (set, frozenset):
            self.add(("set", *(digest for digest, _ in self._ordered(value))))
        else:
            self._object(value)

    def _ordered(self, values: Iterable[Any]) -> list[tuple[str, Any]]:
        """Keys or members in a canonical order, whatever the order of insertion."""
        digests = [(v if type(v) is str else _Walk(self.path).digest(v), v) for v in values]
        return sorted(digests, key=lambda pair: pair[0])

    def _entries(self, entries: Iterable[tuple[Any, Any]]) -> None:
        for name, value in entries:
            self.add(name)
            self.path.append(str(name))
            self.add(value)
            self.path.pop()

    def _module(self, value: nn.Module) -> None:
        own = {name: entry for name, entry in vars(value).items() if name not in MODULE_STATE}
        if isinstance(value, PixelModel):  # a density's settings are part of its figures
            del own["density_or_none"], own["poll"]
            own.pop("origin", None)
        if type(value).__module__.startswith(WRAPPERS):
            own = {"code": str(getattr(value, "code", ""))}
        self.add(type(value))
        self._entries(sorted(own.items()))
        for kind in PARTS:  # in their order, in which a container applies them
            self._entries(vars(value)[kind].items())
        for kind in HOOKS:
            hooks = [hook for hook in vars(value)[kind].values() if not _only_checks(hook)]
            self._entries([(kind, hooks)])

    def _scripted(self, value: Any) -> None:
        """The code and the constants of a scripted or traced module, as they are after freezing."""
        torch.jit.save(value, saved := io.BytesIO())
        saved.seek(0)
        loaded = torch.jit.load(saved).eval()  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(loaded, optimize_numerics=False)
        if "prim::SetAttr" in str(frozen.graph):
            raise ValueError("freezing leaves out an attribute that the module changes")
        code, constants = frozen.code_with_constants
        self.add(MANGLED.sub("", code))
        self.add((constants.const_mapping, dict(frozen.state_dict())))

    def _object(self, value: Any) -> None:
        reduce = copyreg.dispatch_table.get(type(value))
        parts: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(parts, str):
            inner = getattr(value, "__wrapped__", None)  # of a function with a cache
            self.add((parts, getattr(value, "__module__", None), inner))
        else:
            state, items, entries = [*parts[2:], None, None, None][:3]
            self.add((*parts[:2], state, list(items or ()), dict(entries or ())))

    def _class(self, item: type) -> None:
        """The entries of a class that can change an outcome."""
        self.add(item.__bases__)
        for name, entry in sorted(vars(item).items(), key=lambda pair: pair[0]):
            if name != "_abc_impl" and (not name.startswith("__") or callable(entry)):
                self._entries([(name, entry)])

    def _function(self, item: types.FunctionType) -> None:
        self.add(tuple(cell.cell_contents for cell in item.__closure__ or ()))
        if version_of(_home(item)) is None:
            self.add((item.__code__, item.__defaults__, item.__kwdefaults__))
            self._entries(_globals(item).items())


def _only_checks(hook: Any) -> bool:
    """Whether a hook only checks for a stop; through it, all of a training would be hashed."""
    return isinstance(getattr(hook, "__self__", None), PreemptionCheck)


def _home(value: Any) -> str:
    """The module that defines a class or function."""
    return str(getattr(value, "__globals__", {}).get("__name__", value.__module__))


def version_of(module: str) -> str | None:
    """The version of an installed package; "" if protocols contain it, None for the user's code."""
    top = module.split(".")[0]
    if top in (*BY_NAME, "__main__"):  # python -m gives __main__ the file of an installed package
        return None if top == "__main__" else ""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    if {"site-packages", "dist-packages"} & set(file.parts):
        return str(getattr(sys.modules.get(top), "__version__", ""))
    shipped = not file.name or file.is_relative_to(sysconfig.get_path("stdlib"))
    return "" if top in sys.stdlib_module_names and shipped else None


def code_of(part: object) -> str:
    """Which code of others computes a part; empty for jemkit's own.

    It is the version of its package, or a SHA-256: of its file if that is not installed or is being
    edited, of its bytecode if it has none.
    """
    kind = type(part)
    top = kind.__module__.split(".")[0]
    if top in BY_NAME:
        return ""
    if version_of(kind.__module__) is not None:
        for name in packages_distributions().get(top, []):
            return f"{name} {version(name)}"
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is not None:
        return file_hash(Path(file))
    return identity_of(kind).sha256


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of its inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The values of the global names that a function reads, also in the user's other modules."""
    codes = [*_nested(function.__code__)]
    steps = (step for code in codes for step in dis.get_instructions(code))
    names = {str(s.argval) for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    values: dict[str, Any] = {}
    spaces = [("", function.__globals__)]
    for prefix, space in spaces:  # grows
        for name in sorted(names & space.keys()):
            value = values[prefix + name] = space[name]
            own = isinstance(value, types.ModuleType) and version_of(value.__name__) is None
            if own and all(vars(value) is not other for _, other in spaces):
                spaces.append((f"{prefix}{name}.", vars(value)))
        names = {name for code in codes for name in code.co_names}
    return values
