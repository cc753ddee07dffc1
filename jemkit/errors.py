"""The errors a person can cause, each with the exit code that the command line gives it."""


class JemkitError(Exception):
    """What came, what was wanted and what to do, in one message; no traceback is shown for it."""

    exit_code = 1


class ConfigError(JemkitError, ValueError):
    """A recipe, option or combination of parts that cannot run."""

    exit_code = 3


class UsageError(ConfigError):
    """A value that no run could take."""

    exit_code = 2


class UnknownName(ConfigError, LookupError):
    """A name that no plug-in offers."""


class MisfitError(ConfigError, TypeError):
    """Parts that do not fit each other."""


class Diverged(JemkitError):
    """A step whose loss or gradient was not finite; the weights are those before it."""

    exit_code = 4


class Preempted(JemkitError):
    """A stop that was asked for; the run is saved."""

    exit_code = 5


class OutOfMemory(JemkitError):
    """Memory that ran out where no smaller pass would help, or nobody may take one."""

    exit_code = 7

    def __init__(self, message: str, *, undone: bool = True) -> None:
        super().__init__(message)
        self.undone = undone  # whether all is as before what failed


class DataError(JemkitError, ValueError):
    """A file or folder that is missing, damaged or not what is wanted there."""

    exit_code = 6
