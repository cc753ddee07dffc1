"""What kernels report of their steps, such as an acceptance rate, on its way to the log."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_REPORTS: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("reports", default=None)


@contextmanager
def reports() -> Iterator[dict[str, list[Tensor]]]:
    """Collect what is reported inside the block: a scalar for each step of a chain, by name."""
    records: dict[str, list[Tensor]] = {}
    token = _REPORTS.set(records)
    try:
        yield records
    finally:
        _REPORTS.reset(token)


def report(info: Mapping[str, Tensor], name: str) -> None:
    """The means over the rows, which stay on their device; nothing where nobody collects them."""
    records = _REPORTS.get()
    if records is not None:
        for key, value in info.items():
            records.setdefault(f"{name}/{key}", []).append(value.detach().float().mean())
