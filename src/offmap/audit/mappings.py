"""What a walk found: runs of kernel mappings, and whether a physical page lies in one of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.audit.intervals import Intervals, run_starts
from offmap.audit.result import Span, Walk
from offmap.uapi.page import PAGE_SHIFT

# One stretch of mappings, contiguous in virtual and physical addresses, of one page size and one set of permissions.
RUN = np.dtype(
    [
        ("va", np.uint64),
        ("pa", np.uint64),
        ("bytes", np.uint64),
        ("level", np.uint8),  # 1: 4 KiB pages, 2: 2 MiB, 3: 1 GiB
        ("writable", np.bool_),
        ("nx", np.bool_),
    ]
)


def merge_runs(runs: NDArray[np.void]) -> NDArray[np.void]:
    """Sort runs by address and merge neighbours that continue each other."""
    if len(runs) < 2:
        return runs
    runs = runs[np.argsort(runs["va"], kind="stable")]
    before, after = runs[:-1], runs[1:]
    breaks = (before["va"] + before["bytes"] != after["va"]) | (before["pa"] + before["bytes"] != after["pa"])
    for name in ("level", "writable", "nx"):
        breaks |= before[name] != after[name]
    first = run_starts(breaks, len(runs))
    merged = runs[first].copy()
    merged["bytes"] = np.add.reduceat(runs["bytes"], first)
    return merged


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
        seconds: time the walk took.
    """

    runs: NDArray[np.void]
    unreadable: tuple[Span, ...]
    tables: dict[int, int]
    direct_map_base: int
    surplus_references: int = 0
    seconds: float = 0.0

    @property
    def is_direct(self) -> NDArray[np.bool_]:
        """Of each run: is it of the direct map; everything else is an alias."""
        return np.asarray(self.runs["va"] - self.runs["pa"] == np.uint64(self.direct_map_base), dtype=np.bool_)

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
