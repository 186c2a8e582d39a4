"""The walk of all page tables of a 2 GiB disposable host.

Its peer is a plain pread of the same page tables and nothing more. What is beyond that is ours.
"""

import os
import sys
import time

import numpy as np
from numpy.typing import NDArray

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.audit.kcore import Kcore
from offmap.audit.walk import Walker

PAGE = 4096
MAX_WALK_SECONDS = 2.0


class Recorder:
    """A PhysicalReader that remembers which pages were read, in their order."""

    def __init__(self, kcore: Kcore) -> None:
        self._kcore = kcore
        self.reads: list[NDArray[np.uint64]] = []

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self._kcore.in_ram(pa)

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        self.reads.append(pa.copy())
        self._kcore.read_pages(pa, out)

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self._kcore.zero_filled(pa)


def read_tables(fd: int, offsets: list[int]) -> float:
    """Seconds that a plain pread of the page tables at these offsets of kcore takes."""
    buffer = bytearray(PAGE)
    started = time.monotonic()
    for offset in offsets:
        os.preadv(fd, [buffer], offset)
    return time.monotonic() - started


def kcore_offset(kcore: Kcore, va: int) -> int:
    """Where a kernel address is in /proc/kcore."""
    return next(s.offset + va - s.va for s in kcore.segments if s.va <= va < s.va + s.size)


def measure_walk(kcore: Kcore, fd: int, rounds: int) -> None:
    """Walk ``rounds`` times, and print the figure."""
    info = kcore.vmcoreinfo
    place = (info.root_pa, info.levels, kcore.page_offset_base, info.sme_mask)
    recorder = Recorder(kcore)
    Walker(recorder, *place).walk()
    read = np.concatenate(recorder.reads).tolist()
    offsets = [kcore_offset(kcore, pa + kcore.page_offset_base) for pa in read]
    ours, peer = [], []
    for _ in range(rounds):
        walker = Walker(kcore, *place)
        walker.walk()
        mappings = walker.mappings()
        ours.append(mappings.seconds)
        peer.append(read_tables(fd, offsets))
    facts = {
        "levels": info.levels,
        "tables": {str(level): count for level, count in mappings.tables.items()},
        "table_reads": len(offsets),
        "runs": len(mappings.runs),
        "unreadable": len(mappings.unreadable),
    }
    limit = Limit("ours", MAX_WALK_SECONDS)
    Figure("walk", "walk", "s", ours, "pread of the same tables", peer, limit, facts).print()


def inside(rounds: int) -> int:
    """Measure, in the disposable host."""
    fd = os.open("/proc/kcore", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Kcore() as kcore:
            measure_walk(kcore, fd, max(rounds, 3))
    finally:
        os.close(fd)
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="3 walks")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        return inside(rounds) if args.inside else run_in_lab(__file__, ["--rounds", str(rounds)])

    return exit_status("walk", run)


if __name__ == "__main__":
    sys.exit(main())
