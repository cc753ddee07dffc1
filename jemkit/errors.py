"""The errors that a user can cause, each with its exit code."""

import errno


class JemkitError(Exception):
    """One message that says what was given, what was expected and what to do; shown without a
    traceback."""

    exit_code = 1
    reported = False  # whether another process of the group reports it


class ConfigError(JemkitError, ValueError):
    """A recipe, option or combination of parts that cannot run."""

    exit_code = 3


class UsageError(ConfigError):
    """A value that is never valid."""

    exit_code = 2


class UnknownName(ConfigError, LookupError):
    """A name that no plug-in registers."""


class MisfitError(ConfigError, TypeError):
    """Parts that do not fit together."""


class Diverged(JemkitError):
    """A step whose loss or gradient was not finite; the weights are those before it."""

    exit_code = 4


class Preempted(JemkitError):
    """A requested stop; the run is saved."""

    exit_code = 5


class OutOfMemory(JemkitError):
    """An OOM that smaller passes would not prevent, or that cannot be retried."""

    exit_code = 7

    def __init__(self, message: str, *, undone: bool = True) -> None:
        super().__init__(message)
        self.undone = undone  # whether the state is that before the failure


class DataError(JemkitError, ValueError):
    """A file or folder that is missing, damaged or not of the expected kind."""

    exit_code = 6


class NotFinite(DataError):
    """Outputs of a model that are NaN or infinite."""


NO_MEMORY = (
    "allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED",
    "could not create a primitive", "unable to find an engine",
)  # fmt: skip
"""How torch's allocators, and libraries that it uses, report an OOM."""
NO_ROOM = (*NO_MEMORY, "start new thread", "failed to map segment")
"""The same outside of a network's passes, where threads start and libraries are loaded."""


def memory_ran_out(error: BaseException) -> str:
    """One line that says that memory ran out, from an error or its causes; else empty."""
    visited: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in visited:
        visited.append(now)
        if _of_memory(now):
            return (str(now).strip() or type(now).__name__).splitlines()[0][:300]
        now = now.__cause__ or now.__context__
    return ""


def _of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, SystemError):  # C code that got no memory, and did not say so
        return "without exception set" in str(error)
    is_torch_error = (
        isinstance(error, RuntimeError | ImportError) or type(error).__name__ == "SafetensorError"
    )
    return isinstance(error, MemoryError) or (
        is_torch_error and any(s in str(error) for s in NO_ROOM)
    )
