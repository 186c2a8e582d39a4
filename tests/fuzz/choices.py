"""Decisions made of the bytes of an input. Each input is a case; a small change of it is a small change of the case."""

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Choices:
    """Reads decisions off `data`. At its end every decision is the ordinary one (0)."""

    __slots__ = ("_at", "_data", "_size")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there is anything left to decide by."""
        return self._at < self._size

    def byte(self) -> int:
        """0 to 255."""
        at = self._at
        if at >= self._size:
            return 0
        self._at = at + 1
        return self._data[at]

    def word(self, size: int) -> int:
        """An integer of `size` bytes."""
        at = self._at
        self._at = at + size
        return int.from_bytes(self._data[at : at + size], "little")

    def bytes(self, size: int) -> bytes:
        """`size` bytes, of which those after the end are 0."""
        at = self._at
        self._at = at + size
        return self._data[at : at + size].ljust(size, b"\0")

    def below(self, count: int) -> int:
        """0 to `count` - 1; `count` is 256 at most."""
        return self.byte() % count

    def of(self, values: Sequence[_T]) -> _T:
        """One of `values`, 256 at most; the first one is the ordinary one."""
        return values[self.byte() % len(values)]

    def rarely(self, times: int) -> bool:
        """True about once in so many times, 128 at most."""
        return self.byte() > 255 - 256 // times
