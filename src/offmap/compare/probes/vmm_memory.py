"""The memory of a VMM, by /proc/PID/smaps: its guest's RAM, and its own."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from offmap.audit.guest_ram import RamRange
from offmap.errors import OffmapError

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
# proc(5): pages of hugetlb are not in Rss.
_RESIDENT = ("Rss:", "Shared_Hugetlb:", "Private_Hugetlb:")


def parse_smaps(text: str) -> list[tuple[int, int, int]]:
    """Start, end, and resident KiB of each mapping."""
    mappings: list[tuple[int, int, int]] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            mappings.append((int(header[1], 16), int(header[2], 16), 0))
        elif line.startswith(_RESIDENT) and mappings:
            start, end, kib = mappings[-1]
            mappings[-1] = (start, end, kib + int(line.split()[1]))
    return mappings


def _mappings(pid: int) -> list[tuple[int, int, int]]:
    try:
        return parse_smaps(Path(f"/proc/{pid}/smaps").read_text())
    except OSError as error:
        raise OffmapError(f"cannot read /proc/{pid}/smaps: {error.strerror}") from None


def _is_in(start: int, end: int, ranges: Iterable[RamRange]) -> bool:
    return any(start < part.va + part.bytes and part.va < end for part in ranges)


def resident_kib(pid: int, ranges: Sequence[RamRange]) -> int:
    """Resident KiB of the process in these ranges. Pages without a struct page never count.

    Raises:
        OffmapError: it has ended.
    """
    return sum(kib for start, end, kib in _mappings(pid) if _is_in(start, end, ranges))


def own_kib(pid: int, ranges: Sequence[RamRange]) -> int:
    """Resident KiB of the process outside these ranges. Raises OffmapError: it has ended."""
    return sum(kib for start, end, kib in _mappings(pid) if not _is_in(start, end, ranges))
