"""Other processes that map given pages: counted from /proc/kpagecount, named by looking through their pagemaps.

kpagecount counts the mappings of a page in all page tables of user space (Documentation/admin-guide/mm/pagemap.rst).
Mappings beyond those of the audited process are another process's. It knows nothing of pages without a ``struct page``
and of VM_PFNMAP mappings. On a kernel with CONFIG_NO_PAGE_MAPCOUNT it gives an average over a large folio.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from offmap.audit import pagemap
from offmap.audit.classify import Classified
from offmap.audit.frames import POPULATED
from offmap.audit.guest_ram import GuestRam
from offmap.audit.intervals import Intervals, Ints, cut, run_starts
from offmap.audit.process import Mapping, NoSuchProcess, Process, process_ids
from offmap.audit.procfs import open_path
from offmap.audit.reach import Sharer, Sharing
from offmap.audit.readable import Piece, clip, union
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

_WINDOW = 1 << 17  # frames counted, and pages looked at, at once
_GAP = 64  # frames that take no longer to read than a system call

File = tuple[str, int]
Runs = tuple[Ints, Ints]


def sharing_of(
    process: Process, ram: GuestRam, judged: Classified, online: Sequence[tuple[int, int]], *, named: bool = False
) -> Sharing:
    """Count the guest's pages that other processes map too, and name these processes if asked.

    Args:
        online: physical ranges [start, end) of the kernel's own RAM; no other page has a count.

    Raises:
        Undetermined: /proc/kpagecount cannot be read, or the process has ended.
    """
    ranges = union((part.va, part.va + part.bytes) for part in ram.ranges)
    outside = {mapping: _outside(mapping, ranges) for mapping in process.maps()}
    files = {
        (mapping.device, mapping.inode)
        for mapping, parts in outside.items()
        if mapping.inode and parts != [(mapping.start, mapping.end)]
    }
    here = judged.state == POPULATED
    own = [(judged.pfn[here], judged.pages[here])]
    for mapping, parts in outside.items():
        if (mapping.device, mapping.inode) in files:
            # The same file a second time, beside what was judged already.
            own += [_runs(frames) for part in parts for _, frames in _present(process, *part)]
    first, pages = (np.concatenate(column) for column in zip(*own, strict=True))
    known = judged.known
    guest, uncounted = _online((judged.pfn[known], judged.pages[known]), online)
    sharing, extra = count_sharing(guest, (first, pages))
    sharing = msgspec.structs.replace(sharing, uncounted_pages=sharing.uncounted_pages + uncounted)
    if not named:
        return sharing
    sharers, unreadable = name_sharers(judged.frames, {process.pid, os.getpid()}, files, extra)
    return Sharing(sharing.shared_pages, sharing.uncounted_pages, tuple(sharers), unreadable)


def count_sharing(guest: Runs, mapped: Runs, path: str = "/proc/kpagecount") -> tuple[Sharing, int]:
    """Compare what kpagecount counts with what the audited process has itself.

    Args:
        guest: frames of its guest's pages, as (first, pages) of each run.
        mapped: frames that it maps, these and others. A frame counts once for each run that it is in.

    Returns:
        the counts, and how many mappings in all are not its own.

    Raises:
        Undetermined: the file cannot be read.
    """
    shared = uncounted = extra = 0
    try:
        file = os.fdopen(open_path(path), "rb", buffering=0)
    except OSError as error:
        raise Undetermined(
            f"cannot open {path}: {error.strerror}", "run the audit as root on a kernel with CONFIG_PROC_PAGE_MONITOR"
        ) from None
    in_guest, in_process = _Times(guest), _Times(mapped)
    with file:
        for stretches in _windows(Intervals.union(guest[0], guest[0] + guest[1])):
            try:
                frames, counted = _count(file.fileno(), stretches)
            except OSError as error:
                raise Undetermined(f"reading {path} failed: {error.strerror}") from None
            times = in_guest.of(frames)
            more = np.where(times > 0, np.maximum(counted - in_process.of(frames), 0), 0)
            shared += int(times[more > 0].sum())
            extra += int(more.sum())
            uncounted += int(times[counted == 0].sum())
    return Sharing(shared, uncounted, None, 0), extra


def _online(runs: Runs, online: Sequence[tuple[int, int]]) -> tuple[Runs, int]:
    """The parts of some runs that are in these physical ranges, and how many pages are not."""
    start, end = (np.array([each[side] for each in online], dtype=np.int64) // PAGE_SIZE for side in (0, 1))
    ram = Intervals.union(start, end)
    source, offset, length = cut(*runs, ram.edges)
    first = runs[0][source] + offset
    inside = ram.contains(first)
    return (first[inside], length[inside]), int(length[~inside].sum())


class _Times:
    """How many of some runs each frame is in."""

    def __init__(self, runs: Runs) -> None:
        self._begins, self._ends = np.sort(runs[0]), np.sort(runs[0] + runs[1])

    def of(self, frames: Ints) -> Ints:
        begun, ended = (np.searchsorted(edges, frames, side="right") for edges in (self._begins, self._ends))
        return np.asarray(begun - ended, dtype=np.int64)


def _windows(frames: Intervals) -> Iterator[Runs]:
    """The set as stretches, some at a time: at most twice _WINDOW frames in all.

    What lies between the pages of a VM is not looked at, but for gaps that cost less to read than to pass over.
    """
    if not len(frames.start):
        return
    first = run_starts(frames.start[1:] - frames.end[:-1] > _GAP, len(frames.start))
    start, length = frames.start[first], np.append(frames.end[first[1:] - 1], frames.end[-1:]) - frames.start[first]
    edges = np.arange(start[0] // _WINDOW, frames.end[-1] // _WINDOW + 1, dtype=np.int64) * _WINDOW
    source, offset, length = cut(start, length, edges)
    start = start[source] + offset
    window = np.cumsum(length) // _WINDOW
    for rows in np.split(np.arange(len(start)), np.flatnonzero(np.diff(window)) + 1):
        yield start[rows], length[rows]


def _count(fd: int, stretches: Runs) -> tuple[Ints, Ints]:
    """The frames of these stretches, and how often each is mapped (raises OSError)."""
    start, length = stretches
    ends = np.cumsum(length)
    frames = np.repeat(start - ends + length, length) + np.arange(int(ends[-1]), dtype=np.int64)
    counted = np.zeros(len(frames), dtype=np.int64)
    view = counted.view(np.uint8).data
    for low, pages, end in zip(start.tolist(), length.tolist(), ends.tolist(), strict=True):
        os.preadv(fd, [view[8 * (end - pages) : 8 * end]], low * 8)
    return frames, counted


def name_sharers(
    guest: Intervals, but: set[int], files: set[File], extra: int | None = None
) -> tuple[list[Sharer], int]:
    """Which processes have some of these frames in their page tables, most pages first.

    Processes that end meanwhile are left out.

    Args:
        but: PIDs that are not asked.
        files: (device, inode) of the files that the frames may be of; anonymous memory may hold any (fork, KSM).
        extra: how many mappings there are to be found. Once that many have been, nobody else is asked.

    Returns:
        the processes, and how many others could not be read.
    """
    found: dict[int, Sharer] = {}
    unreadable: set[int] = set()
    pids = [pid for pid in process_ids() if pid not in but]
    left = extra
    # Mappings of the same files first: where these explain the counts, all other memory need not be looked through.
    for same_file in (True, False):
        for pid in pids:
            if left is not None and left <= 0:
                break
            try:
                with Process(pid) as process:
                    pages = _pages_of(process, guest, files, same_file)
                    name = process.name() if pages else ""
            except NoSuchProcess:
                continue
            except (Undetermined, OSError):
                if Path(f"/proc/{pid}/exe").is_symlink():  # a kernel thread has none, and no memory either
                    unreadable.add(pid)
                continue
            if pages:
                before = found.get(pid, Sharer(pid, name, 0))
                found[pid] = Sharer(pid, name, before.pages + pages)
                left = None if left is None else left - pages
    return sorted(found.values(), key=lambda sharer: -sharer.pages), len(unreadable - found.keys())


def _pages_of(process: Process, guest: Intervals, files: set[File], same_file: bool) -> int:
    pages = 0
    for mapping in process.maps():
        of_file = (mapping.device, mapping.inode) in files
        if of_file == same_file and (of_file or mapping.inode == 0 or not mapping.shared):
            with suppress(pagemap.PagemapEnds):  # the vsyscall page
                for _, frames in _present(process, mapping.start, mapping.end):
                    pages += int(np.count_nonzero(guest.contains(frames)))
    return pages


@dataclass(frozen=True)
class MappedBy:
    """One process that has a page: the address, and the mapping's file (empty for none)."""

    pid: int
    process: str
    va: int
    path: str


def mapped_by(frames: Collection[int], leave_out: Collection[int] = ()) -> dict[int, list[MappedBy]]:
    """Find the processes that map each of these frames; those that end meanwhile or cannot be read are left out.

    Args:
        leave_out: PIDs that are not looked at.
    """
    found: dict[int, list[MappedBy]] = {}
    wanted = np.array(sorted(frames), dtype=np.int64)
    for pid in process_ids() if len(wanted) else ():
        if pid in leave_out:
            continue
        # The vsyscall page, which is none of pagemap's, comes last.
        with suppress(NoSuchProcess, Undetermined, OSError), Process(pid) as process:
            for mapping in process.maps():
                if mapping.perms.startswith("---"):
                    continue
                for va, here in _present(process, mapping.start, mapping.end):
                    for index in np.flatnonzero(np.isin(here, wanted)).tolist():
                        who = MappedBy(pid, process.name(), int(va[index]), mapping.path)
                        found.setdefault(int(here[index]), []).append(who)
    return found


def _present(process: Process, start: int, end: int) -> Iterator[tuple[Ints, Ints]]:
    """Addresses and frames of the present pages of an address range, a window at a time."""
    for va in range(start, end, _WINDOW * PAGE_SIZE):
        entries = pagemap.read_pagemap(process.pagemap, va, min(_WINDOW, (end - va) // PAGE_SIZE))
        here = np.flatnonzero(pagemap.present(entries))
        yield va + here * PAGE_SIZE, pagemap.pfn(entries[here]).astype(np.int64)


def _runs(frames: Ints) -> Runs:
    first = run_starts(frames[1:] != frames[:-1] + 1, len(frames))
    return frames[first], np.diff(np.append(first, len(frames))).astype(np.int64)


def _outside(mapping: Mapping, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of a mapping that are in none of the ranges (sorted, disjoint)."""
    _, parts = clip([Piece(mapping.start, 0, mapping.size)], ranges, virtual=True)
    return [(part.va, part.va + part.bytes) for part in parts]
