"""The canary scan: read every page of RAM that the kernel maps, through each of its mappings, and look for canaries.

Reads go through /proc/kcore; what it can show is worked out in ``readable.py``, and what it cannot is counted.

A scanner finds itself: it keeps only the canaries' prefix, and hits in its own pages, known by their frames, are left
out. The kernel's one bounce buffer of each open kcore may show a canary that was just read a second time.
"""

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offmap.audit import pagemap
from offmap.audit.canary import CANARY_LENGTH, PREFIX, Canary, CanaryKey, make_canary, new_key, parse_canary
from offmap.audit.kcore import Kcore
from offmap.audit.mappings import KernelMappings
from offmap.audit.maps import parse_maps
from offmap.audit.readable import Piece, clip, frames_of, ioremap_areas, read_plan, union, zero_filled_intervals
from offmap.audit.regions import Layout
from offmap.errors import Undetermined

__all__ = ["Place", "ScanResult", "scan_memory", "search"]

PAGE = 4096
_BUFFER = 2 << 20
_CARRY = CANARY_LENGTH - 1


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
    ram = union([*kcore.ram, *device_ranges])
    zero_filled = zero_filled_intervals(kcore.page_flags, ram)
    readable, unread = read_plan(mappings, ram, kcore.segments, layout.vmemmap, zero_filled, ioremap_areas())
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
    _, never = clip([Piece(0, start, end - start) for start, end in frames_of(unread)], frames_of(readable))
    result.frames_unread = sum(piece.bytes for piece in never) // PAGE
    result.seconds = time.monotonic() - started
    return result
