"""Checking inside a long step whether to stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from jemkit.errors import Preempted

PATIENCE = 2.0
"""Seconds after which a step checks for a stop; shorter steps are completed."""


class PreemptionCheck:
    """Raises Preempted if `stop()` is true: between steps, and in every pass of a long step."""

    def __init__(self, stop: Callable[[], bool], updates: Callable[[], int]) -> None:
        self.stop, self.updates = stop, updates
        self.patience = PATIENCE
        self._checked, self._before = 0.0, 0

    def between(self) -> None:
        self._checked = time.monotonic()
        if self.stop():
            raise Preempted

    def begin(self) -> None:
        """Begin work that may be dropped until an update has moved the weights."""
        self._checked, self._before = time.monotonic(), self.updates()

    def inside(self) -> None:
        late = time.monotonic() >= self._checked + self.patience
        if late and self.updates() == self._before:
            self.between()

    def before_pass(self, *_: object) -> None:
        """The hook of `passes`; a model's identity omits it, since no output depends on it."""
        self.inside()

    @contextmanager
    def passes(self, model: nn.Module, *, on: bool) -> Iterator[None]:
        """Check in every pass of the model, so that chains and attacks can be interrupted.

        Passes of its first layer are checked too, since PYLD's steps use that layer alone.
        """
        first = next(m for m in model.modules() if not any(m.children()))
        modules = (model, first) if on else ()
        handles = [m.register_forward_pre_hook(self.before_pass) for m in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
