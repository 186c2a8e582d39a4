"""What of all mapped RAM /proc/kcore can show, and at which address.

kcore cannot read everything that is mapped, and says nothing when it does not. So what is read is chosen from
page-table entries and page flags, and the rest is counted as unread:

- a page of a vmalloc or vmap area is copied by the kernel through the direct map (``vread_iter``): one that is not in
  the direct map is never asked for. (``aligned_vread``, before 6.4, would fault on it.)
- ioremap areas, offline and poisoned pages, and pages without a ``struct page`` read as zeroes;
- cpu_entry_area, fixmap and the espfix stacks are in no segment of kcore.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offmap.audit.kcore import Segment
from offmap.audit.kinds import parse_vmallocinfo
from offmap.audit.mappings import KernelMappings
from offmap.audit.pageflags import PageFlags
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE


class Piece(NamedTuple):
    """A stretch of kernel addresses and the physical memory behind it."""

    va: int
    pa: int
    bytes: int


def clip(pieces: Iterable[Piece], intervals: Sequence[tuple[int, int]]) -> tuple[list[Piece], list[Piece]]:
    """Split pieces by physical address into what lies inside the intervals (sorted, disjoint) and what does not."""
    starts = [start for start, _ in intervals]
    inside, outside = [], []
    for piece in pieces:
        position, end = piece.pa, piece.pa + piece.bytes
        index = max(bisect_right(starts, position) - 1, 0)
        while position < end:
            while index < len(intervals) and intervals[index][1] <= position:
                index += 1
            if index == len(intervals) or intervals[index][0] >= end:
                outside.append(Piece(piece.va + position - piece.pa, position, end - position))
                break
            start, stop = max(intervals[index][0], position), min(intervals[index][1], end)
            if start > position:
                outside.append(Piece(piece.va + position - piece.pa, position, start - position))
            inside.append(Piece(piece.va + start - piece.pa, start, stop - start))
            position = stop
    return inside, outside


def union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _pieces(runs: NDArray[np.void]) -> list[Piece]:
    return [
        Piece(va, pa, size)
        for va, pa, size in zip(runs["va"].tolist(), runs["pa"].tolist(), runs["bytes"].tolist(), strict=True)
    ]


def zero_filled_intervals(flags: PageFlags, ram: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Physical ranges of RAM that kcore gives zeroes for."""
    found = []
    for start, end in ram:
        bad = flags.zero_filled_range(start // PAGE_SIZE, (end - start) // PAGE_SIZE)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], bad, [False])).astype(np.int8)))
        found += [(start + int(a) * PAGE_SIZE, start + int(b) * PAGE_SIZE) for a, b in edges.reshape(-1, 2)]
    return union(found)


def read_plan(
    mappings: KernelMappings,
    ram: Sequence[tuple[int, int]],
    segments: Sequence[Segment],
    layout_vmemmap: int,
    zero_filled: Sequence[tuple[int, int]],
    ioremap: Sequence[tuple[int, int]],
) -> tuple[list[Piece], list[Piece]]:
    """Divide all mappings of RAM into what kcore can show and what it cannot.

    Args:
        mappings: what the walk found.
        ram: physical ranges that count as RAM, sorted and disjoint.
        segments: of /proc/kcore.
        layout_vmemmap: start of the virtual memory map: a segment without physical addresses below it, or in the
            modules' space, is of the vmalloc kind.
        zero_filled: physical ranges that kcore gives zeroes for.
        ioremap: virtual ranges of ioremap areas.

    Returns:
        (readable, unread) pieces.
    """
    pieces, _ = clip(_pieces(mappings.runs), ram)
    # The same splitting, by virtual addresses: swap the two.
    spans = sorted((segment.va, segment.va + segment.size, segment) for segment in _distinct(segments))
    inside, outside = clip((Piece(p.pa, p.va, p.bytes) for p in pieces), [(a, b) for a, b, _ in spans])
    unread = [Piece(p.pa, p.va, p.bytes) for p in outside]
    by_segment = [Piece(p.pa, p.va, p.bytes) for p in inside]
    starts = [start for start, _, _ in spans]
    # Read by the kernel through the direct map, or at the address itself.
    copied: list[Piece] = []
    plain: list[Piece] = []
    for piece in by_segment:
        segment = spans[bisect_right(starts, piece.va) - 1][2]
        vmalloc = segment.pa is None and not layout_vmemmap <= segment.va < 0xFFFF_FC00_0000_0000
        (copied if vmalloc else plain).append(piece)
    direct = union((pa, pa + size) for _, pa, size in _pieces(mappings.direct))
    copied, outside = clip(copied, direct)
    unread += outside
    inside, copied_swapped = clip((Piece(p.pa, p.va, p.bytes) for p in copied), ioremap)
    unread += [Piece(p.pa, p.va, p.bytes) for p in inside]
    copied = [Piece(p.pa, p.va, p.bytes) for p in copied_swapped]
    inside, readable = clip(plain + copied, zero_filled)
    return sorted(readable), sorted(unread + inside)


def _distinct(segments: Sequence[Segment]) -> list[Segment]:
    """Segments without those that lie within another (on some kernels the modules' space is also in vmalloc's)."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.va, -s.size)):
        if not kept or segment.va >= kept[-1].va + kept[-1].size:
            kept.append(segment)
    return kept


def ioremap_areas() -> list[tuple[int, int]]:
    """ioremap and memremap areas, from /proc/vmallocinfo; their memory is not read by kcore.

    Raises:
        Undetermined: the file cannot be read.
    """
    try:
        with open("/proc/vmallocinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            areas = parse_vmallocinfo(file.read())
    except OSError as error:
        raise Undetermined(f"cannot read /proc/vmallocinfo: {error.strerror}", "run the audit as root") from None
    return union((area.start, area.end) for area in areas if "ioremap" in area.words)


def frames_of(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """Physical ranges [start, end) of what the pieces map, each byte once."""
    return union((piece.pa, piece.pa + piece.bytes) for piece in pieces)
