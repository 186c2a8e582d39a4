"""The walk: every present mapping in the kernel half of the page tables, one level at a time.

Entries are decoded as the Intel SDM (volume 3, section 4.5) and ``arch/x86/include/asm/pgtable_types.h`` have them.
Only bit 0 says present; a not-present entry holds an inverted frame number (the L1TF protection,
``pgtable-invert.h``) and is never decoded. The tables are those of ``init_top_pgt``, and what other roots have beside
them (``roots``).

The walk reads through a PhysicalReader, so it runs as well over a page-table image in memory. Tables of the upper
levels are read a second time at the end: if one changed, a table below it may have been freed while it was read, and
the pass starts again.

One pass is no snapshot: a mapping can move from a table that was not read yet to one that was. So a ``Walker`` makes
many, and what any of them saw counts. Say that a page is mapped all the time, at this address or that. Then a pass that
reads at random moments misses it with a probability of at most 1/e, however many addresses there are: the product of (1
- d) over shares d of time that sum to 1. Twenty passes miss it once in 500 million audits.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offmap.audit.caching import is_cached
from offmap.audit.intervals import run_starts
from offmap.audit.mappings import RUN, KernelMappings, covered, merge_runs, with_runs
from offmap.audit.result import Span
from offmap.audit.tops import Tops
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

ENTRIES = 512
# pgtable_types.h: _PAGE_PRESENT, _PAGE_RW, _PAGE_ACCESSED | _PAGE_DIRTY, _PAGE_PSE, _PAGE_NX
_PRESENT = np.uint64(1 << 0)
_RW = np.uint64(1 << 1)
_ACCESSED_DIRTY = np.uint64(1 << 5 | 1 << 6)
_PSE = np.uint64(1 << 7)
_NX = np.uint64(1 << 63)
_PHYSICAL_MASK = (1 << 52) - PAGE_SIZE  # bits 12 to 51

_CHUNK = 256  # tables decoded at once: 1 MiB, which stays in the processor's caches
REFERENCES = 16  # how often one table is expanded when many entries share it (espfix, KASAN's zero shadow)
_ATTEMPTS = 3  # of one pass


class PhysicalReader(Protocol):
    """Where page tables are read from. Page-aligned physical addresses, as arrays of uint64."""

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each page can be read at all."""
        ...

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        """Read the pages, in ascending order, into the rows of ``out`` (n x 512)."""
        ...

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether the reader gives zeroes for each page whatever it holds."""
        ...


@dataclass
class _Level:
    """Tables of one level that are still to be read: their address, where their entries map, rights so far.

    ``other``: reached from another root than init_top_pgt.
    """

    pa: NDArray[np.uint64]
    va: NDArray[np.uint64]
    writable: NDArray[np.bool_]
    nx: NDArray[np.bool_]
    other: NDArray[np.bool_]

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> "_Level":
        return _Level(*(getattr(self, name)[index] for name in _COLUMNS))

    @classmethod
    def join(cls, parts: "list[_Level]") -> "_Level":
        none, false = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.bool_)
        parts = [cls(none, none, false, false, false), *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


_COLUMNS = ("pa", "va", "writable", "nx", "other")


class _Known:
    """What the last level's tables held when they were decoded, as one keyed sum for each.

    The keys are random, so tables that differ in which entries are present have the same sum once in 2^64.
    """

    def __init__(self) -> None:
        self._keys = np.frombuffer(os.urandom(8 * (ENTRIES + 2)), dtype=np.uint64) | np.uint64(1)
        self.va = self.sums = np.empty(0, dtype=np.uint64)

    def sum(self, entries: NDArray[np.uint64], level: _Level) -> NDArray[np.uint64]:
        """Of each table, with its place and the rights that lead to it."""
        total = np.einsum("ij,j->i", entries & ~_ACCESSED_DIRTY, self._keys[:ENTRIES])
        rights = level.writable + 2 * level.nx.astype(np.uint64) + 4 * level.other.astype(np.uint64)
        return np.asarray(total + level.pa * self._keys[-1] + rights * self._keys[-2], dtype=np.uint64)

    def has(self, va: NDArray[np.uint64], sums: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each table at such an address is as it was."""
        if not len(self.va):
            return np.zeros(len(va), dtype=np.bool_)
        at = np.minimum(np.searchsorted(self.va, va), len(self.va) - 1)
        return np.asarray((self.va[at] == va) & (self.sums[at] == sums), dtype=np.bool_)


@dataclass
class _Pass:
    """One pass over all levels, and what it saw."""

    reader: PhysicalReader
    levels: int
    address_mask: int
    known: _Known
    runs: list[NDArray[np.void]] = field(default_factory=list)
    other: list[NDArray[np.void]] = field(default_factory=list)
    last: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = field(default_factory=list)
    unreadable: list[Span] = field(default_factory=list)
    tables: dict[int, int] = field(default_factory=dict)
    upper: list[tuple[int, _Level, NDArray[np.uint64]]] = field(default_factory=list)
    empty: list[tuple[int, _Level]] = field(default_factory=list)
    surplus: int = 0

    def run(self, root_pa: int, tops: NDArray[np.void]) -> None:
        top = np.array([root_pa & self.address_mask], dtype=np.uint64)
        # Base of the sign-extended address space: entry 256 of the top table is the first of the kernel half.
        base = np.array([(1 << 64) - (1 << 9 * self.levels + PAGE_SHIFT)], dtype=np.uint64)
        level = _Level(top, base, np.array([True]), np.array([False]), np.array([False]))
        level = self._read_level(level, self.levels)
        level = _Level.join([level, self._others(tops)])
        for depth in range(self.levels - 1, 0, -1):
            level = self._read_level(level, depth)

    def _others(self, tops: NDArray[np.void]) -> _Level:
        """The tables that other roots refer to at the top, and init_top_pgt does not."""
        main = self.upper[0][2][0] if self.upper else np.zeros(ENTRIES, dtype=np.uint64)
        index, entry = tops["index"], tops["entry"]
        tops = tops[(entry & _PRESENT != 0) & ((entry ^ main[index]) & ~_ACCESSED_DIRTY != 0)]
        shift, entry = np.uint64(12 + 9 * (self.levels - 1)), tops["entry"]
        va = tops["index"].astype(np.uint64) << shift
        upper = tops["index"] >= ENTRIES // 2
        va[upper] -= np.uint64((1 << 9 * self.levels + PAGE_SHIFT) % (1 << 64))
        pa, nx = entry & np.uint64(self.address_mask), np.asarray(entry & _NX != 0)
        found = _Level(pa, va, np.asarray(entry & _RW != 0), nx, np.ones(len(tops), dtype=np.bool_))
        large = np.asarray(entry & _PSE != 0)
        self._give_up(found.take(large), self.levels - 1, "its entry has reserved bits set")
        return found.take(~large)

    def _read_level(self, level: _Level, depth: int) -> _Level:
        if level.other.any():
            # What init_top_pgt refers to as well adds addresses, but changes no page's status.
            level = level.take(~level.other | ~np.isin(level.pa, level.pa[~level.other]))
        level = self._limit_sharing(level)
        readable = self.reader.in_ram(level.pa)
        self._give_up(level.take(~readable), depth, "its page table lies outside RAM")
        level = level.take(readable)
        self.tables[depth] = len(np.unique(level.pa))
        below = []
        for start in range(0, len(level.pa), _CHUNK):
            chunk = level.take(np.arange(start, min(start + _CHUNK, len(level.pa))))
            pas, first, rows = np.unique(chunk.pa, return_index=True, return_inverse=True)
            entries = np.empty((len(pas), ENTRIES), dtype=np.uint64)
            self.reader.read_pages(pas, entries)
            if depth > 1:
                self.upper.append((depth, chunk.take(first), entries))
            if len(pas) != len(chunk.pa) or not np.array_equal(rows, np.arange(len(rows))):
                entries = entries[rows]
            if depth == self.levels:
                entries = entries.copy()
                entries[:, : ENTRIES // 2] = 0  # the user half
            if depth == 1:
                sums = self.known.sum(entries, chunk)
                self.last.append((chunk.va, sums))
                new = ~self.known.has(chunk.va, sums)
                if not new.all():
                    entries, chunk = entries[new], chunk.take(new)
            below.append(self._decode(entries, chunk, depth))
        return _Level.join(below)

    def _limit_sharing(self, level: _Level) -> _Level:
        """Keep the first sixteen references to each table, in order of address.

        A page below a table with that many references has aliases in any case, as the direct map refers to a table
        once; what is dropped adds addresses but changes no page's status.
        """
        level = level.take(np.argsort(level.va, kind="stable"))
        order = np.argsort(level.pa, kind="stable")
        ordered = level.pa[order]
        rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered, side="left")
        kept = np.zeros(len(ordered), dtype=np.bool_)
        kept[order] = rank < REFERENCES
        self.surplus += int(np.count_nonzero(~kept))
        return level.take(kept)

    def _decode(self, entries: NDArray[np.uint64], level: _Level, depth: int) -> _Level:
        """Note the leaves among the entries of these tables; return the tables they refer to."""
        empty = np.asarray(~entries.any(axis=1), dtype=np.bool_)
        if empty.any():
            self.empty.append((depth, level.take(empty)))
        shift = 12 + 9 * (depth - 1)
        flat = entries.reshape(-1)
        index = np.flatnonzero(flat & _PRESENT)
        entry = flat[index]
        table = index >> 9
        va = level.va[table] + ((index & 511).astype(np.uint64) << np.uint64(shift))
        writable = level.writable[table] & (entry & _RW != 0)
        nx = level.nx[table] | (entry & _NX != 0)
        found = _Level(entry & np.uint64(self.address_mask), va, writable, nx, level.other[table])
        large = np.asarray((entry & _PSE != 0) | (depth == 1), dtype=np.bool_)
        if depth <= 3:
            self._leaves(found if depth == 1 else found.take(large), is_cached(entry[large], depth), depth)
        else:
            # PSE is reserved in the two top levels: what this maps, if anything, cannot be told.
            self._give_up(found.take(large), depth - 1, "its entry has reserved bits set")
        return found.take(~large)

    def _leaves(self, found: _Level, cached: NDArray[np.bool_], depth: int) -> None:
        if found.other.any():
            self._leaves(found.take(~found.other), cached[~found.other], depth)
            found, cached = found.take(found.other), cached[found.other]
        into = self.other if found.other.any() else self.runs
        va, writable, nx = found.va, found.writable, found.nx
        size = PAGE_SIZE << 9 * (depth - 1)
        # In a large leaf bit 12 is PAT and the bits up to the page size are reserved: not part of the address.
        pa = found.pa & np.uint64((1 << 64) - size)
        step = np.uint64(size)
        breaks = (va[1:] - va[:-1] != step) | (pa[1:] - pa[:-1] != step)
        breaks |= (writable[1:] != writable[:-1]) | (nx[1:] != nx[:-1]) | (cached[1:] != cached[:-1])
        starts = run_starts(breaks, len(va))
        runs = np.empty(len(starts), dtype=RUN)
        runs["va"] = va[starts]
        runs["pa"] = pa[starts]
        runs["bytes"] = np.diff(np.append(starts, len(va))).astype(np.uint64) * step
        runs["level"] = depth
        runs["writable"] = writable[starts]
        runs["nx"] = nx[starts]
        runs["cached"] = cached[starts]
        into.append(runs)

    def _give_up(self, level: _Level, depth: int, reason: str) -> None:
        self.unreadable.extend(spans_of(level, depth, reason))

    def changed(self) -> list[Span]:
        """Read the upper levels again; what the entries that differ by now map, down to the last level."""
        spans = []
        for depth, level, entries in self.upper:
            again = np.empty_like(entries)
            self.reader.read_pages(level.pa, again)
            # The processor itself sets Accessed and Dirty.
            differs = (again ^ entries) & ~_ACCESSED_DIRTY != 0
            # Two not-present states are both nothing.
            differs &= ((again | entries) & _PRESENT) != 0
            if depth == self.levels:
                differs[:, : ENTRIES // 2] = False
            size = PAGE_SIZE << 9 * (depth - 1)
            spans += [
                Span(Address(int(level.va[row]) + column * size), size, f"its level {depth} entry kept changing")
                for row, column in zip(*(part.tolist() for part in np.nonzero(differs)), strict=True)
            ]
        return spans


class Walker:
    """Walks the same tables again and again, and gathers what every pass saw.

    Args:
        reader: of the tables.
        root_pa: physical address of ``init_top_pgt``.
        levels: 4 or 5.
        direct_map_base: ``page_offset_base``.
        sme_mask: the C-bit of AMD memory encryption, which is not part of an address.
        tops: asks what other roots have; asked before and after each pass.
    """

    def __init__(
        self,
        reader: PhysicalReader,
        root_pa: int,
        levels: int,
        direct_map_base: int,
        sme_mask: int = 0,
        tops: Callable[[], Tops] = Tops.none,
    ) -> None:
        self._reader, self._root, self._levels, self._base = reader, root_pa, levels, direct_map_base
        self._mask, self._ask = _PHYSICAL_MASK & ~sme_mask, tops
        self._known = _Known()
        self._main = self._other = np.empty(0, dtype=RUN)
        self._unreadable: dict[Span, None] = {}
        self._empty: dict[int, _Level] = {}
        self._tables: dict[int, int] = {}
        self._roots: dict[str, int] = {}
        self._unsettled: list[Span] = []
        self._surplus = 0
        self._seconds = 0.0
        self.passes = 0
        self.failed = 0

    def walk(self) -> bool:
        """One pass, and whether it found a mapping that none before had seen.

        Raises:
            Undetermined: the reader fails. Tables that cannot be trusted are not an error: they end in ``unreadable``.
        """
        started = time.monotonic()
        before = self._ask()
        for _ in range(_ATTEMPTS):
            walked = _Pass(self._reader, self._levels, self._mask, self._known)
            walked.run(self._root, before.entries)
            changed, after = walked.changed(), self._ask()
            same = np.array_equal(before.entries, after.entries)
            if not same and len(np.setdiff1d(before.entries, after.entries)):
                # A table below it may have been freed, and be somebody else's by now.
                changed.append(self._half("the top-level tables kept changing"))
            if not changed:
                break
            before = after
        self._seconds += time.monotonic() - started
        if changed:
            self.failed += 1
            self._unsettled = changed
            if self.passes:
                return False
        else:
            self.passes += 1
        return self._keep(walked, before)

    def _keep(self, walked: _Pass, tops: Tops) -> bool:
        va, sums = (np.concatenate(column) for column in zip(*(walked.last or [_NOTHING]), strict=True))
        self._known.va, self._known.sums = va, sums
        self._tables, self._roots, self._surplus = walked.tables, {"init_top_pgt": 1, **tops.roots}, walked.surplus
        self._unreadable |= dict.fromkeys([*walked.unreadable, *map(self._half, tops.problems)])
        for depth, level in walked.empty:
            known = self._empty.get(depth, _Level.join([]))
            self._empty[depth] = _Level.join([known, level.take(~np.isin(level.pa, known.pa))])
        before = self._size()
        self._main, self._other = with_runs(self._main, walked.runs), with_runs(self._other, walked.other)
        return self._size() != before

    def _size(self) -> int:
        return int(self._main["bytes"].sum()) + int(self._other["bytes"].sum())

    def _half(self, reason: str) -> Span:
        size = 1 << 9 * self._levels + PAGE_SHIFT - 1
        return Span(Address((1 << 64) - size), size, reason)

    def mappings(self) -> KernelMappings:
        """What all passes saw together."""
        direct = KernelMappings(self._main, (), {}, self._base).direct
        unreadable = dict(self._unreadable)
        for depth, level in self._empty.items():
            # A table that reads as all zeroes counts as empty only if it was really read: kcore reads it through the
            # direct map. That mapping must be among those found, and the page not of a kind that kcore zero-fills.
            unread = ~covered(direct, level.pa >> np.uint64(PAGE_SHIFT)) | self._reader.zero_filled(level.pa)
            unreadable |= dict.fromkeys(spans_of(level.take(unread), depth, "its page table could not be read"))
        if self.failed > self.passes:
            unreadable |= dict.fromkeys(self._unsettled)
        return KernelMappings(
            merge_runs(np.concatenate((self._main, self._other))) if len(self._other) else self._main,
            tuple(unreadable),
            self._tables,
            self._base,
            self._surplus,
            self._seconds,
            self.passes,
            self._roots,
            self._main if len(self._other) else None,
        )


_NOTHING = (np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64))


def spans_of(level: _Level, depth: int, reason: str) -> list[Span]:
    """What tables of this level map, as spans."""
    return [Span(Address(va), PAGE_SIZE << 9 * depth, reason) for va in level.va.tolist()]
