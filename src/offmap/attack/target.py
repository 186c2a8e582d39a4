"""What the attacker is after, and how it is known that it was got.

The attack is told a digest of the secret, never the secret: nothing of ours holds it, and what is found is verified.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from offmap.attack.linux import Leaf, Linux, Lost, Process
from offmap.errors import OffmapError

PLANTED = "OFFMAP-SECRET-"
"""What stands in front of a planted secret: 32 hexadecimal digits."""

_PLANTED = re.compile(PLANTED.encode() + rb"([0-9a-f]{32})")
_USER_HALF = 1 << 47
_OVERLAP = 64  # bytes; more than a planted secret has
_STEP = 1 << 16


@dataclass(frozen=True)
class Found:
    """The secret: where it stands, by words for people, and its bytes."""

    where: str
    bytes: int


class Target(ABC):
    """A secret."""

    name: str

    @abstractmethod
    def find(self, guest: Linux) -> Found | None:
        """Go for it in a guest whose kernel has been found; None if it is not where it should be."""

    @abstractmethod
    def within(self, data: bytes) -> int:
        """Where the secret stands in these bytes; -1 if it does not."""


class PlantedSecret(Target):
    """Thirty-two hexadecimal digits behind a mark, in the memory of a process.

    Args:
        process: the name of the guest's processes that may have it.
        digest: the SHA-256 of the digits.
    """

    def __init__(self, process: str, digest: str) -> None:
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise OffmapError(f"{digest[:80]!r} is no SHA-256", "give the 64 hexadecimal digits that the guest printed")
        self._process, self._digest = process, digest
        self.name = f"the secret planted in {process}"

    def find(self, guest: Linux) -> Found | None:
        for process in _named(guest, self._process):
            for name, leaves in _areas(guest, process):
                rest, before = b"", 0
                for leaf in leaves:
                    if leaf.va != before:
                        rest = b""
                    before = leaf.va + leaf.bytes
                    for start in range(0, leaf.bytes, 4096):
                        data = rest + guest.physical(leaf.pa + start, min(4096, leaf.bytes))
                        at = self.within(data)
                        if at >= 0:
                            va = leaf.va + start - len(rest) + at
                            return Found(f"{process.name} ({process.pid}), {name}, {va:#x}", 32)
                        rest = data[-_OVERLAP:]
        return None

    def within(self, data: bytes) -> int:
        for match in _PLANTED.finditer(data):
            if hashlib.sha256(match[1]).hexdigest() == self._digest:
                return match.start(1)
        return -1


def _named(guest: Linux, name: str) -> list[Process]:
    """Processes of this name, the newest first.

    Raises:
        Lost: there are none.
    """
    found = [each for each in guest.processes() if each.name == name and each.memory]
    if not found:
        raise Lost(f"the guest has no process {name}")
    return found[::-1]


def _areas(guest: Linux, process: Process) -> Iterator[tuple[str, Iterator[Leaf]]]:
    """Where a process has secrets, the likeliest places first."""
    table = guest.top_table(process.memory)
    start, end = (guest.field(process.memory, "mm_struct", name) for name in ("start_brk", "brk"))
    if not 0 < start <= end < _USER_HALF:
        raise Lost("mm_struct.brk is not what it should be")
    yield "heap", guest.leaves(table, start & -4096, end)
    yield "its other memory", (leaf for leaf in guest.leaves(table, 0, _USER_HALF) if leaf.writable)
