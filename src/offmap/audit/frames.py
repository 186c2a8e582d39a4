"""The page frame behind every page of guest RAM, or why it is not known.

Three states, none of them a default: POPULATED (the frame is known), EMPTY (there is provably no page), UNKNOWN
(anything else, with the reason). EMPTY says nothing of the page that will come: it has a reason too where the kernel
will map that page, as it does all ordinary memory. Only secret memory promises otherwise.

Pages are kept as runs of neighbours in one state whose frames are neighbours too. So a terabyte of huge pages is a few
thousand numbers.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from offmap.audit import pagemap
from offmap.audit.btf import Unknown
from offmap.audit.guest_ram import RamRange
from offmap.audit.intervals import Intervals, Ints, cut, run_starts
from offmap.audit.kvm_list import GuestMemfd
from offmap.audit.pageflags import KPF_ZERO_PAGE, PageFlags
from offmap.audit.process import Mapping, Process, ProcessEnded, mappings_from
from offmap.audit.residency import (
    Backing,
    allocated_bytes,
    is_offmap_device,
    link,
    open_backing,
    physical_ranges,
    resident_frames,
)
from offmap.errors import Undetermined
from offmap.hidden_files import is_of_a_pool
from offmap.uapi.devices import DEV_MEM
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

UNKNOWN, EMPTY, POPULATED = 0, 1, 2
_MISSING = 3  # not in the process's page tables: one of the three above, once its file has been asked

# Times the RAM that the host has for itself (a guest may be larger, as reserved memory is not of it).
_MOST_RAM = 32

_CHUNK = 1 << 17  # pages asked of pagemap at once: 1 MiB of entries
_HUGE = 512  # pages of a 2 MiB one
_AWAY = "swapped out or being migrated"
_ANONYMOUS = "anonymous memory"
_SILENT = ", and one of its files does not answer"
# Mappings of no file that have such a name are the kernel's own ([vvar], [vdso]), not anonymous memory (show_map_vma).
_NAMED_ANONYMOUS = ("[heap]", "[stack]", "[anon:")


@dataclass
class Frames:
    """The runs of all pages of the ranges, in their order.

    Attributes:
        page: the first page of each run, ascending from 0; no run crosses from one range to the next.
        pfn: frame of that page (the run's others follow it); 0 unless POPULATED.
        state: of the run.
        why: index into ``reasons``. Of an UNKNOWN run: why it is not known. Of an EMPTY run: what memory it is that the
            kernel will map when it comes; 0 where it will not. Else 0.
        total: pages of all ranges together.
        device_ranges: physical ranges of those that came from a device, which /proc/iomem does not count as RAM.
        ended: what the process did before all its pages were looked at; empty if nothing.
    """

    page: Ints
    pfn: Ints
    state: NDArray[np.uint8]
    why: NDArray[np.uint8]
    reasons: tuple[str, ...] = ("",)
    total: int = 0
    device_ranges: list[tuple[int, int]] = field(default_factory=list)
    ended: str = ""

    @property
    def pages(self) -> Ints:
        """Pages in each run."""
        return np.diff(np.append(self.page, self.total))


class _Building:
    """Frames being put together, from the first page on."""

    def __init__(self) -> None:
        self.total = 0
        self.device_ranges: list[tuple[int, int]] = []
        self._reasons = {"": 0}
        self._starts: list[int] = []
        self._parts: list[tuple[Ints, Ints, NDArray[np.uint8], NDArray[np.uint8]]] = []

    def number(self, reason: str) -> int:
        """Index of a reason. The process chooses the names in them, so from the 255th on all are one."""
        if reason not in self._reasons and len(self._reasons) >= 255:
            reason = "for too many different reasons to list"
        return self._reasons.setdefault(reason, len(self._reasons))

    def begin_range(self) -> None:
        self._starts.append(self.total)

    def add(self, runs: Frames) -> None:
        """The next pages, as runs that count from the first of them."""
        self._parts.append((runs.page + self.total, runs.pfn, runs.state, runs.why))
        self.total += runs.total

    def add_run(self, pages: int, state: int, pfn: int = 0, why: int = 0) -> None:
        if pages:
            one = np.zeros(1, dtype=np.int64)
            self.add(Frames(one, one + pfn, np.array([state], np.uint8), np.array([why], np.uint8), total=pages))

    def add_unknown(self, pages: int, reason: str) -> None:
        self.add_run(pages, UNKNOWN, why=self.number(reason))

    def frames(self, ended: str = "") -> Frames:
        none = tuple(np.zeros(0, kind) for kind in (np.int64, np.int64, np.uint8, np.uint8))
        page, pfn, state, why = (np.concatenate(part) for part in zip(none, *self._parts, strict=True))
        # What was looked at in pieces is one run where it can be.
        breaks = (state[1:] != state[:-1]) | (why[1:] != why[:-1])
        breaks |= (state[1:] == POPULATED) & (pfn[1:] != pfn[:-1] + np.diff(page))
        breaks |= np.isin(page[1:], np.array(self._starts, dtype=np.int64))
        first = run_starts(breaks, len(page))
        reasons = tuple(self._reasons)
        return Frames(page[first], pfn[first], state[first], why[first], reasons, self.total, self.device_ranges, ended)


def runs_of_pages(pfn: Ints, state: NDArray[np.uint8], why: NDArray[np.uint8]) -> Frames:
    """The runs of pages that are given one by one."""
    pfn = np.where(state == POPULATED, pfn, 0)
    # Within a run of frames this is the same for every page.
    base = np.where(state == POPULATED, pfn - np.arange(len(state)), 0)
    breaks = (state[1:] != state[:-1]) | (why[1:] != why[:-1]) | (base[1:] != base[:-1])
    first = run_starts(breaks, len(state))
    return Frames(first.astype(np.int64), pfn[first], state[first], why[first], total=len(state))


# The pages that some bytes of a guest_memfd have, as runs of (page, frame, pages); raises Unknown.
GuestMemfdPages = Callable[[GuestMemfd, int], tuple[Ints, Ints, Ints]]


def resolve(
    process: Process, ranges: Iterable[RamRange], flags: PageFlags, guest_memfd: GuestMemfdPages | None = None
) -> Frames:
    """Find the frames of all pages of the ranges.

    If the process ends meanwhile, what was not looked at by then is UNKNOWN, and ``ended`` says so. ``flags`` tell the
    shared page of zeroes, which holds nothing of the guest's.

    Args:
        guest_memfd: finds the pages of ranges that are in one, which need be in no process's page tables.

    Raises:
        Undetermined: the process may not be looked at, or the ranges are larger than any guest here can be.
    """
    wanted = list(ranges)
    pages, host = sum(part.pages for part in wanted), os.sysconf("SC_PHYS_PAGES")
    if pages > _MOST_RAM * host:
        raise Undetermined(
            f"the ranges to audit are {format_size(pages * PAGE_SIZE)}, "
            f"and this host has {format_size(host * PAGE_SIZE)} of RAM",
            "name those that are RAM with --range VA:LENGTH",
        )
    building = _Building()
    ended = ""
    try:
        process.renew_pagemap()
        mappings = process.maps()
        for part in wanted:
            building.begin_range()
            if part.guest_memfd is not None:
                _resolve_guest_memfd(part, building, guest_memfd)
            else:
                _resolve_range(process, part, mappings, building, flags.zero_page)
        process.check_alive()  # maps and links are of the program that runs now, pagemap of the one that ran first
    except ProcessEnded as end:
        ended = end.reason
        building.add_unknown(pages - building.total, f"{ended} before it was looked at")
    return _drop_huge_zero_page(building.frames(ended), flags)


def _resolve_range(
    process: Process, part: RamRange, mappings: Sequence[Mapping], building: _Building, zero: int
) -> None:
    position, last = part.va, part.va + part.bytes
    for mapping in mappings_from(mappings, part.va):
        if mapping.start >= last:
            break
        start, end = max(mapping.start, part.va), min(mapping.end, last)
        building.add_unknown((start - position) // PAGE_SIZE, "not mapped by the process")
        _resolve_piece(process, mapping, start, (end - start) // PAGE_SIZE, building, zero)
        position = end
    building.add_unknown((last - position) // PAGE_SIZE, "not mapped by the process")


def _resolve_guest_memfd(part: RamRange, building: _Building, find: GuestMemfdPages | None) -> None:
    """The pages of a guest_memfd, as its file has them."""
    try:
        if find is None or part.guest_memfd is None:
            raise Unknown("KVM was not asked")
        first, pfn, count = find(part.guest_memfd, part.bytes)
    except Unknown as error:
        building.add_unknown(part.pages, f"in a guest_memfd that cannot be looked into: {error}")
        return
    bare = building.number(Backing.GUEST_MEMFD.memory)
    for low in range(0, part.pages, _CHUNK):
        pages = min(_CHUNK, part.pages - low)
        start, end = np.maximum(first, low), np.minimum(first + count, low + pages)
        here = np.flatnonzero(start < end)
        length = (end - start)[here]
        # Each run's pages one by one: their places in the chunk, and their frames.
        nth = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        at = np.repeat((start - low)[here], length) + nth
        frames, state = np.zeros(pages, dtype=np.int64), np.full(pages, EMPTY, dtype=np.uint8)
        frames[at], state[at] = np.repeat((pfn + start - first)[here], length) + nth, POPULATED
        building.add(runs_of_pages(frames, state, np.where(state == EMPTY, bare, 0).astype(np.uint8)))


def _resolve_piece(process: Process, mapping: Mapping, va: int, pages: int, building: _Building, zero: int) -> None:
    """A stretch of one mapping."""
    status = None if mapping.inode == 0 else process.stat(link(mapping))
    if status is not None and stat.S_ISCHR(status.st_mode):
        if status.st_rdev == DEV_MEM and mapping.shared:
            # VM_PFNMAP: pagemap shows a hole, but the file's offset is the physical address (drivers/char/mem.c).
            first = mapping.offset + va - mapping.start
            building.add_run(pages, POPULATED, first // PAGE_SIZE)
            building.device_ranges.append((first, first + pages * PAGE_SIZE))
            return
        if is_offmap_device(status.st_rdev):
            _resolve_unplugged(process, va, pages, building)
            return
    if status is not None and is_of_a_pool(status.st_dev):
        _resolve_unplugged(process, va, pages, building)
        return
    away, bare = building.number(_AWAY), building.number(_ANONYMOUS)
    try:
        chunks = [
            _look(process.pagemap, va + first * PAGE_SIZE, min(_CHUNK, pages - first), zero, away, bare)
            for first in range(0, pages, _CHUNK)
        ]
    except pagemap.PagemapEnds as error:
        process.check_alive()
        building.add_unknown(pages, error.reason)  # beyond what has page tables of its own, like the vsyscall page
        return
    if any((chunk.state == _MISSING).any() for chunk in chunks):
        _settle_missing(process, mapping, va, chunks, building)
    for chunk in chunks:
        building.add(chunk)


def _look(fd: int, va: int, pages: int, zero: int, away: int, bare: int = 0) -> Frames:
    """What pagemap shows of some pages, as runs; those in no page table are _MISSING.

    ``zero`` is the frame of the page of zeroes. ``away`` is the index of the reason for pages that are swapped out,
    ``bare`` of that for pages of zeroes, which anonymous memory has until it is written.
    """
    entries = pagemap.read_pagemap(fd, va, pages)
    here = pagemap.present(entries)
    pfn = pagemap.pfn(entries).astype(np.int64)
    state = np.full(pages, _MISSING, dtype=np.uint8)
    state[here] = POPULATED
    state[pagemap.swapped(entries)] = UNKNOWN
    state[here & (pfn == zero)] = EMPTY
    why = np.where(state == UNKNOWN, away, np.where(state == EMPTY, bare, 0))
    return runs_of_pages(pfn, state, why.astype(np.uint8))


def _resolve_unplugged(process: Process, va: int, pages: int, building: _Building) -> None:
    """Memory that the offmap module took from the kernel; no page table but the process's own shows it."""
    try:
        ranges = physical_ranges(process.pid, va, pages * PAGE_SIZE)
    except OSError as error:
        process.check_alive()
        building.add_unknown(pages, f"the offmap module did not say where it is ({error.strerror or error})")
        return
    process.check_alive()  # the module goes by the PID, which might have been used again
    for start, size in ranges:
        building.add_run(size // PAGE_SIZE, POPULATED, start // PAGE_SIZE)
        building.device_ranges.append((start, start + size))


def _settle_missing(process: Process, mapping: Mapping, va: int, chunks: list[Frames], building: _Building) -> None:
    """Pages that are not in the process's page tables, though their file may have them."""
    if mapping.anonymous:
        if mapping.path and not mapping.path.startswith(_NAMED_ANONYMOUS):
            # The kernel's own pages (VM_PFNMAP) are in no pagemap: a hole there proves nothing.
            return _mark_unknown(chunks, building, f" ({mapping.path})")
        return _mark(chunks, EMPTY, building.number(_ANONYMOUS))
    if process.silent:
        return _mark_unknown(chunks, building, _SILENT)
    try:
        with open_backing(process, mapping) as (kind, backing):
            return _settle_by_file(process, mapping, va, chunks, building, kind, backing)
    except OSError as error:
        process.silent = isinstance(error, TimeoutError)
        return _mark_unknown(chunks, building, f", and its file cannot be asked ({error})")


def _settle_by_file(
    process: Process,
    mapping: Mapping,
    va: int,
    chunks: list[Frames],
    building: _Building,
    kind: Backing,
    backing: int | None,
) -> None:
    """The same by what the file says of them."""
    if kind is Backing.OTHER:
        process.check_alive()
        return _mark_unknown(chunks, building, f" ({mapping.path or 'unnamed mapping'})")
    if kind in {Backing.SHMEM, Backing.HUGETLB} and mapping.shared:
        held = allocated_bytes(process, mapping)
        if held is not None and held <= _distinct(chunks) * PAGE_SIZE:
            # The file holds nothing beyond what the process has mapped here.
            return _mark(chunks, EMPTY, building.number(kind.memory))
    if kind is Backing.HUGETLB:
        return _mark_unknown(chunks, building, f", but {mapping.path} holds pages elsewhere")
    if backing is None:
        process.check_alive()
        return _mark_unknown(chunks, building, f", and its file ({mapping.path}) is closed")
    offset = mapping.offset + va - mapping.start
    elsewhere = building.number(f"in no page table of the process, but {mapping.path} holds it elsewhere")
    bare = building.number(_ANONYMOUS if not mapping.shared else kind.memory)
    for index, chunk in enumerate(chunks):
        if process.silent:
            _mark_unknown([chunk], building, _SILENT)
        elif (chunk.state == _MISSING).any():
            try:
                chunks[index] = _ask_file(backing, offset, chunk, not kind.unswappable, elsewhere, bare)
            except (OSError, ValueError) as error:
                process.silent = isinstance(error, TimeoutError)
                _mark_unknown([chunk], building, f", and its file cannot be asked ({error})")
        offset += chunk.total * PAGE_SIZE
    return None


def _mark_unknown(chunks: Iterable[Frames], building: _Building, reason: str) -> None:
    _mark(chunks, UNKNOWN, building.number(f"in no page table of the process{reason}"))


def _mark(chunks: Iterable[Frames], state: int, why: int = 0) -> None:
    for chunk in chunks:
        missing = chunk.state == _MISSING
        chunk.state[missing], chunk.why[missing] = state, why


def _distinct(chunks: Iterable[Frames]) -> int:
    """How many frames there are in all."""
    start = np.concatenate([chunk.pfn[chunk.state == POPULATED] for chunk in chunks])
    pages = np.concatenate([chunk.pages[chunk.state == POPULATED] for chunk in chunks])
    return Intervals.union(start, start + pages).size


def _ask_file(fd: int, offset: int, chunk: Frames, counts_holes: bool, elsewhere: int, bare: int) -> Frames:
    """The chunk, with what the file at byte ``offset`` says of the missing pages."""
    run = np.repeat(np.arange(len(chunk.page)), chunk.pages)
    state, why = chunk.state[run], chunk.why[run]
    pfn = np.where(state == POPULATED, chunk.pfn[run] + np.arange(chunk.total) - chunk.page[run], 0)
    missing = state == _MISSING
    frames, resident, empty = resident_frames(fd, offset, chunk.total, missing, counts_holes)
    pfn[resident] = frames[resident].astype(np.int64)
    state[missing], why[missing] = UNKNOWN, elsewhere
    state[resident], why[resident] = POPULATED, 0
    state[empty], why[empty] = EMPTY, bare
    return runs_of_pages(pfn, state, why)


def _drop_huge_zero_page(frames: Frames, flags: PageFlags) -> Frames:
    """Huge pages that were only ever read are all the same 2 MiB of zeroes, which hold nothing of the guest's.

    It is recognised by its flag; only frames that stand behind more than one place are asked for it.
    """
    here = np.flatnonzero((frames.state == POPULATED) & (frames.pages >= _HUGE))
    first = -(-frames.pfn[here] // _HUGE)
    count = np.maximum((frames.pfn[here] + frames.pages[here]) // _HUGE - first, 0)
    blocks = np.repeat(first - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
    blocks, times = np.unique(blocks, return_counts=True)
    frame = (blocks[times > 1] * _HUGE).astype(np.uint64)
    if not len(frame):
        return frames
    zero = blocks[times > 1][flags.of(frame) & np.uint64(1 << KPF_ZERO_PAGE) != 0] * _HUGE
    if not len(zero):
        return frames
    empty = Intervals.union(zero, zero + _HUGE)
    populated = frames.state == POPULATED
    # Runs of other states have no frames to be cut by.
    source, offset, _ = cut(np.where(populated, frames.pfn, -1 << 60), frames.pages, empty.edges)
    pfn, state = frames.pfn[source] + np.where(populated[source], offset, 0), frames.state[source]
    dropped = (state == POPULATED) & empty.contains(pfn)
    pfn[dropped], state[dropped] = 0, EMPTY
    reasons = frames.reasons if _ANONYMOUS in frames.reasons else (*frames.reasons, _ANONYMOUS)
    why = frames.why[source]
    why[dropped] = reasons.index(_ANONYMOUS)
    return replace(frames, page=frames.page[source] + offset, pfn=pfn, state=state, why=why, reasons=reasons)
