"""The contents of a scripted or traced module, without names that depend on the process."""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping

import torch

LEFT_OUT = re.compile(r"\.debug_pkl$|serialization_id$|traced_inputs")
"""Files of a saved module that do not change an outcome: source lines, a number, example inputs."""

VALUES = "data.pkl"
CLASS_OF_VALUE = re.compile(rb"c(__torch__[\w.]*)\n(\w+)\n")
"""The file of a module's parts, and the class of a part in it."""

QUALIFIED = re.compile(r"__torch__[\w.]*")
DEFINITION = re.compile(r"^(?:class|def) (\w+)", re.MULTILINE)
FIELD = re.compile(r"  \w+ : ")
"""In code: a name with its modules, the start of a class or function, a field of a class."""

MANGLED = re.compile(r"___torch_mangle_\d+\.?")  # depends on what was compiled before


def scripted_parts(module: torch.jit.ScriptModule) -> Iterator[tuple[str, bytes]]:
    """Names and contents, equal for equal modules; RuntimeError if the module cannot be saved.

    Each trace of a model gives its classes other names, so they are replaced by numbers, in the
    order in which the module's parts use them.
    """
    loaded = torch.jit.load(_saved(module))  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(_saved(loaded)) as saved:
        files = {name.split("/", 1)[1]: saved.read(name) for name in saved.namelist()}
    names = [f"{at.decode()}.{name.decode()}" for at, name in CLASS_OF_VALUE.findall(files[VALUES])]
    numbers = {name: at for at, name in enumerate(dict.fromkeys(names))}
    parts: list[tuple[str, bytes]] = []
    for name, content in files.items():
        if LEFT_OUT.search(name):
            continue
        if name.startswith("code/") and name.endswith(".py"):
            module_name = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
            parts += _definitions(module_name, content.decode(), numbers)
        else:
            parts.append((name, _values(content, numbers) if name == VALUES else content))
    yield from sorted(parts)


def _saved(module: torch.jit.ScriptModule) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return buffer


def _values(content: bytes, numbers: Mapping[str, int]) -> bytes:
    def numbered(match: re.Match[bytes]) -> bytes:
        return _name(f"{match[1].decode()}.{match[2].decode()}", numbers).encode()

    return CLASS_OF_VALUE.sub(numbered, content)


def _definitions(module: str, code: str, numbers: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """The classes and functions of a file of code, with the fields of each in a fixed order."""
    starts = [*DEFINITION.finditer(code)]
    ends = [*(start.start() for start in starts[1:]), len(code)]
    for start, end in zip(starts, ends, strict=True):
        body = QUALIFIED.sub(lambda m: _name(m[0], numbers), code[start.start() : end])
        lines = body.splitlines()
        fields = iter(sorted(line for line in lines if FIELD.match(line)))
        lines = [next(fields) if FIELD.match(line) else line for line in lines]
        yield _name(f"{module}.{start[1]}", numbers), "\n".join(lines).encode()


def _name(name: str, numbers: Mapping[str, int]) -> str:
    """A name that is the same in every process: with the number of its class, if a part has it."""
    plain = MANGLED.sub("", name)
    return f"{plain}#{numbers[name]}" if name in numbers else plain
