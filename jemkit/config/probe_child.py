"""The child process that first imports a third-party plug-in."""

import json
import os
import signal
import threading
from contextlib import suppress
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from jemkit.config.probing import END, IMPORT, Refused, Verdict, contained, error_line
from jemkit.errors import memory_ran_out

if TYPE_CHECKING:
    from jemkit.config.registry import Registry


def child(entries: str) -> None:
    """The child's part: a fork for each plug-in, and a line with the verdict."""
    from jemkit.config.registry import installed

    own = installed(third_party=False)
    for name, value in json.loads(entries):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(2, 1)
            return _try(EntryPoint(name, value, "jemkit"), own, write)
        os.close(write)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.set_blocking(read, False)  # its own children may hold the other end
        report = b""
        with suppress(BlockingIOError):
            report = os.read(read, 1 << 16)
        os.close(read)
        print(json.dumps(_verdict(report.decode(), code)), flush=True)
    return None


def _try(entry: EntryPoint, own: "Registry", descriptor: int) -> None:
    """Import a plug-in, report what is wrong, and end as an interpreter does."""
    before = _state()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(IMPORT)
    fault, lasting = "", True
    try:
        with contained():
            fault = _unfit(entry.load(), entry.name, own)
    except KeyboardInterrupt as error:
        fault = error_line(error)
    except Refused as error:  # what it raises is reported where it is used
        lasting = not memory_ran_out(error)
    changed = [what for what, now in _state().items() if now != before[what]]
    if changed and not fault:
        fault = f"its import changes {', '.join(changed)} of the whole process"
    threads = [t.name for t in threading.enumerate() if not t.daemon and t.name != "MainThread"]
    os.write(descriptor, json.dumps([fault, ", ".join(threads), lasting]).encode())
    signal.alarm(END)


def _verdict(report: str, code: int) -> Verdict:
    ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        why = "its import was killed (SIGKILL), perhaps because memory ran out"
        return Verdict(why, lasting=False)
    if not report and code == -signal.SIGALRM:
        return Verdict(f"its import does not end within {IMPORT} s")
    if not report:
        return Verdict(f"it ends the interpreter when it is imported ({ended})")
    fault, threads, lasting = json.loads(report)
    if code == -signal.SIGALRM:
        fault = f"it keeps the process from ending ({threads or 'no thread'} is still running)"
    elif code:
        fault = f"it ends the process itself ({ended})"
    return Verdict(fault, lasting)


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
                if memory_ran_out(error):  # not a fault of the plug-in
                    raise
                why = error_line(error)
                return f"the options of the {kind} {offer.name!r} have no schema: {why}"
    return ""


def _state() -> dict[str, Any]:
    """Settings of the whole process, which no import may change."""
    import torch

    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "whether torch records gradients": torch.is_grad_enabled(),
        "the working folder": os.getcwd(),
    }
