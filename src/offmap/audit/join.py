"""Guest pages joined with the kernel's mappings: which kernel address reaches which page, and where these pages are.

The totals are of everything. The lists hold the first LISTED ranges, in order of kernel address: a guest whose pages
are scattered one by one over a terabyte must not make a report that nobody can open.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.audit.classify import Classified
from offmap.audit.guest_ram import GuestRam
from offmap.audit.intervals import Intervals, Ints, cut, distinct, overlaps, run_starts
from offmap.audit.kinds import Kinds
from offmap.audit.mappings import KernelMappings
from offmap.audit.reach import KINDS, LISTED, Kind, PhysicalCell, PhysicalMap, Reach, ReachTotal
from offmap.audit.regions import Layout
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_CELLS = 4096  # as many can still be looked at one by one
_CHUNK = 1 << 16  # runs of guest pages joined at once

# A stretch of guest pages and one kernel mapping of it: page index, frame, pages, kernel address, the walk's run.
_PIECE = np.dtype([("page", np.int64), ("pfn", np.int64), ("pages", np.int64), ("va", np.uint64), ("run", np.int64)])


@dataclass(frozen=True)
class Joined:
    """Fields of ``AuditResult``; ``omitted`` counts what ``aliases`` and ``direct_map_ranges`` leave out."""

    reach: tuple[ReachTotal, ...]
    aliases: tuple[Reach, ...]
    direct_map_ranges: tuple[Reach, ...]
    omitted: tuple[int, int]


def join(judged: Classified, mappings: KernelMappings, kinds: Kinds, layout: Layout, ram: GuestRam) -> Joined:
    """Join all known guest pages with all mappings.

    Args:
        kinds: of the mappings' runs.
        layout: names the regions.
        ram: the ranges that the pages are of.
    """
    pages = np.zeros(len(mappings.runs), dtype=np.int64)
    ranges = np.zeros(len(mappings.runs), dtype=np.int64)
    lists = []
    for wanted in (~mappings.is_direct, mappings.is_direct):
        kept, total = np.empty(0, dtype=_PIECE), 0
        for piece in _pieces(judged, mappings, np.flatnonzero(wanted)):
            pages += np.bincount(piece["run"], piece["pages"], len(pages)).astype(np.int64)
            ranges += np.bincount(piece["run"], minlength=len(pages))
            total += len(piece)
            kept = np.concatenate((kept, piece))
            kept = kept[np.argsort(kept["va"], kind="stable")[:LISTED]]
        lists.append((_listed(kept, mappings, kinds, layout, ram), total - len(kept)))
    (aliases, alias_rest), (direct, direct_rest) = lists
    return Joined(_totals(pages, ranges, mappings, kinds, layout), aliases, direct, (alias_rest, direct_rest))


def _pieces(judged: Classified, mappings: KernelMappings, rows: NDArray[np.intp]) -> Iterator[NDArray[np.void]]:
    """Where the known guest pages and these runs of the walk meet; as many at once as memory is to be had for."""
    runs = mappings.runs[rows]
    host = (runs["pa"] >> PAGE_SHIFT).astype(np.int64)
    host_pages = (runs["bytes"] >> PAGE_SHIFT).astype(np.int64)
    known = np.flatnonzero(judged.known & (judged.reached != 0))
    page, pfn, pages = _merged(judged.page[known], judged.pfn[known], judged.pages[known])
    order = np.argsort(host, kind="stable")
    for first in range(0, len(page), _CHUNK):
        part = slice(first, first + _CHUNK)
        low, high = pfn[part].min(), (pfn[part] + pages[part]).max()
        near = order[: np.searchsorted(host[order], high)]
        near = near[host[near] + host_pages[near] > low]
        guest, run = overlaps(pfn[part], pages[part], host[near], host_pages[near])
        guest, run = guest + first, near[run]
        found = np.empty(len(guest), dtype=_PIECE)
        start = np.maximum(pfn[guest], host[run])
        found["pfn"] = start
        found["pages"] = np.minimum(pfn[guest] + pages[guest], host[run] + host_pages[run]) - start
        found["page"] = page[guest] + start - pfn[guest]
        found["va"] = runs["va"][run] + ((start - host[run]) * PAGE_SIZE).astype(np.uint64)
        found["run"] = rows[run]
        yield found


def _merged(page: Ints, pfn: Ints, pages: Ints) -> tuple[Ints, Ints, Ints]:
    """Merge runs that continue each other: they were cut where what reaches them changes."""
    if not len(page):
        return page, pfn, pages
    first = run_starts((page[1:] != page[:-1] + pages[:-1]) | (pfn[1:] != pfn[:-1] + pages[:-1]), len(page))
    return page[first], pfn[first], np.add.reduceat(pages, first)


def _listed(
    pieces: NDArray[np.void], mappings: KernelMappings, kinds: Kinds, layout: Layout, ram: GuestRam
) -> tuple[Reach, ...]:
    first = np.cumsum([0, *(part.pages for part in ram.ranges)])
    part = np.searchsorted(first, pieces["page"], side="right") - 1
    offset = (pieces["page"] - first[part]) * PAGE_SIZE
    region, regions = layout.names(pieces["va"])
    run = mappings.runs[pieces["run"]]
    columns = (
        *(pieces[name].tolist() for name in ("va", "pfn", "pages")),
        *(run[name].tolist() for name in ("level", "writable", "nx")),
        *(part.tolist(), offset.tolist(), region.tolist()),
        *(kinds.kind[pieces["run"]].tolist(), kinds.caller[pieces["run"]].tolist()),
    )
    return tuple(
        Reach(
            va=Address(va),
            pa=Address(pfn * PAGE_SIZE),
            bytes=pages * PAGE_SIZE,
            kind=KINDS[kind],
            region=regions[region],
            page_size=PAGE_SIZE << 9 * (level - 1),
            writable=writable,
            executable=not nx,
            userspace_addr=Address(ram.ranges[part].va + offset),
            guest_phys_addr=None if (gpa := ram.ranges[part].guest_phys_addr) is None else gpa + offset,
            caller=kinds.callers[caller],
        )
        for va, pfn, pages, level, writable, nx, part, offset, region, kind, caller in zip(*columns, strict=True)
    )


def _totals(
    pages: Ints, ranges: Ints, mappings: KernelMappings, kinds: Kinds, layout: Layout
) -> tuple[ReachTotal, ...]:
    """One total for each sort of mapping; the direct map before all else, then most pages first."""
    hit = np.flatnonzero(ranges)
    runs = mappings.runs[hit]
    region, regions = layout.names(runs["va"])
    sorts = np.stack(
        (kinds.kind[hit], region, runs["level"], runs["writable"], runs["nx"], kinds.caller[hit]), axis=1
    ).astype(np.int64)
    sorts, group = np.unique(sorts, axis=0, return_inverse=True)
    group = group.reshape(-1)
    all_pages, all_ranges = (
        np.bincount(group, each[hit], len(sorts)).astype(np.int64).tolist() for each in (pages, ranges)
    )
    found = [
        ReachTotal(
            kind=KINDS[kind],
            region=regions[region],
            page_size=PAGE_SIZE << 9 * (level - 1),
            writable=bool(writable),
            executable=not nx,
            caller=kinds.callers[caller],
            pages=total_pages,
            ranges=total_ranges,
        )
        for (kind, region, level, writable, nx, caller), total_pages, total_ranges in zip(
            sorts.tolist(), all_pages, all_ranges, strict=True
        )
    ]
    return tuple(sorted(found, key=lambda total: (total.kind is not Kind.DIRECT_MAP, -total.pages)))


def physical_map(judged: Classified, ram: Sequence[tuple[int, int]], cells: int = _CELLS) -> PhysicalMap:
    """Where the known guest pages are, each frame once.

    Args:
        ram: physical (start, end) of what the host calls RAM.
        cells: at most as many; where there are more ranges than that, buckets of a power of two take their place.
    """
    known = judged.known
    start, pages, reached = _once(judged.pfn[known], judged.pages[known], judged.reached[known])
    ranges = tuple((Address(low), Address(high)) for low, high in ram)
    if len(start) <= cells:
        rows = zip(start.tolist(), pages.tolist(), reached.reshape(-1, 1), pages.reshape(-1, 1), strict=True)
        return PhysicalMap(ranges, None, tuple(_cell(judged, *row) for row in rows))
    low, high = int(start[0]), int(start[-1] + pages[-1])
    bucket = 1
    while (high - low // bucket * bucket + bucket - 1) // bucket > cells:
        bucket *= 2
    base = low // bucket * bucket
    source, offset, length = cut(start, pages, np.arange(base, high + bucket, bucket, dtype=np.int64))
    place = (start[source] + offset - base) // bucket
    found = []
    for part in np.split(np.arange(len(place)), run_starts(np.diff(place) != 0, len(place))[1:]):
        pfn = base + int(place[part[0]]) * bucket
        found.append(_cell(judged, pfn, bucket, reached[source[part]], length[part]))
    return PhysicalMap(ranges, bucket * PAGE_SIZE, tuple(found))


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


def _cell(judged: Classified, pfn: int, pages: int, masks: NDArray[np.integer], counts: Ints) -> PhysicalCell:
    """The cell of these frames, whose guest pages are ``counts`` that ``masks`` reach."""
    direct, alias = masks & judged.DIRECT != 0, masks & ~judged.DIRECT != 0
    guest, mapped = int(counts.sum()), int(counts[masks != 0].sum())
    mask = int(np.bitwise_or.reduce(masks))
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
