"""What a walk found: runs of kernel mappings, and whether a physical page lies in one of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offmap.audit.intervals import Intervals, run_starts
from offmap.audit.result import Span, Walk
from offmap.uapi.page import PAGE_SHIFT

# One stretch of mappings, contiguous in virtual and physical addresses, of one page size, one set of permissions, and
# one way of caching.
RUN = np.dtype(
    [
        ("va", np.uint64),
        ("pa", np.uint64),
        ("bytes", np.uint64),
        ("level", np.uint8),  # 1: 4 KiB pages, 2: 2 MiB, 3: 1 GiB
        ("writable", np.bool_),
        ("nx", np.bool_),
        ("cached", np.bool_),  # as memory is; device registers are not
    ]
)


def merge_runs(runs: NDArray[np.void]) -> NDArray[np.void]:
    """Sort runs by address, and merge those that continue each other or say the same twice."""
    if len(runs) < 2:
        return runs
    offset = runs["va"] - runs["pa"]
    flags = runs["writable"] * np.uint8(4) + runs["nx"] * np.uint8(2) + runs["cached"]
    rights = runs["level"] * np.uint8(8) + flags
    order = np.lexsort((runs["va"], rights, offset))
    runs, offset, rights = runs[order], offset[order], rights[order]
    other = (offset[1:] != offset[:-1]) | (rights[1:] != rights[:-1])
    group = np.concatenate(([0], np.cumsum(other)))
    # The last byte, as the end of the highest page is beyond 64 bits.
    last = runs["va"] + (runs["bytes"] - np.uint64(1))
    # The highest address so far within each group: in order of group and address, its rank only grows.
    by_last = np.lexsort((last, group))
    rank = np.empty(len(runs), dtype=np.int64)
    rank[by_last] = np.arange(len(runs))
    reach = last[by_last[np.maximum.accumulate(rank)]]
    breaks = other | (runs["va"][1:] > reach[:-1] + np.uint64(1))
    first = run_starts(breaks, len(runs))
    merged = runs[first].copy()
    ends = reach[np.append(first[1:] - 1, len(runs) - 1)]
    merged["bytes"] = ends - merged["va"] + np.uint64(1)
    return merged[np.argsort(merged["va"], kind="stable")]


def with_runs(known: NDArray[np.void], found: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    """Merged runs with more of them; the same array if each of those lies in one run of it, as in most walks again."""
    more = np.concatenate([known[:0], *found])
    if len(known):
        near = known[np.maximum(np.searchsorted(known["va"], more["va"], side="right") - 1, 0)]
        lies = (near["va"] <= more["va"]) & (more["va"] - near["va"] + more["bytes"] <= near["bytes"])
        for column in ("level", "writable", "nx", "cached"):
            lies &= near[column] == more[column]
        if (lies & (near["va"] - near["pa"] == more["va"] - more["pa"])).all():
            return known
    return merge_runs(np.concatenate((known, more)))


def covered(runs: NDArray[np.void], pfns: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each page frame lies in at least one of the runs, by physical address."""
    start, end = ((pa >> PAGE_SHIFT).astype(np.int64) for pa in (runs["pa"], runs["pa"] + runs["bytes"]))
    return Intervals.union(start, end).contains(pfns.astype(np.int64))


@dataclass(frozen=True)
class KernelMappings:
    """Every present mapping in the kernel half of the page tables.

    Attributes:
        runs: array of RUN, in order of ``va``.
        unreadable: what could not be walked; unless this is empty, a page that no run covers is unknown, not absent.
        tables: page tables read, by level (5 the top).
        direct_map_base: ``page_offset_base``; a run is of the direct map when ``va - pa`` equals it.
        surplus_references: references to shared tables that were not expanded (the first sixteen of each were).
        seconds: time that reading them took.
        passes: whole walks that were made.
        roots: how many page-table roots of each kind were looked at.
        of_init: the runs of init_top_pgt alone; None if there are no others.
    """

    runs: NDArray[np.void]
    unreadable: tuple[Span, ...]
    tables: dict[int, int]
    direct_map_base: int
    surplus_references: int = 0
    seconds: float = 0.0
    passes: int = 1
    roots: dict[str, int] = field(default_factory=dict)
    of_init: NDArray[np.void] | None = None

    @cached_property
    def is_direct(self) -> NDArray[np.bool_]:
        """Of each run: is it of the direct map; everything else is an alias."""
        return np.asarray(self.runs["va"] - self.runs["pa"] == np.uint64(self.direct_map_base), dtype=np.bool_)

    @property
    def main(self) -> NDArray[np.void]:
        """The runs of init_top_pgt."""
        return self.runs if self.of_init is None else self.of_init

    @property
    def direct(self) -> NDArray[np.void]:
        """The runs of the direct map."""
        return self.runs[self.is_direct]

    def addresses_of(self, pa: int) -> list[int]:
        """Every kernel address at which the walk has this physical page."""
        runs, wanted = self.runs, np.uint64(pa)
        here = runs[(runs["pa"] <= wanted) & (wanted - runs["pa"] < runs["bytes"])]
        found: list[int] = (here["va"] + (wanted - here["pa"])).tolist()
        return found

    def facts(self, levels: int) -> Walk:
        """The walk as a result tells it. How far the direct map is split: its bytes by the size of their pages."""
        direct = self.direct
        return Walk(
            levels=levels,
            seconds=round(self.seconds, 4),
            tables={str(level): count for level, count in self.tables.items()},
            runs=len(self.runs),
            direct_map_bytes={
                name: int(direct["bytes"][direct["level"] == level].sum())
                for level, name in enumerate(("4K", "2M", "1G"), 1)
            },
            unreadable=self.unreadable,
        )
