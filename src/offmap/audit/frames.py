"""The page frame behind every page of guest RAM, or why it is not known.

Three states, and none of them is a default: POPULATED (the frame is known), EMPTY (there is provably no page, so it
holds nothing), UNKNOWN (anything else, with the reason).
"""

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offmap.audit import pagemap
from offmap.audit.guest_ram import RamRange
from offmap.audit.maps import Mapping
from offmap.audit.pageflags import KPF_ZERO_PAGE, PageFlags
from offmap.audit.process import Process
from offmap.audit.residency import Backing, allocated_bytes, backing_of, link, open_backing, resident_frames
from offmap.audit.unplugged import is_offmap_device, physical_ranges
from offmap.errors import Undetermined
from offmap.units import format_size

__all__ = ["EMPTY", "POPULATED", "UNKNOWN", "Frames", "resolve"]

PAGE = 4096
UNKNOWN, EMPTY, POPULATED = 0, 1, 2

# Times the RAM that the host has for itself (a guest may be larger, as reserved memory is not of it): the arrays of an
# audit, some 50 bytes a page, would take nearly half of that.
_MOST_RAM = 32

_DEV_MEM = os.makedev(1, 1)  # Documentation/admin-guide/devices.txt: char 1:1, physical memory access


@dataclass
class Frames:
    """Of every page of the ranges, in their order: its frame (0 unless POPULATED) and its state.

    ``reasons`` says why pages are UNKNOWN, with their number; ``regions`` are the physical ranges of those that came
    from /dev/mem, which /proc/iomem does not count as RAM.
    """

    pfn: NDArray[np.uint64]
    state: NDArray[np.uint8]
    reasons: dict[str, int] = field(default_factory=dict)
    device_ranges: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def unknown(cls, pages: int) -> "Frames":
        return cls(np.zeros(pages, dtype=np.uint64), np.full(pages, UNKNOWN, dtype=np.uint8))

    def unexplained(self, reason: str, pages: int) -> None:
        """Count pages that stay UNKNOWN."""
        if pages:
            self.reasons[reason] = self.reasons.get(reason, 0) + pages


def resolve(process: Process, ranges: Iterable[RamRange], flags: PageFlags) -> Frames:
    """Find the frames of all pages of the ranges.

    Args:
        process: the audited one.
        ranges: page-aligned.
        flags: tells the shared zero page, which holds nothing of the guest's.

    Raises:
        Undetermined: the process has ended, or the ranges are larger than any guest here can be.
    """
    wanted = list(ranges)
    pages, host = sum(part.pages for part in wanted), os.sysconf("SC_PHYS_PAGES")
    if pages > _MOST_RAM * host:
        raise Undetermined(
            f"the ranges to audit are {format_size(pages * PAGE)}, and this host has {format_size(host * PAGE)} of RAM",
            "name those that are RAM with --range VA:LENGTH",
        )
    frames = Frames.unknown(sum(part.pages for part in wanted))
    mappings = process.maps()
    fd = process.open("pagemap")
    try:
        position = 0
        for part in wanted:
            _resolve_range(process, fd, part, mappings, frames, position)
            position += part.pages
    finally:
        os.close(fd)
    _drop_zero_page(frames, flags)
    return frames


def _resolve_range(
    process: Process, fd: int, part: RamRange, mappings: Sequence[Mapping], frames: Frames, position: int
) -> None:
    found = 0
    for mapping in mappings:
        start, end = max(mapping.start, part.va), min(mapping.end, part.va + part.bytes)
        if start < end:
            pages = (end - start) // PAGE
            at = position + (start - part.va) // PAGE
            piece = Frames(frames.pfn[at : at + pages], frames.state[at : at + pages], frames.reasons)
            _resolve_piece(process, fd, mapping, start, piece)
            frames.device_ranges += piece.device_ranges
            found += pages
    frames.unexplained("not mapped by the process", part.pages - found)


def _resolve_piece(process: Process, fd: int, mapping: Mapping, va: int, piece: Frames) -> None:
    """Fill in a stretch of one mapping; ``piece`` holds views on the whole."""
    pages = len(piece.state)
    status = None if mapping.inode == 0 else process.stat(link(mapping))
    if status is not None and stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEV_MEM and mapping.shared:
        # VM_PFNMAP: pagemap shows a hole, but the file's offset is the physical address (drivers/char/mem.c).
        first = mapping.offset + va - mapping.start
        piece.pfn[:] = np.arange(first // PAGE, first // PAGE + pages, dtype=np.uint64)
        piece.state[:] = POPULATED
        piece.device_ranges.append((first, first + pages * PAGE))
        return
    if status is not None and stat.S_ISCHR(status.st_mode) and is_offmap_device(status.st_rdev):
        _resolve_unplugged(process, va, piece)
        return
    entries = pagemap.read_pagemap(fd, va, pages)
    here = pagemap.present(entries)
    piece.pfn[here] = pagemap.pfn(entries[here])
    piece.state[here] = POPULATED
    away = pagemap.swapped(entries)
    piece.unexplained("swapped out or being migrated", int(np.count_nonzero(away)))
    missing = ~here & ~away
    if not missing.any():
        return
    if mapping.anonymous:
        piece.state[missing] = EMPTY
        return
    _resolve_missing(process, mapping, va, entries, missing, piece)


def _resolve_unplugged(process: Process, va: int, piece: Frames) -> None:
    """Memory that the offmap module took from the kernel; no page table but the process's own shows it."""
    pages = len(piece.state)
    try:
        ranges = physical_ranges(process.pid, va, pages * PAGE)
    except OSError as error:
        piece.unexplained(f"the offmap module did not say where it is ({error.strerror or error})", pages)
        return
    at = 0
    for start, size in ranges:
        count = size // PAGE
        piece.pfn[at : at + count] = np.arange(start // PAGE, start // PAGE + count, dtype=np.uint64)
        at += count
    piece.state[:] = POPULATED
    piece.device_ranges += [(start, start + size) for start, size in ranges]


def _resolve_missing(
    process: Process,
    mapping: Mapping,
    va: int,
    entries: NDArray[np.uint64],
    missing: NDArray[np.bool_],
    piece: Frames,
) -> None:
    """Pages that are not in the process's page tables, though their file may have them."""
    count = int(np.count_nonzero(missing))
    kind = backing_of(process, mapping)
    if kind is Backing.OTHER:
        piece.unexplained(f"in no page table of the process ({mapping.path or 'unnamed mapping'})", count)
        return
    if kind in {Backing.SHMEM, Backing.HUGETLB} and mapping.shared:
        held = allocated_bytes(process, mapping)
        distinct = len(np.unique(pagemap.pfn(entries[pagemap.present(entries)])))
        if held is not None and held <= distinct * PAGE:
            piece.state[missing] = EMPTY  # the file holds nothing beyond what the process has mapped here
            return
    if kind is Backing.HUGETLB:
        piece.unexplained(f"in no page table of the process, but {mapping.path} holds pages elsewhere", count)
        return
    offset = mapping.offset + va - mapping.start
    with open_backing(process, mapping) as backing:
        if backing is None:
            piece.unexplained(f"in no page table of the process, and its file ({mapping.path}) is closed", count)
            return
        try:
            frames, resident, empty = resident_frames(
                backing, offset, len(missing), missing, kind is not Backing.UNSWAPPABLE
            )
        except (OSError, ValueError) as error:
            piece.unexplained(f"in no page table of the process, and its file cannot be asked ({error})", count)
            return
    piece.pfn[resident] = frames[resident]
    piece.state[resident] = POPULATED
    piece.state[empty] = EMPTY
    piece.unexplained(
        f"in no page table of the process, but {mapping.path} holds it elsewhere",
        int(np.count_nonzero(missing & ~resident & ~empty)),
    )


def _drop_zero_page(frames: Frames, flags: PageFlags) -> None:
    """A page that was only ever read is the kernel's one page of zeroes: nothing of the guest's is in it."""
    populated = np.flatnonzero(frames.state == POPULATED)
    values, counts = np.unique(frames.pfn[populated], return_counts=True)
    # The small zero page is asked for; the huge one stands behind several pages wherever it was used twice.
    candidates = np.union1d(values[counts > 1], np.array([pagemap.zero_page_pfn()], dtype=np.uint64))
    zero = candidates[flags.of(candidates) & np.uint64(1 << KPF_ZERO_PAGE) != 0]
    drop = populated[np.isin(frames.pfn[populated], zero)]
    frames.pfn[drop] = 0
    frames.state[drop] = EMPTY
