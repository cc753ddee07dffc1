"""The child process that first imports a third-party plug-in."""

import json
import os
import signal
import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from jemkit.config.probing import END, IMPORT, NoRoom, Refused, contained, error_line, read_lines
from jemkit.errors import memory_ran_out

if TYPE_CHECKING:
    from jemkit.config.registry import Registry


def child(entries: str, descriptor: str) -> None:
    """The child's part: a fork for each plug-in, and a line with the result."""
    from jemkit.config.registry import installed

    own = installed(third_party=False)
    for name, value in json.loads(entries):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            return _try(EntryPoint(name, value, "jemkit"), own, write)
        os.close(write)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _say(int(descriptor), json.dumps([read_lines(read), code]))
        os.close(read)
    return None


def _try(entry: EntryPoint, own: "Registry", descriptor: int) -> None:
    """Import a plug-in: one line at the start, and one with what is wrong; then exit."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    before = _state()
    _say(descriptor, "begins")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(IMPORT)
    fault, lasting = "", True
    try:
        with contained():
            fault = _unfit(entry.load(), entry.name, own)
    except NoRoom:
        lasting = False
    except Refused:  # what it raises is reported where it is used
        pass
    changed = [what for what, now in _state().items() if now != before[what]]
    if changed and not fault:
        fault = f"its import changes {', '.join(changed)} of the whole process"
    threads = [t.name for t in threading.enumerate() if not t.daemon and t.name != "MainThread"]
    _say(descriptor, json.dumps([fault, ", ".join(threads), lasting]))
    signal.alarm(END)


def _unfit(module: Any, name: str, own: "Registry") -> str:
    """Which of a plug-in's parts cannot be described by `jemkit config schema`."""
    from jemkit.config.recipe import part_schema
    from jemkit.config.registry import Plugin, Registry, Shelf, registry_of

    guest = registry_of([Plugin(name, module)])
    offers = {
        kind: own[kind].offers() + [o for o in guest[kind].offers() if o.name not in set(own[kind])]
        for kind in own.shelves
    }
    both = Registry({kind: Shelf(kind, of_kind) for kind, of_kind in offers.items()}, {})
    for kind in guest.shelves:
        for offer in guest[kind].offers():
            try:
                json.dumps(part_schema(offer.part, both))
            except Exception as error:
                if memory_ran_out(error):
                    raise
                return (
                    f"the options of the {kind} {offer.name!r} have no schema: {error_line(error)}"
                )
    return ""


def _state() -> dict[str, Any]:
    """Settings of the whole process, which no import may change."""
    import torch

    readers: dict[str, Callable[[], Any]] = {
        "torch's default dtype": torch.get_default_dtype,
        "torch's default device": lambda: str(torch.get_default_device()),
        "whether torch records gradients": torch.is_grad_enabled,
        "the working folder": os.getcwd,
    }
    return {what: ask() for what, ask in readers.items()}


def _say(descriptor: int, line: str) -> None:
    os.write(descriptor, f"{line}\n".encode())


def _end_with_parent() -> None:
    """A parent that was killed closes the pipe that this reads."""
    while os.read(0, 1):
        pass
    os._exit(0)
