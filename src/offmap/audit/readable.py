"""What of all mapped RAM /proc/kcore can show, and at which address.

kcore cannot read everything that is mapped, and says nothing when it does not. So page-table entries and page flags
decide what is read. The rest is counted as unread:

- A page of a vmalloc or vmap area is copied by the kernel through the direct map (``vread_iter``). One that is not in
  the direct map is never asked for. (``aligned_vread``, before 6.4, would fault on it.)
- ioremap areas, offline and poisoned pages, and pages without a ``struct page`` read as zeroes.
- Memory that is not System RAM (persistent memory, what the command line set aside) is in no segment of kcore
  (``memory_beside_ram``).
- cpu_entry_area, fixmap and the espfix stacks are in no segment of kcore.
- The kernel's image is mapped up to a multiple of 2 MiB, and kcore's segment ends with its last byte
  (``cleanup_highmap`` in arch/x86/mm/init_64.c). What is behind is free RAM, which a hidden guest may get: taken off
  the direct map, it is mapped there and nowhere else. ``image_tail`` gives what to read by other means.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offmap.audit.kcore import Segment
from offmap.audit.kinds import VMALLOCINFO, parse_vmallocinfo
from offmap.audit.mappings import KernelMappings
from offmap.audit.pageflags import PageFlags
from offmap.audit.procfs import read_path
from offmap.audit.regions import KERNEL_TEXT, VADDR_END, Layout
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

# Fills a buffer from a kernel address.
Read = Callable[[int, memoryview], None]


class Piece(NamedTuple):
    """A stretch of kernel addresses and the physical memory behind it."""

    va: int
    pa: int
    bytes: int

    def part(self, start: int, end: int) -> "Piece":
        """Its bytes from offset ``start`` to ``end``."""
        return Piece(self.va + start, self.pa + start, end - start)


def clip(
    pieces: Iterable[Piece], intervals: Sequence[tuple[int, int]], *, virtual: bool = False
) -> tuple[list[Piece], list[Piece]]:
    """Split pieces into what lies inside the intervals (sorted, disjoint) and what does not.

    Args:
        virtual: the intervals are of virtual addresses, not of physical ones.
    """
    starts = [start for start, _ in intervals]
    inside, outside = [], []
    for piece in pieces:
        base, done = piece.va if virtual else piece.pa, 0
        at = bisect_right(starts, base) - 1
        if at >= 0 and base + piece.bytes <= intervals[at][1]:  # most of thousands
            inside.append(piece)
            continue
        near = slice(max(at, 0), bisect_left(starts, base + piece.bytes))
        for start, end in intervals[near]:
            low, high = max(start - base, done), min(end - base, piece.bytes)
            if low < high:
                if done < low:
                    outside.append(piece.part(done, low))
                inside.append(piece.part(low, high))
                done = high
        if done < piece.bytes:
            outside.append(piece.part(done, piece.bytes))
    return inside, outside


def union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as sorted, disjoint intervals."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _pieces(runs: NDArray[np.void]) -> list[Piece]:
    columns = (runs[name].tolist() for name in ("va", "pa", "bytes"))
    return [Piece(*row) for row in zip(*columns, strict=True)]


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
        ram: physical ranges that count as RAM, sorted and disjoint.
        segments: of /proc/kcore.
        layout_vmemmap: start of the virtual memory map. A segment without physical addresses that lies below it, or in
            the modules' space, is of the vmalloc kind.
        zero_filled: physical ranges that kcore gives zeroes for.
        ioremap: virtual ranges of ioremap areas.

    Returns:
        (readable, unread) pieces.
    """
    pieces, _ = clip(_pieces(mappings.runs), ram)
    spans = _distinct(segments)
    pieces, unread = clip(pieces, [(s.va, s.va + s.size) for s in spans], virtual=True)
    starts = [segment.va for segment in spans]
    copied: list[Piece] = []  # by the kernel, through the direct map
    plain: list[Piece] = []
    for piece in pieces:
        segment = spans[bisect_right(starts, piece.va) - 1]
        vmalloc = segment.pa is None and not layout_vmemmap <= segment.va < VADDR_END
        (copied if vmalloc else plain).append(piece)
    copied, not_direct = clip(copied, union((pa, pa + size) for _, pa, size in _pieces(mappings.direct)))
    of_devices, copied = clip(copied, ioremap, virtual=True)
    zeroes, readable = clip(plain + copied, zero_filled)
    return sorted(readable), sorted(unread + not_direct + of_devices + zeroes)


def image_tail(
    unread: Sequence[Piece], readable: Iterable[Piece], layout: Layout, zero_filled: Sequence[tuple[int, int]]
) -> tuple[list[Piece], list[Piece]]:
    """(what of the unread is mapped with the kernel's image, the rest); the first is empty if all of it is readable
    elsewhere.
    """
    image = [piece for piece in unread if layout.name(piece.va) == KERNEL_TEXT]
    others = [piece for piece in unread if layout.name(piece.va) != KERNEL_TEXT]
    zeroes, tail = clip(image, zero_filled)
    _, nowhere_else = clip(tail, frames_of(readable))
    return (tail, sorted(zeroes + others)) if nowhere_else else ([], list(unread))


def by_address(read: Read, other: Read, pieces: Sequence[Piece]) -> Read:
    """A read that goes to `other` in these pieces (in order of their addresses), and to `read` elsewhere."""
    spans = [(piece.va, piece.va + piece.bytes) for piece in pieces]

    def fill(va: int, buffer: memoryview) -> None:
        inside, outside = clip([Piece(va, 0, len(buffer))], spans, virtual=True)
        for part in sorted(inside + outside):  # its `pa` is its place in the buffer
            (other if part in inside else read)(part.va, buffer[part.pa : part.pa + part.bytes])

    return fill


def _distinct(segments: Sequence[Segment]) -> list[Segment]:
    """Segments without those that lie within another (on some kernels the modules' space is also in vmalloc's)."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.va, -s.size)):
        if not kept or segment.va >= kept[-1].va + kept[-1].size:
            kept.append(segment)
    return kept


def ioremap_areas() -> list[tuple[int, int]]:
    """Virtual ranges of ioremap and memremap areas, whose memory kcore does not read.

    Raises:
        Undetermined: /proc/vmallocinfo cannot be read.
    """
    try:
        areas = parse_vmallocinfo(read_path(VMALLOCINFO).decode("utf-8", "replace"))
    except OSError as error:
        raise Undetermined(f"cannot read {VMALLOCINFO}: {error.strerror}", "run the audit as root") from None
    return union((area.start, area.end) for area in areas if "ioremap" in area.words)


def frames_of(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """Physical ranges [start, end) of what the pieces map, each byte once."""
    return union((piece.pa, piece.pa + piece.bytes) for piece in pieces)
