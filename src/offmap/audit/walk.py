"""The walk: every present mapping in the kernel half of the page tables, one level at a time.

Entries are decoded as the Intel SDM (volume 3, section 4.5) and ``arch/x86/include/asm/pgtable_types.h`` have them.
Only bit 0 says present; a not-present entry holds an inverted frame number (the L1TF protection,
``pgtable-invert.h``) and is never decoded. The tables are ``init_top_pgt``'s: what a process adds to its own copy
(the LDT remap of page-table isolation) or what EFI run-time services use is outside them.

The walk reads through a PhysicalReader, so it runs as well over a page-table image in memory. Tables of the upper
levels are read a second time at the end: if one changed, a table below it may have been freed while it was read, and
the walk starts again.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offmap.audit.intervals import run_starts
from offmap.audit.kcore import Kcore
from offmap.audit.mappings import RUN, KernelMappings, covered, merge_runs
from offmap.audit.result import Span
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
_ATTEMPTS = 3


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
    """Tables of one level that are still to be read: their address, where their entries map, rights so far."""

    pa: NDArray[np.uint64]
    va: NDArray[np.uint64]
    writable: NDArray[np.bool_]
    nx: NDArray[np.bool_]

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> "_Level":
        return _Level(self.pa[index], self.va[index], self.writable[index], self.nx[index])

    @classmethod
    def join(cls, parts: "list[_Level]") -> "_Level":
        none = np.empty(0, dtype=np.uint64)
        parts = [cls(none, none, none.astype(np.bool_), none.astype(np.bool_)), *parts]
        return cls(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("pa", "va", "writable", "nx"))
        )


@dataclass
class _Pass:
    """One pass over all levels, and what it saw."""

    reader: PhysicalReader
    levels: int
    address_mask: int
    runs: list[NDArray[np.void]] = field(default_factory=list)
    unreadable: list[Span] = field(default_factory=list)
    tables: dict[int, int] = field(default_factory=dict)
    upper: list[tuple[int, _Level, NDArray[np.uint64]]] = field(default_factory=list)
    empty: list[tuple[int, _Level]] = field(default_factory=list)
    surplus: int = 0

    def run(self, root_pa: int) -> None:
        top = np.array([root_pa & self.address_mask], dtype=np.uint64)
        # Base of the sign-extended address space: entry 256 of the top table is the first of the kernel half.
        base = np.array([(1 << 64) - (1 << 9 * self.levels + PAGE_SHIFT)], dtype=np.uint64)
        level = _Level(top, base, np.array([True]), np.array([False]))
        for depth in range(self.levels, 0, -1):
            level = self._read_level(level, depth)

    def _read_level(self, level: _Level, depth: int) -> _Level:
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
        found = _Level(entry & np.uint64(self.address_mask), va, writable, nx)
        large = np.asarray((entry & _PSE != 0) | (depth == 1), dtype=np.bool_)
        if depth <= 3:
            self._leaves(found if depth == 1 else found.take(large), depth)
        else:
            # PSE is reserved in the two top levels: what this maps, if anything, cannot be told.
            self._give_up(found.take(large), depth - 1, "its entry has reserved bits set")
        return found.take(~large)

    def _leaves(self, found: _Level, depth: int) -> None:
        va, writable, nx = found.va, found.writable, found.nx
        size = PAGE_SIZE << 9 * (depth - 1)
        # In a large leaf bit 12 is PAT and the bits up to the page size are reserved: not part of the address.
        pa = found.pa & np.uint64((1 << 64) - size)
        step = np.uint64(size)
        breaks = (va[1:] - va[:-1] != step) | (pa[1:] - pa[:-1] != step)
        breaks |= (writable[1:] != writable[:-1]) | (nx[1:] != nx[:-1])
        starts = run_starts(breaks, len(va))
        runs = np.empty(len(starts), dtype=RUN)
        runs["va"] = va[starts]
        runs["pa"] = pa[starts]
        runs["bytes"] = np.diff(np.append(starts, len(va))).astype(np.uint64) * step
        runs["level"] = depth
        runs["writable"] = writable[starts]
        runs["nx"] = nx[starts]
        self.runs.append(runs)

    def _give_up(self, level: _Level, depth: int, reason: str) -> None:
        size = PAGE_SIZE << 9 * depth
        self.unreadable.extend(Span(Address(va), size, reason) for va in level.va.tolist())

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


def _check_empty(walked: _Pass, mappings: KernelMappings) -> None:
    """A table that reads as all zeroes counts as empty only if it was really read.

    kcore reads it through the direct map: that mapping must be among those found, and the page must not be of a kind
    that kcore zero-fills.
    """
    for depth, level in walked.empty:
        mapped = covered(mappings.direct, level.pa >> np.uint64(PAGE_SHIFT))
        unread = ~mapped | walked.reader.zero_filled(level.pa)
        walked._give_up(level.take(unread), depth, "its page table could not be read")


def walk_kcore(kcore: Kcore) -> KernelMappings:
    """Walk the running kernel's tables, as ``walk_kernel_half`` does."""
    info = kcore.vmcoreinfo
    return walk_kernel_half(kcore, info.root_pa, info.levels, kcore.page_offset_base, info.sme_mask)


def walk_kernel_half(
    reader: PhysicalReader, root_pa: int, levels: int, direct_map_base: int, sme_mask: int = 0
) -> KernelMappings:
    """Walk entries 256 to 511 of the top table and everything below.

    Args:
        root_pa: physical address of ``init_top_pgt``.
        levels: 4 or 5.
        direct_map_base: ``page_offset_base``.
        sme_mask: the C-bit of AMD memory encryption, which is not part of an address.

    Raises:
        Undetermined: the reader fails. Tables that cannot be trusted are not an error: they end in ``unreadable``.
    """
    started = time.monotonic()
    changed: list[Span] = []
    for _ in range(_ATTEMPTS):
        walked = _Pass(reader, levels, _PHYSICAL_MASK & ~sme_mask)
        walked.run(root_pa)
        changed = walked.changed()
        if not changed:
            break
    runs = np.concatenate(walked.runs) if walked.runs else np.empty(0, dtype=RUN)
    mappings = KernelMappings(merge_runs(runs), (), walked.tables, direct_map_base)
    _check_empty(walked, mappings)
    return KernelMappings(
        mappings.runs,
        (*walked.unreadable, *changed),
        walked.tables,
        direct_map_base,
        walked.surplus,
        time.monotonic() - started,
    )
