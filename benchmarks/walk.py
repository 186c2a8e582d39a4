"""The audit's work in a 2 GiB disposable host: the walk of all its page tables, and the scan of all that they map.

The walk's peer is a plain pread of the same page tables and nothing more; the scan's, a plain pread of the same bytes.
What is beyond them is ours.
"""

import argparse
import os
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figure import Figure, Limit
from lab import run_in_lab
from offmap.audit.canary import new_key
from offmap.audit.kcore import Kcore
from offmap.audit.mappings import KernelMappings
from offmap.audit.readable import Piece, ioremap_areas, read_plan, union, zero_filled_intervals
from offmap.audit.regions import Layout
from offmap.audit.scan import search
from offmap.audit.walk import walk_kernel_half
from offmap.errors import OffmapError

PAGE = 4096
MAX_WALK_SECONDS = 2.0
_STEP = 2 << 20  # what the scan reads at once


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


def measure_walk(kcore: Kcore, fd: int, rounds: int) -> KernelMappings:
    """Walk ``rounds`` times, and print the figure."""
    info = kcore.vmcoreinfo
    place = (info.root_pa, info.levels, kcore.page_offset_base, info.sme_mask)
    recorder = Recorder(kcore)
    mappings = walk_kernel_half(recorder, *place)
    read = np.concatenate(recorder.reads).tolist()
    offsets = [kcore_offset(kcore, pa + kcore.page_offset_base) for pa in read]
    ours, peer = [], []
    for _ in range(rounds):
        mappings = walk_kernel_half(kcore, *place)
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
    return mappings


def measure_scan(kcore: Kcore, fd: int, mappings: KernelMappings, rounds: int) -> None:
    """Search what is mapped ``rounds`` times, and print the figure."""
    layout = Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments)
    ram = union(kcore.ram)
    zero_filled = zero_filled_intervals(kcore.page_flags, ram)
    readable, _ = read_plan(mappings, ram, kcore.segments, layout.vmemmap, zero_filled, ioremap_areas())
    total = sum(piece.bytes for piece in readable)
    ours, peer = [], []
    for _ in range(rounds):
        started = time.monotonic()
        search(readable, kcore.read_virtual, (new_key(),))
        ours.append((time.monotonic() - started) / total * 1e9)
        peer.append(read_plain(kcore, fd, readable) / total * 1e9)
    facts: dict[str, Any] = {
        "bytes": total,
        "ours_mb_per_s": [round(1e3 / each, 1) for each in ours],
        "peer_mb_per_s": [round(1e3 / each, 1) for each in peer],
    }
    Figure("walk", "scan", "s/GB", ours, "pread of the same bytes", peer, facts=facts).print()


def read_plain(kcore: Kcore, fd: int, readable: list[Piece]) -> float:
    """Seconds that a plain pread of these pieces takes, neighbours joined and cut as the scan does it."""
    buffer = memoryview(bytearray(_STEP))
    offsets = []
    for start, end in union((piece.va, piece.va + piece.bytes) for piece in readable):
        offsets += [(kcore_offset(kcore, va), min(_STEP, end - va)) for va in range(start, end, _STEP)]
    started = time.monotonic()
    for offset, size in offsets:
        os.preadv(fd, [buffer[:size]], offset)
    return time.monotonic() - started


def inside(rounds: int) -> int:
    """Measure, in the disposable host."""
    fd = os.open("/proc/kcore", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Kcore() as kcore:
            mappings = measure_walk(kcore, fd, max(rounds, 3))
            measure_scan(kcore, fd, mappings, rounds)
    finally:
        os.close(fd)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 walks, 1 scan")
    for hidden in ("--guest-kernel", "--guest-initrd"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    try:
        if args.inside:
            return inside(rounds)
        return run_in_lab(__file__, ["--rounds", str(rounds)])
    except OffmapError as error:
        print(f"walk: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
