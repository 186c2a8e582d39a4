"""The picture of physical memory: where the guest's pages are in it, and what reaches them there."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offmap.audit.classify import Judged
from offmap.audit.intervals import Intervals, Ints, cut, distinct, run_starts
from offmap.audit.reach import KINDS, PhysicalCell, PhysicalMap
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SIZE

_CELLS = 4096  # as many can still be looked at one by one


def physical_map(judged: Judged, ram: Sequence[tuple[int, int]], cells: int = _CELLS) -> PhysicalMap:
    """Where the known guest pages are, each frame once.

    Args:
        ram: physical (start, end) of what the host calls RAM.
        cells: at most as many; where there are more ranges than that, buckets of a power of two take their place.
    """
    known = judged.known
    start, pages, reached = _once(judged.pfn[known], judged.pages[known], judged.reached[known])
    if len(start) <= cells:
        found = [
            _cell(pfn, count, count, mask, judged, np.array([mask]), np.array([count]))
            for pfn, count, mask in zip(start.tolist(), pages.tolist(), reached.tolist(), strict=True)
        ]
        return PhysicalMap(_addresses(ram), None, tuple(found))
    low, high = int(start[0]), int(start[-1] + pages[-1])
    bucket = 1
    while (high - low // bucket * bucket + bucket - 1) // bucket > cells:
        bucket *= 2
    base = low // bucket * bucket
    source, offset, length = cut(start, pages, np.arange(base, high + bucket, bucket, dtype=np.int64))
    place = (start[source] + offset - base) // bucket
    found = []
    edges = run_starts(np.diff(place) != 0, len(place))
    for first, last in zip(edges.tolist(), [*edges[1:].tolist(), len(place)], strict=True):
        masks, counts = reached[source[first:last]], length[first:last]
        mask = int(np.bitwise_or.reduce(masks))
        pfn = base + int(place[first]) * bucket
        found.append(_cell(pfn, bucket, int(counts.sum()), mask, judged, masks, counts))
    return PhysicalMap(_addresses(ram), bucket * PAGE_SIZE, tuple(found))


def _addresses(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[Address, Address], ...]:
    return tuple((Address(start), Address(end)) for start, end in ranges)


def _once(pfn: Ints, pages: Ints, reached: NDArray[np.uint32]) -> tuple[Ints, Ints, NDArray[np.uint32]]:
    """Each frame once, in order, as runs that the same reaches: a frame may stand behind several guest pages (KSM)."""
    if not len(pfn):
        return pfn, pages, reached
    order = np.argsort(pfn, kind="stable")
    first, reached = pfn[order], reached[order]
    all_frames = Intervals.union(pfn, pfn + pages)
    # What reaches a frame depends on nothing but the frame, so that any run which has it tells.
    start = distinct(all_frames.edges, first, pfn + pages)
    inside = all_frames.contains(start[:-1])
    begin, length = start[:-1][inside], np.diff(start)[inside]
    # Among the runs that begin at or before the frame, the one that ends last holds it.
    furthest = np.maximum.accumulate(first + pages[order])
    owner = np.searchsorted(furthest, furthest, side="left")
    mask = reached[owner[np.searchsorted(first, begin, side="right") - 1]]
    new = run_starts((begin[1:] != begin[:-1] + length[:-1]) | (mask[1:] != mask[:-1]), len(begin))
    return begin[new], np.add.reduceat(length, new), mask[new]


def _cell(
    pfn: int, pages: int, guest: int, mask: int, judged: Judged, masks: NDArray[np.integer], counts: Ints
) -> PhysicalCell:
    direct, alias = masks & judged.DIRECT != 0, masks & ~judged.DIRECT != 0
    mapped = int(counts[masks != 0].sum())
    return PhysicalCell(
        pa=Address(pfn * PAGE_SIZE),
        bytes=pages * PAGE_SIZE,
        guest_pages=guest,
        direct_map_pages=int(counts[direct].sum()),
        alias_pages=int(counts[alias].sum()),
        mapped_pages=mapped,
        unknown_pages=guest - mapped if judged.blind else 0,
        unmapped_pages=0 if judged.blind else guest - mapped,
        kinds=tuple(kind for code, kind in enumerate(KINDS) if mask >> code & 1),
    )
