"""The identity of an evaluated model: a hash of its weights, code and plain attributes."""

import copyreg
import enum
import functools
import hashlib
import secrets
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jemkit.metrics.bytecode import content, followed_methods, globals_of, home, names_in, package
from jemkit.metrics.scripted import scripted_parts

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
MODULE_STATE = frozenset(nn.Module().__dict__)  # weights, children and hooks are hashed one by one

NOT_CODE = frozenset(
    {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__"}
    | {"__firstlineno__", "__static_attributes__", "__orig_bases__", "__parameters__", "__hash__"}
    | {"__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__"}
)
"""Entries of a class that do not change an outcome, or contain an address."""

ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range)
NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
BUILT_IN = (
    types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType
    | types.MethodWrapperType | types.ClassMethodDescriptorType
)  # fmt: skip
DESCRIPTORS = types.MemberDescriptorType | types.GetSetDescriptorType

WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "GuardsFn")
"""Modules of torch whose attributes change no outcome; the last checks an exported one's inputs."""


class Identity(NamedTuple):
    """A model's hash; if something cannot be hashed, a hash that no other model has."""

    sha256: str
    unknown: str = ""  # what could not be hashed

    @property
    def card(self) -> dict[str, str]:
        """The note in a record for a hash that no other process can reproduce."""
        if not self.unknown:
            return {}
        return {
            "identity": f"{self.unknown} cannot be hashed: no other evaluation joins this record"
        }


def identity_of(module: nn.Module) -> Identity:
    """The identity of a model: equal in all processes for equal weights, code and attributes.

    Code is the bytecode of its classes and of the functions that they call, with closures, defaults
    and the global names that they read. Code of torch, jemkit and other installed packages is
    identified by name and version.
    """
    walk = _Walk()
    try:
        walk.add(module, type(module).__name__)
        walk.finish()
    except _Unknown as error:
        return Identity(secrets.token_hex(32), str(error))
    except RecursionError:
        return Identity(secrets.token_hex(32), f"{type(module).__name__}, which is nested too deep")
    return Identity(walk.hash.hexdigest())


class _Unknown(Exception):
    """A value that cannot be hashed."""


class _Walk:
    """One traversal of a model, in an order that depends only on the model."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.numbers: dict[int, int] = {}
        self.values: list[Any] = []  # so that no address is reused
        self.code: deque[tuple[Any, str]] = deque()

    def finish(self) -> None:
        """Classes and functions, each once, in the order of their first occurrence."""
        while self.code:
            item, where = self.code.popleft()
            if isinstance(item, type):
                self._class_body(item, where)
            else:
                self._function_body(item, where, followed=True)

    def add(self, value: Any, where: str) -> None:
        if type(value) in ATOMS or isinstance(value, NAMED):
            self._say(type(value).__name__, repr(value))
        elif type(value) in (tuple, torch.Size):  # without an index: constants may be shared or not
            self._sequence("tuple", value, where)
        elif isinstance(value, frozenset):
            self._unordered(value, where)
        elif self._new(value):
            self._compound(value, where)

    def _say(self, *words: str) -> None:
        for word in words:
            raw = word.encode(errors="surrogatepass")
            self.hash.update(f"{len(raw)}:".encode() + raw)

    def _new(self, value: Any) -> bool:
        """Whether a value occurs for the first time; otherwise its index is hashed."""
        number = self.numbers.setdefault(id(value), len(self.numbers))
        if number < len(self.values):
            self._say("again", str(number))
            return False
        self.values.append(value)
        return True

    def _compound(self, value: Any, where: str) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, where)
        elif isinstance(value, np.ndarray | np.generic):
            self._array(np.asarray(value), where)
        elif isinstance(value, nn.Module):
            self._module(value, where)
        elif isinstance(value, type | types.FunctionType):
            self._code_by_name(value, where)
        elif isinstance(value, list):
            self._sequence(type(value).__name__, value, where)
        elif isinstance(value, dict | types.MappingProxyType):
            self._say(type(value).__name__)
            self._mapping(value, where)
        elif isinstance(value, set):
            self._unordered(value, where)
        else:
            self._other(value, where)

    def _other(self, value: Any, where: str) -> None:
        if isinstance(value, enum.Enum):
            self._say("enum", type(value).__qualname__, value.name)
        elif isinstance(value, types.MethodType):
            self._sequence("method", (value.__func__, value.__self__), where)
        elif isinstance(value, BUILT_IN):
            self._say("builtin", value.__qualname__)
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, type(None) | types.ModuleType | type):
                self.add(owner, where)
        elif isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, functools.partial):
            self._sequence("partial", (value.func, value.args, value.keywords), where)
        elif isinstance(value, property):
            self._sequence("property", (value.fget, value.fset, value.fdel), where)
        elif isinstance(value, staticmethod | classmethod):
            self._sequence(type(value).__name__, (value.__func__,), where)
        elif isinstance(value, DESCRIPTORS):
            self._say("descriptor", value.__name__)
        elif isinstance(value, PurePath):
            self._say("path", str(value))
        elif isinstance(value, types.CodeType):
            self._code(value, where)
        elif isinstance(value, weakref.ref):
            self._sequence("weak", (value(),), where)
        elif isinstance(value, torch.Generator):
            self._sequence("generator", (str(value.device), value.get_state()), where)
        else:
            self._object(value, where)

    def _tensor(self, value: Tensor, where: str) -> None:
        try:
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            raw = plain.flatten().view(torch.uint8).numpy().data
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            raise _Unknown(f"{where}, a tensor of {value.layout}") from None
        self._say("tensor", str(value.dtype), str(list(value.shape)))
        self.hash.update(raw)

    def _array(self, value: "np.ndarray[Any, Any]", where: str) -> None:
        self._say("array", str(value.dtype), str(value.shape))
        if value.dtype.hasobject:
            self._sequence("objects", value.flatten().tolist(), where)
        else:
            self.hash.update(np.ascontiguousarray(value).tobytes())

    def _sequence(self, name: str, values: Iterable[Any], where: str) -> None:
        items = list(values)
        self._say(name, str(len(items)))
        for at, item in enumerate(items):
            self.add(item, f"{where}[{at}]" if len(items) > 1 else where)

    def _mapping(self, value: Mapping[Any, Any], where: str) -> None:
        """Keys in the order of their names: two dictionaries of equal entries are equal."""
        for key in _ordered(value, where):
            self.add(key, where)
            self.add(value[key], f"{where}.{key}" if isinstance(key, str) else f"{where}[{key!r}]")

    def _unordered(self, value: set[Any] | frozenset[Any], where: str) -> None:
        self._sequence("set", _ordered(value, where), where)

    def _module(self, value: nn.Module, where: str) -> None:
        if isinstance(value, torch.jit.ScriptModule):  # as it is saved
            try:
                for name, saved in scripted_parts(value):
                    self._say(name, str(len(saved)))
                    self.hash.update(saved)
            except RuntimeError:
                raise _Unknown(f"{where}, a scripted module that cannot be saved") from None
            return
        self.add(type(value), where)
        generated = hasattr(type(value), "_generated_forward") or _is(value, "GraphModule")
        if generated:  # its class contains the code of its graph
            self._say("graph", str(value.code))
        own = {k: v for k, v in vars(value).items() if k not in MODULE_STATE}
        if generated or _is(value, *WRAPPERS):
            own = {}  # the inner module is evaluated
        if _is(value, "PixelModel"):  # a density's settings are part of its figures
            own = {k: v for k, v in own.items() if k not in ("density_or_none", "poll")}
        self._mapping(own, where)
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, part in sorted(getattr(value, kind).items()):
                self._say(kind, name)
                self.add(part, f"{where}.{name}")
        if type(value).__module__.startswith("torch.nn.modules.container"):
            self._say(*value._modules)  # a container applies its parts in their order
        for kind in HOOKS:
            hooks = getattr(value, kind).values()
            if hooks:
                self._sequence(kind, hooks, f"{where}, a hook")

    def _object(self, value: Any, where: str) -> None:
        kind: Any = type(value)
        plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
        state = dict(_state(value))
        held = isinstance(value, tuple | str | bytes | int | float | complex | bytearray)
        if plain and not held and (state or hasattr(value, "__dict__")):
            self._say("object")
            self.add(kind, where)
            self._mapping(state, where)
            return
        try:
            reducer = copyreg.dispatch_table.get(kind)
            parts = value.__reduce_ex__(4) if reducer is None else reducer(value)
        except Exception:  # a foreign type may raise anything
            raise _Unknown(f"{where}, of type {kind.__qualname__},") from None
        if isinstance(parts, str):
            self._say("global", parts)
            return
        made, args, *rest = (list(p) if isinstance(p, Iterator) else p for p in parts)
        self._sequence("reduced", (made, args, *rest), where)

    def _code_by_name(self, value: Any, where: str) -> None:
        """A class or function by its name; one's own is followed later."""
        version = package(home(value))
        self._say(type(value).__name__, value.__qualname__)
        if version is not None:
            self._say(home(value), version)
        if version is None or (isinstance(value, types.FunctionType) and value.__closure__):
            self.code.append((value, where))

    def _class_body(self, value: type, where: str) -> None:
        followed = followed_methods(value) if issubclass(value, nn.Module) else vars(value).keys()
        for base in value.__bases__:
            self.add(base, where)
        for name, entry in sorted(vars(value).items()):
            if name in NOT_CODE or name.startswith("__pydantic"):
                continue
            self._say(name)
            inner = entry.__func__ if isinstance(entry, staticmethod | classmethod) else entry
            if isinstance(inner, types.FunctionType):
                self._say(type(entry).__name__)
                if self._new(inner):
                    self._function_body(inner, f"{where}.{name}", followed=name in followed)
            else:
                self.add(entry, f"{where}.{name}")

    def _function_body(self, value: types.FunctionType, where: str, *, followed: bool) -> None:
        cells = [content(cell) for cell in value.__closure__ or ()]
        self._sequence("closure", cells, where)
        if package(home(value)) is not None:
            return
        self._code(value.__code__, where)
        self._sequence("defaults", value.__defaults__ or (), where)
        self._mapping(value.__kwdefaults__ or {}, where)
        if followed:
            for name in globals_of(value.__code__):
                if name in value.__globals__:
                    self._global(name, value.__globals__[name], value.__code__, where)

    def _global(self, name: str, value: Any, code: types.CodeType, where: str) -> None:
        self._say(name)
        if not isinstance(value, types.ModuleType) or package(value.__name__) is not None:
            self.add(value, f"{name}, which {where} reads")
            return
        for inner in sorted(set(names_in(code)) & vars(value).keys()):
            self._say(inner)
            self.add(vars(value)[inner], f"{name}.{inner}, which {where} reads")

    def _code(self, code: types.CodeType, where: str) -> None:
        self._say("code", str((code.co_argcount, code.co_kwonlyargcount, code.co_flags)))
        self._say(*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars)
        self.hash.update(code.co_code + code.co_exceptiontable)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, where)
            else:
                self.add(constant, where)


def _is(value: object, *names: str) -> bool:
    """Whether a value has a library's class of this name, without importing the library."""
    return any(
        base.__name__ in names and base.__module__.split(".")[0] in ("torch", "jemkit")
        for base in type(value).__mro__
    )


def _ordered(values: Iterable[Any], where: str) -> list[Any]:
    """Keys or members in a canonical order, whatever the order of insertion."""

    def name(value: Any) -> tuple[str, str]:
        if isinstance(value, tuple | frozenset):
            parts = [name(v) for v in value]
            return type(value).__name__, str(parts if isinstance(value, tuple) else sorted(parts))
        if type(value) in ATOMS or isinstance(value, (*NAMED, PurePath, enum.Enum)):
            return type(value).__name__, repr(value)
        if isinstance(value, type | types.FunctionType):
            return type(value).__name__, f"{value.__module__}.{value.__qualname__}"
        raise _Unknown(f"{where}, with a key of type {type(value).__qualname__},")

    named = [(name(value), at, value) for at, value in enumerate(values)]
    if len({key for key, *_ in named}) < len(named):
        raise _Unknown(f"{where}, with keys of one name,")
    return [value for _, _, value in sorted(named, key=lambda entry: entry[0])]


def _state(value: Any) -> Iterator[tuple[str, Any]]:
    """An object's attributes, those of slots too."""
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                yield name, getattr(value, name)
    yield from getattr(value, "__dict__", {}).items()
