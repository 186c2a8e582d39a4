"""The canary scan: read every page of RAM that the kernel maps, through each of its mappings, and look for canaries.

Reads go through /proc/kcore, which cannot read everything that is mapped, and says nothing when it does not. So what is
read is chosen from page-table entries and page flags, and the rest is counted as unread:

- a page of a vmalloc or vmap area is copied by the kernel through the direct map (``vread_iter``): one that is not in
  the direct map is never asked for. (Before 6.2, ``aligned_vread`` would fault on it.)
- ioremap areas, offline and poisoned pages, and pages without a ``struct page`` read as zeroes;
- cpu_entry_area, fixmap and the espfix stacks are in no segment of kcore.

A scanner finds itself: it keeps only the canaries' prefix, and hits in its own pages, known by their frames, are left
out. The kernel's one bounce buffer of each open kcore may show a canary that was just read a second time.
"""

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offmap.audit import pagemap
from offmap.audit.canary import CANARY_LENGTH, PREFIX, Canary, CanaryKey, make_canary, new_key, parse_canary
from offmap.audit.kcore import Kcore, Segment
from offmap.audit.mappings import KernelMappings
from offmap.audit.maps import parse_maps
from offmap.audit.pageflags import PageFlags
from offmap.audit.regions import Layout
from offmap.errors import Undetermined

__all__ = ["Piece", "Place", "ScanResult", "clip", "read_plan", "scan_memory", "search"]

PAGE = 4096
_BUFFER = 2 << 20
_CARRY = CANARY_LENGTH - 1


class Piece(NamedTuple):
    """A stretch of kernel addresses and the physical memory behind it."""

    va: int
    pa: int
    bytes: int


@dataclass(frozen=True)
class Place:
    """Where a canary was read: kernel address, physical address, region, and whether the page is the guest's."""

    va: int
    pa: int
    region: str
    in_guest: bool


@dataclass
class ScanResult:
    """What the scan found and how much it saw.

    ``found`` maps each distinct valid canary to the places it was read at. ``bytes_unread`` are mapped but not readable
    through kcore at that address; ``frames_unread`` counts the pages among them that no other mapping showed either.
    """

    found: dict[Canary, list[Place]] = field(default_factory=dict)
    bytes_scanned: int = 0
    bytes_unread: int = 0
    frames_unread: int = 0
    seconds: float = 0.0


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


def _union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
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


def _zero_filled_intervals(flags: PageFlags, ram: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Physical ranges of RAM that kcore gives zeroes for."""
    found = []
    for start, end in ram:
        bad = flags.zero_filled_range(start // PAGE, (end - start) // PAGE)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], bad, [False])).astype(np.int8)))
        found += [(start + int(a) * PAGE, start + int(b) * PAGE) for a, b in edges.reshape(-1, 2)]
    return _union(found)


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
    direct = _union((pa, pa + size) for _, pa, size in _pieces(mappings.direct))
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


def search(
    readable: Sequence[Piece],
    read: Callable[[int, memoryview], None],
    keys: Sequence[CanaryKey],
    progress: Callable[[float], None] | None = None,
) -> list[tuple[int, int, CanaryKey, Canary]]:
    """Read the pieces in order of address and find the valid canaries of these keys.

    Args:
        readable: sorted by address.
        read: fills a buffer from a kernel address.
        progress: told the share that is done.

    Returns:
        (va, pa, key, canary) of each, in the order they were read.
    """
    hits: list[tuple[int, int, CanaryKey, Canary]] = []
    buffer = bytearray(_CARRY + _BUFFER)
    view = memoryview(buffer)
    total = sum(piece.bytes for piece in readable) or 1
    done = 0
    carry, expected = 0, -1
    starts = [piece.va for piece in readable]
    for va, size in _reads(readable):
        if va != expected:
            carry = 0
        base = va - carry  # the address of the buffer's first byte
        read(va, view[carry : carry + size])
        end = carry + size
        at = buffer.find(PREFIX, 0, end)
        while at >= 0 and at + CANARY_LENGTH <= end:
            for key in keys:
                canary = parse_canary(view[at : at + CANARY_LENGTH], key)
                if canary is not None:
                    piece = readable[bisect_right(starts, base + at) - 1]
                    hits.append((base + at, piece.pa + base + at - piece.va, key, canary))
            at = buffer.find(PREFIX, at + 1, end)
        carry = min(_CARRY, end)
        buffer[:carry] = buffer[end - carry : end]
        expected = va + size
        done += size
        if progress is not None and done * 100 // total != (done - size) * 100 // total:
            progress(done / total)
    # Leave no copy of the guest's memory in pages that are about to be freed.
    view[:] = bytes(len(buffer))
    return hits


def _reads(readable: Sequence[Piece]) -> Iterable[tuple[int, int]]:
    """Neighbouring pieces joined, and cut to the buffer's size."""
    stretches: list[list[int]] = []
    for piece in readable:
        if stretches and stretches[-1][1] == piece.va:
            stretches[-1][1] += piece.bytes
        else:
            stretches.append([piece.va, piece.va + piece.bytes])
    for start, end in stretches:
        for va in range(start, end, _BUFFER):
            yield va, min(_BUFFER, end - va)


def _ioremap_areas() -> list[tuple[int, int]]:
    """ioremap and memremap areas, from /proc/vmallocinfo; their memory is not read by kcore.

    Raises:
        Undetermined: the file cannot be read.
    """
    try:
        with open("/proc/vmallocinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            lines = file.read().splitlines()
    except OSError as error:
        raise Undetermined(f"cannot read /proc/vmallocinfo: {error.strerror}", "run the audit as root") from None
    areas = []
    for line in lines:
        words = line.split()
        if len(words) > 2 and "ioremap" in words:
            start, _, end = words[0].partition("-")
            areas.append((int(start, 16), int(end, 16)))
    return _union(areas)


def _own_frames() -> set[int]:
    """Frames of all our own anonymous pages."""
    with open("/proc/self/maps", encoding="utf-8") as file:  # noqa: PTH123
        mappings = parse_maps(file.read())
    frames: set[int] = set()
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in mappings:
            if mapping.path in {"[vsyscall]", "[vvar]", "[vvar_vclock]"} or mapping.shared:
                continue
            entries = pagemap.read_pagemap(fd, mapping.start, mapping.size // PAGE)
            frames.update(pagemap.pfn(entries[pagemap.private(entries)]).tolist())
    finally:
        os.close(fd)
    return frames


def scan_memory(
    kcore: Kcore,
    mappings: KernelMappings,
    layout: Layout,
    key: CanaryKey,
    guest_frames: NDArray[np.uint64],
    device_ranges: Sequence[tuple[int, int]] = (),
    progress: Callable[[float], None] | None = None,
) -> ScanResult:
    """Scan all RAM that the kernel maps for canaries of this key.

    Args:
        guest_frames: sorted frames of the guest's pages, to tell its own RAM from copies.
        device_ranges: physical ranges of guest RAM that Linux does not count as RAM.

    Raises:
        Undetermined: the scan did not find the canary that it planted in a page of its own.
    """
    started = time.monotonic()
    ram = _union([*kcore.ram, *device_ranges])
    zero_filled = _zero_filled_intervals(kcore.page_flags, ram)
    readable, unread = read_plan(mappings, ram, kcore.segments, layout.vmemmap, zero_filled, _ioremap_areas())
    control_key = new_key()
    with pagemap.OwnPage() as control:
        control.write(make_canary(control_key, 0))
        hits = search(readable, kcore.read_virtual, (key, control_key), progress)
        control_frame = control.pfn()
        own = _own_frames()
        if not any(found == control_key and pa // PAGE == control_frame for _, pa, found, _ in hits):
            raise Undetermined("the scan did not find the canary that it planted in its own memory", "run it again")
    result = ScanResult(
        bytes_scanned=sum(piece.bytes for piece in readable), bytes_unread=sum(piece.bytes for piece in unread)
    )
    guest = set(guest_frames.tolist()) if hits else set()
    for va, pa, found, canary in hits:
        # Where a VMM audits itself, the guest's pages are its own.
        if found == key and (pa // PAGE in guest or pa // PAGE not in own):
            result.found.setdefault(canary, []).append(Place(va, pa, layout.name(va), pa // PAGE in guest))
    _, never = clip([Piece(0, pa, size) for pa, size in _frames_of(unread)], _frames_union(readable))
    result.frames_unread = sum(piece.bytes for piece in never) // PAGE
    result.seconds = time.monotonic() - started
    return result


def _frames_of(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """Physical (start, size) of what the pieces map, each byte once."""
    return [(start, end - start) for start, end in _frames_union(pieces)]


def _frames_union(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    return _union((piece.pa, piece.pa + piece.bytes) for piece in pieces)
