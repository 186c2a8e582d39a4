"""The search: read stretches of kernel memory as fast as they come, and find a pattern in them.

Reading takes nearly all of the time. It fills a buffer that stays in the processor's cache. The C library's memmem(3),
which skips most bytes, searches that for a canary's prefix or the beginning of a secret; matches are then compared in
full. Both calls release the interpreter's lock, so threads add up.

Neighbouring pages of a guest are rarely neighbours in physical memory. A secret that lies across two of them is in two
pieces for the kernel: ``Seams`` are such pairs of pages, and the larger part of the pattern is looked for at their
edges.
"""

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from offmap.audit.own_memory import LockedBuffer
from offmap.audit.readable import Piece, Read
from offmap.errors import OffmapError
from offmap.uapi.page import PAGE_SIZE

_BUFFER = 2 << 20  # with smaller ones two threads spend their time on handing each other the interpreter's lock
_ANCHOR = 64  # memmem's fast path ends at 256 bytes; longer anchors skip no more

_libc = ctypes.CDLL(None, use_errno=True)
_memmem = _libc.memmem
_memmem.restype = ctypes.c_void_p
_memmem.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t]

T = TypeVar("T")


@dataclass(frozen=True)
class Lane:
    """What one thread reads with.

    Attributes:
        read: fills a buffer from a kernel address. /proc/kcore before 6.4 has one bounce buffer for each open file, so
            two threads must not share one.
        buffer: of ``buffer_size`` bytes; made before the search, so that its frames can be known to be ours.
    """

    read: Read
    buffer: LockedBuffer


def buffer_size(span: int) -> int:
    """Bytes that the buffer of a Lane must have, for a pattern of ``span`` bytes."""
    return _BUFFER + -(-span // PAGE_SIZE) * PAGE_SIZE + PAGE_SIZE


class Found(NamedTuple):
    """Where a pattern begins; ``pa2`` is where its second piece begins if it lies across a seam (else None)."""

    va: int
    pa: int
    pa2: int | None = None


@dataclass(frozen=True)
class Pattern(Generic[T]):
    """What is looked for.

    Attributes:
        va, bytes: where in our own memory its fixed beginning stands, and how long that is.
        span: bytes of the whole.
        match: looks at ``span`` bytes that begin so; None if they are not it after all.
        most: matches that make sense; with more the search is given up.
    """

    va: int
    bytes: int
    span: int
    match: Callable[[memoryview], T | None]
    most: int = 1 << 20


@dataclass(frozen=True)
class Seams:
    """Pairs of frames that a guest sees side by side, ``second`` after ``first``, though in RAM they are not.

    Attributes:
        first, second: frames; sorted by ``first``.
        secret: the whole of what is looked for, in a LockedBuffer.
    """

    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    secret: memoryview

    @cached_property
    def by_second(self) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """``second`` sorted, and which pair each is of."""
        order = np.argsort(self.second, kind="stable")
        return self.second[order], order


class _Stopped(Exception):
    """Another thread failed."""


@dataclass
class _Work(Generic[T]):
    """What the threads share: the stretches still to be read, and what was found."""

    chunks: Iterator[tuple[int, int, int]]
    total: int
    progress: Callable[[float], None] | None
    most: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: int = 0
    error: BaseException | None = None
    found: list[tuple[Found, T]] = field(default_factory=list)
    seams: set[int] = field(default_factory=set)

    def next(self) -> tuple[int, int, int] | None:
        with self.lock:
            if self.error is not None:
                raise _Stopped
            return next(self.chunks, None)

    def finished(self, size: int) -> None:
        with self.lock:
            self.done += size
            if self.progress is not None and self.done * 100 // self.total != (self.done - size) * 100 // self.total:
                self.progress(self.done / self.total)

    def add(self, found: Found, what: T) -> None:
        with self.lock:
            self.found.append((found, what))
            if len(self.found) > self.most:
                raise OffmapError(f"what to scan for stands in more than {self.most} places", "give more of the secret")


def search(
    readable: Sequence[Piece],
    lanes: Sequence[Lane],
    pattern: Pattern[T],
    progress: Callable[[float], None] | None = None,
    seams: Seams | None = None,
) -> list[tuple[Found, T]]:
    """Read the pieces and find all that matches the pattern.

    Args:
        readable: sorted by address.
        lanes: as many threads read as there are lanes.
        progress: told the share that is done.
        seams: also look for the pattern across these.

    Returns:
        Each match and what ``pattern.match`` made of it, in order of address.

    Raises:
        OffmapError: far more matches than anyone could read.
    """
    total = sum(piece.bytes for piece in readable) or 1
    work: _Work[T] = _Work(chunks(readable, pattern.span - 1), total, progress, pattern.most)
    run = partial(_run, work, readable, pattern=pattern, seams=seams)
    threads = [threading.Thread(target=run, args=(lane,), daemon=True) for lane in lanes[1:]]
    for thread in threads:
        thread.start()
    run(lanes[0])
    for thread in threads:
        thread.join()
    if work.error is not None:
        raise work.error
    if seams is not None and work.seams:
        work.found += _join_seams(sorted(work.seams), readable, lanes[0], pattern, seams)
    return sorted(work.found, key=lambda each: each[0][:2])


def find_bytes(va: int, size: int, needle: int, length: int) -> int | None:
    """Address of the first place in our own memory where these bytes stand; None if they do not.

    Args:
        va, size: where to look.
        needle, length: where what is looked for stands, and its bytes.
    """
    found: int | None = _memmem(va, size, needle, length)
    return found


def chunks(readable: Sequence[Piece], carry: int) -> Iterator[tuple[int, int, int]]:
    """(address, bytes, of these again) of each read: neighbours joined, cut to the buffer's size.

    A read begins ``carry`` bytes before the end of the one before it, if they are neighbours.
    """
    start = end = -1
    for piece in [*readable, Piece(-1, 0, 0)]:
        if piece.va == end:
            end += piece.bytes
            continue
        for va in range(start, end, _BUFFER):
            again = min(carry, va - start)
            yield va - again, min(_BUFFER, end - va) + again, again
        start, end = piece.va, piece.va + piece.bytes


def _run(work: _Work[T], readable: Sequence[Piece], lane: Lane, pattern: Pattern[T], seams: Seams | None) -> None:
    """One thread's part: read and search until nothing is left, or a thread has failed."""
    starts = [piece.va for piece in readable]
    buffer = lane.buffer
    try:
        while (chunk := work.next()) is not None:
            va, size, again = chunk
            lane.read(va, buffer.view[:size])
            for at, what in _matches(buffer, size, pattern):
                piece = readable[bisect_right(starts, va + at) - 1]
                work.add(Found(va + at, piece.pa + va + at - piece.va), what)
            if seams is not None:
                for piece in pieces_within(readable, starts, va + again, size - again):
                    at = piece.va - va
                    _edges(buffer.view[at : at + piece.bytes], piece.pa, seams, work.seams)
            work.finished(size - again)
    except _Stopped:
        pass
    except BaseException as error:  # handed on to the caller's thread
        with work.lock:
            work.error = work.error or error


def _matches(buffer: LockedBuffer, size: int, pattern: Pattern[T]) -> Iterator[tuple[int, T]]:
    """Offsets in the buffer's first ``size`` bytes at which the pattern stands, and what it made of each match."""
    at, anchor = 0, min(pattern.bytes, _ANCHOR)
    while at + pattern.span <= size:
        hit = _memmem(buffer.va + at, size - at, pattern.va, anchor)
        if hit is None or hit - buffer.va + pattern.span > size:
            return
        at = hit - buffer.va
        what = pattern.match(buffer.view[at : at + pattern.span])
        if what is not None:
            yield at, what
        at += 1


def pieces_within(readable: Sequence[Piece], starts: Sequence[int], va: int, size: int) -> Iterator[Piece]:
    """The parts of the pieces (in order of their addresses, `starts`) that lie within a read."""
    index = bisect_right(starts, va) - 1
    while index < len(readable) and readable[index].va < va + size:
        piece = readable[index]
        start, end = max(piece.va, va), min(piece.va + piece.bytes, va + size)
        if start < end:
            yield piece.part(start - piece.va, end - piece.va)
        index += 1


def _edges(data: memoryview, pa: int, seams: Seams, found: set[int]) -> None:
    """Note the seams that may have the pattern across them, by what stands at the edges of these whole pages."""
    if (pa | len(data)) % PAGE_SIZE:
        return  # a piece that a segment of kcore cuts within a page; the guest's pages are whole
    first, last = pa // PAGE_SIZE, (pa + len(data)) // PAGE_SIZE
    length, half = len(seams.secret), len(seams.secret) // 2
    pages = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    width = min(length - 1, PAGE_SIZE)
    # With at least half of it in the first page, its first half is all there; else its second half is in the second.
    second, pair = seams.by_second
    sides = (
        (seams.first, slice(PAGE_SIZE - width, PAGE_SIZE), seams.secret[: max(half, 1)], np.arange(len(pair))),
        (second, slice(0, width), seams.secret[half:], pair),
    )
    for frames, edge, part, pairs in sides:
        low, high = np.searchsorted(frames, [first, last])
        if high > low:
            edges = np.ascontiguousarray(pages[(frames[low:high] - np.uint64(first)).astype(np.intp), edge])
            found.update(int(pairs[low + row]) for row in _rows(edges, part))


def _rows(edges: NDArray[np.uint8], part: memoryview) -> Iterator[int]:
    """Rows that a part of the pattern begins in."""
    base, size, width = edges.ctypes.data, edges.size, edges.shape[1]
    needle = np.frombuffer(part, dtype=np.uint8).ctypes.data
    at = 0
    while at < size:
        hit = _memmem(base + at, size - at, needle, min(len(part), _ANCHOR))
        if hit is None:
            break
        row = (hit - base) // width
        yield row
        at = (row + 1) * width  # one candidate a row is enough: the whole seam is looked at
    edges.fill(0)


def _join_seams(
    candidates: Sequence[int], readable: Sequence[Piece], lane: Lane, pattern: Pattern[T], seams: Seams
) -> Iterator[tuple[Found, T]]:
    """Look at the candidates in full: the end of the first page and the beginning of the second, put together."""
    by_pa = sorted(readable, key=lambda piece: piece.pa)
    starts = [piece.pa for piece in by_pa]

    def address(pa: int) -> int | None:
        # Pieces may overlap physically: the one that starts last before it need not be the one that holds it.
        index = bisect_right(starts, pa) - 1
        for piece in reversed(by_pa[max(index - 64, 0) : index + 1]):
            if pa < piece.pa + piece.bytes:
                return piece.va + pa - piece.pa
        return None

    width, buffer = min(pattern.span - 1, PAGE_SIZE), lane.buffer
    for index in candidates:
        end = (int(seams.first[index]) + 1) * PAGE_SIZE
        second = int(seams.second[index]) * PAGE_SIZE
        before, after = address(end - width), address(second)
        if before is None or after is None:
            continue  # one of the two is not to be read: then the kernel does not have the whole of it
        lane.read(before, buffer.view[:width])
        lane.read(after, buffer.view[width : 2 * width])
        for at, what in _matches(buffer, 2 * width, pattern):
            yield Found(before + at, end - width + at, second), what
