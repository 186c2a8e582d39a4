"""Looking for a secret in many pieces of memory: within each, across neighbours, and across pages that are none."""

from collections.abc import Sequence
from typing import Protocol


class Sought(Protocol):
    """What is looked for (`offmap.attack.target.Target`)."""

    overlap: int

    def within(self, data: bytes) -> int: ...

    def begins(self, page: bytes) -> bytes: ...

    def ends(self, page: bytes) -> bytes: ...

    def across(self, begins: Sequence[bytes], ends: Sequence[bytes]) -> bool: ...


class Seeker:
    """Looks at one piece after the other. Pieces whose places are neighbours are looked at together.

    Args:
        target: what is looked for.
        anywhere: pages that are no neighbours are put together too, as those of a guest are whose page tables are
            hidden.
    """

    def __init__(self, target: Sought, anywhere: bool = False) -> None:
        self._target, self._anywhere = target, anywhere
        self._rest, self._next = b"", 0
        self._begins: list[bytes] = []
        self._ends: list[bytes] = []

    def look(self, place: int, data: bytes) -> int | None:
        """Where the secret stands in this piece, or begins in the one before it; None if it does not.

        Args:
            place: of its first byte: an address, or an offset in a file.
        """
        rest = self._rest if place == self._next else b""
        whole = rest + data
        overlap = self._target.overlap
        self._rest, self._next = whole[-overlap:] if overlap else b"", place + len(data)
        at = self._target.within(whole)
        if at >= 0:
            return place - len(rest) + at
        if self._anywhere:
            self._begins += filter(None, [self._target.begins(data)])
            self._ends += filter(None, [self._target.ends(data)])
        return None

    def joined(self) -> bool:
        """Whether the secret begins in one of the pages that were looked at, and goes on in any other.

        Raises:
            Lost: a page has what may be a part of it, and no page the rest; or there are too many such pages.
        """
        return bool(self._begins or self._ends) and self._target.across(self._begins, self._ends)
