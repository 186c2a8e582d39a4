"""The verdict, and how it follows from what was seen of each page.

The order matters: one mapped page makes the whole EXPOSED; failing that, one page that could not be judged makes it
UNKNOWN; HIDDEN is what is left, and only if there was something to hide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN, Frames
from offmap.audit.guest_ram import GuestRam
from offmap.audit.mappings import KernelMappings, covered
from offmap.audit.reach import Reach
from offmap.audit.regions import Layout
from offmap.errors import ExitStatus

__all__ = ["PageCounts", "Verdict", "alias_ranges", "classify", "excluded_pages", "mapped_guest_ranges"]

PAGE = 4096


class Verdict(Enum):
    """Three values, never a bool."""

    HIDDEN = "hidden"
    EXPOSED = "exposed"
    UNKNOWN = "unknown"

    @property
    def exit_status(self) -> ExitStatus:
        return {
            Verdict.HIDDEN: ExitStatus.DONE,
            Verdict.EXPOSED: ExitStatus.EXPOSED,
            Verdict.UNKNOWN: ExitStatus.UNDETERMINED,
        }[self]


@dataclass
class PageCounts:
    """How many pages of guest RAM are what.

    ``ram_pages`` is all; of these ``excluded_pages`` are kept from the guest and judged apart
    (``excluded_mapped_pages`` of them are mapped, ``excluded_direct_pages`` in the direct map). The rest is
    ``pages_populated`` (their frame is known), ``not_populated_pages`` (there is no page) or unknown.
    ``direct_map_pages`` and ``alias_pages`` may overlap; ``mapped_pages`` are their union. ``unknown_pages`` also
    counts populated pages that no mapping was found of while part of the page tables could not be read.
    """

    ram_pages: int = 0
    pages_populated: int = 0
    not_populated_pages: int = 0
    direct_map_pages: int = 0
    alias_pages: int = 0
    mapped_pages: int = 0
    unknown_pages: int = 0
    excluded_pages: int = 0
    excluded_mapped_pages: int = 0
    excluded_direct_pages: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def verdict(self, guessed: bool) -> Verdict:
        """Judge. Ranges that were guessed can be found exposed, never hidden: there may be more RAM elsewhere.

        Pages kept from the guest for being aliased are nobody's. But who says that it keeps a page of the direct map
        from its guest may say so of any page, and nothing here can check it.
        """
        if self.mapped_pages:
            return Verdict.EXPOSED
        if self.unknown_pages or guessed or self.excluded_direct_pages or not self.pages_populated:
            return Verdict.UNKNOWN
        return Verdict.HIDDEN


def excluded_pages(ram: GuestRam) -> NDArray[np.bool_]:
    """Which pages, in the order of the ranges, lie wholly in a guest-physical range that the guest does not get."""
    parts = []
    for part in ram.ranges:
        mask = np.zeros(part.pages, dtype=np.bool_)
        if part.guest_phys_addr is not None:
            for start, size in ram.excluded:
                first = -(-(start - part.guest_phys_addr) // PAGE)
                last = (start + size - part.guest_phys_addr) // PAGE
                mask[max(first, 0) : max(last, 0)] = True
        parts.append(mask)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)


def classify(
    before: Frames, after: Frames, excluded: NDArray[np.bool_], mappings: KernelMappings
) -> tuple[PageCounts, NDArray[np.uint64]]:
    """Judge each page.

    Args:
        before, after: the frames as they were before and after the walk; a page that differs is unknown.
        excluded: pages kept from the guest.
        mappings: what the walk found.

    Returns:
        The counts, and the frames (sorted, distinct) of the guest's populated pages.
    """
    known = (before.state == POPULATED) & (after.state == POPULATED) & (before.pfn == after.pfn)
    changed = (before.state != after.state) | (before.pfn != after.pfn)
    empty = (before.state == EMPTY) & (after.state == EMPTY)
    direct = known & covered(mappings.direct, before.pfn)
    alias = known & covered(mappings.aliases, before.pfn)
    mapped = direct | alias
    guest = ~excluded
    unknown = ~known & ~empty
    blind = known & ~mapped if mappings.unreadable else np.zeros_like(known)

    def count(mask: NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(mask))

    counts = PageCounts(
        ram_pages=len(known),
        pages_populated=count(known & guest),
        not_populated_pages=count(empty & guest),
        direct_map_pages=count(direct & guest),
        alias_pages=count(alias & guest),
        mapped_pages=count(mapped & guest),
        unknown_pages=count((unknown | blind) & guest),
        excluded_pages=count(excluded),
        excluded_mapped_pages=count(mapped & excluded),
        excluded_direct_pages=count(direct & excluded),
    )
    if count(unknown & ~changed & guest):
        counts.reasons.update(after.reasons or before.reasons)
    moved = count(changed & (before.state != UNKNOWN) & guest)
    if moved:
        counts.reasons["came, went or moved during the audit"] = moved
    if count(blind & guest):
        example = mappings.unreadable[0]
        counts.reasons[f"kernel page tables could not be read at {example.va:#x}: {example.reason}"] = count(
            blind & guest
        )
    return counts, np.unique(before.pfn[known & guest])


def mapped_guest_ranges(before: Frames, ram: GuestRam, mappings: KernelMappings) -> list[tuple[int, int]]:
    """Guest-physical (address, bytes) of all pages that the kernel maps, merged, where their address is known."""
    mapped = (before.state == POPULATED) & (
        covered(mappings.direct, before.pfn) | covered(mappings.aliases, before.pfn)
    )
    found: list[tuple[int, int]] = []
    position = 0
    for part in ram.ranges:
        pages = np.flatnonzero(mapped[position : position + part.pages]).astype(np.uint64)
        position += part.pages
        if part.guest_phys_addr is None or not len(pages):
            continue
        found += [(part.guest_phys_addr + first * PAGE, (end - first) * PAGE) for first, end in _stretches(pages)]
    return sorted(found)


def alias_ranges(frames: NDArray[np.uint64], mappings: KernelMappings, layout: Layout) -> list[Reach]:
    """Every mapping outside the direct map of these frames (sorted, distinct), in order of address."""
    aliases = mappings.aliases
    low = np.searchsorted(frames, aliases["pa"] >> np.uint64(12))
    high = np.searchsorted(frames, (aliases["pa"] + aliases["bytes"]) >> np.uint64(12))
    found = []
    for index in np.flatnonzero(high > low).tolist():
        run = aliases[index]
        inside = frames[low[index] : high[index]]
        for stretch in _stretches(inside):
            pa = stretch[0] * PAGE
            va = int(run["va"]) + pa - int(run["pa"])
            found.append(
                Reach(
                    va,
                    pa,
                    (stretch[1] - stretch[0]) * PAGE,
                    layout.kind(va),
                    layout.name(va),
                    PAGE << 9 * (int(run["level"]) - 1),
                    bool(run["writable"]),
                    not bool(run["nx"]),
                )
            )
    return found


def _stretches(frames: NDArray[np.uint64]) -> Sequence[tuple[int, int]]:
    """Sorted, distinct numbers as [first, last + 1) stretches."""
    breaks = np.flatnonzero(np.diff(frames) != 1) + 1
    starts = frames[np.concatenate(([0], breaks))]
    ends = frames[np.concatenate((breaks - 1, [len(frames) - 1]))]
    return [(int(start), int(end) + 1) for start, end in zip(starts, ends, strict=True)]
