"""Values that are created when they are first used."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Late(Generic[T]):
    """A value, or the function that creates it; no description of a part shows it."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []

    @property
    def made(self) -> bool:
        return bool(self._made)

    def get(self) -> T:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]

    def set(self, value: T) -> None:
        self._made = [value]
