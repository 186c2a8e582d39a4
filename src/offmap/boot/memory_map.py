"""Guest-physical memory: what is RAM, what of it is free, and the guest's E820 map."""

from collections.abc import Iterable
from itertools import pairwise

from offmap.errors import OffmapError
from offmap.memory.iomem import PhysicalRange, intersect, merged, subtract
from offmap.uapi.bootparam import E820_ACPI, E820_MAX_ENTRIES_ZEROPAGE, E820_RAM, E820_RESERVED
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

LOW_MEMORY_END = 0x9F000
"""Conventional memory ends here, below where a PC keeps its EBDA and VGA."""

HIGH_MEMORY_START = 0x100000

BOOT_AREAS = (PhysicalRange(0, HIGH_MEMORY_START), PhysicalRange(16 << 20, 80 << 20))
"""Where Linux begins, and where it is unpacked: from its pref_address on, and distributions' take 56 MiB."""

ACPI_AREA = PhysicalRange(0xE0000, 0x100000)
"""ACPI tables, where a PC's BIOS has its own."""


class MemoryMap:
    """RAM, the free part of it, and the pages that are kept from the guest.

    Args:
        ram: guest-physical ranges of RAM.
        excluded: pages kept from the guest. Nothing is placed in them, and E820 reserves them. Where they are at more
            places than E820 has entries for, RAM between those that are nearest to each other is reserved too.

    Raises:
        OffmapError: pages below 1 MiB are excluded.
    """

    def __init__(self, ram: Iterable[PhysicalRange], excluded: Iterable[PhysicalRange] = ()) -> None:
        self.excluded = merged(intersect(ram := list(ram), excluded))
        if self.excluded and self.excluded[0].start < HIGH_MEMORY_START:
            raise OffmapError(
                f"the page at guest-physical {self.excluded[0].start:#x} is needed to boot and may not be used",
                "start the guest again: it gets other memory",
            )
        usable = [PhysicalRange(PAGE_SIZE, LOW_MEMORY_END), PhysicalRange(HIGH_MEMORY_START, 1 << 62)]
        self.ram = intersect(ram, usable)
        whole = merged(self.ram)
        # Of each piece of RAM an entry, and of each place two: its own, and the RAM behind it. And the ACPI tables.
        self.excluded = _at_most((E820_MAX_ENTRIES_ZEROPAGE - 1 - len(whole)) // 2, self.excluded, whole)
        self.free = subtract(self.ram, self.excluded)

    def take(
        self,
        what: str,
        size: int,
        *,
        at: int | None = None,
        alignment: int = PAGE_SIZE,
        above: int = 0,
        below: int = 1 << 32,
    ) -> int:
        """Take `size` bytes: at address `at`, or else as high as possible below `below`, and not below `above`.

        Returns:
            The guest-physical address.

        Raises:
            OffmapError: there is no room.
        """
        size = max(-(-size // PAGE_SIZE) * PAGE_SIZE, PAGE_SIZE)
        if at is not None:
            if any(r.start <= at and at + size <= r.end for r in self.free):
                return self._taken(at, size)
        else:
            for r in reversed(self.free):
                start = (min(r.end, below) - size) // alignment * alignment
                if start >= max(r.start, above):
                    return self._taken(start, size)
        total = sum(r.size for r in self.ram)
        raise OffmapError(
            f"{what} needs {format_size(size)} in one piece and does not fit into {format_size(total)} of RAM",
            "give the guest more with --memory-size",
        )

    def _taken(self, start: int, size: int) -> int:
        self.free = subtract(self.free, [PhysicalRange(start, start + size)])
        return start

    def e820(self) -> list[tuple[int, int, int]]:
        """(address, size, type) of every entry, in order: as many as boot_params has room for."""
        entries = [(r.start, r.size, E820_RAM) for r in merged(subtract(self.ram, self.excluded))]
        entries += [(r.start, r.size, E820_RESERVED) for r in self.excluded]
        entries.append((ACPI_AREA.start, ACPI_AREA.size, E820_ACPI))
        return sorted(entries)


def _at_most(count: int, ranges: list[PhysicalRange], ram: list[PhysicalRange]) -> list[PhysicalRange]:
    """At most so many ranges with all of these, and the smallest gaps between them; none leaves its piece of RAM."""
    gaps = [PhysicalRange(before.end, after.start) for before, after in pairwise(ranges)]
    inside = sorted((gap for gap in gaps if intersect([gap], ram) == [gap]), key=lambda gap: gap.size)
    return merged([*ranges, *inside[: max(len(ranges) - count, 0)]])
