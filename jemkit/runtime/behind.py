"""Work done behind a run's back: one piece at a time, in order, its failures never lost."""

from collections.abc import Callable
from contextvars import copy_context
from threading import Thread


class Behind:
    """One thread for one piece of work; what fails in it is raised by the next `wait`, once."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._failed: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work`; what was begun before it must be done: `wait` first."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failed = error

        # No daemon, so that an interpreter that ends waits for it; with this thread's context.
        self._thread = Thread(target=copy_context().run, args=(run,), name="behind")
        self._thread.start()

    def wait(self) -> None:
        """Return when the work is done; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
