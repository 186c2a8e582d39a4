"""The walk of page tables of large hosts, and the join of a guest with what they map: time, and memory at its peak.

The page tables are images made here: a terabyte of RAM mapped by 2 MiB entries, and 64 GiB split into 4 KiB, each with
256 MiB of vmalloc space in single pages beside it. They stand in a file and are read as /proc/kcore is, neighbours in
one system call; so what is measured is our own work. The peer is a plain pread of all these tables. Each figure is
taken in a process of its own, and its memory is that process's resident peak (getrusage), the interpreter included.

The join takes a guest that has all that RAM but the first gigabyte: in one piece, or scattered in no order, in pieces
of 2 MiB (the terabyte) or of 64 KiB (the 64 GiB).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from command import benchmark_parser
from figure import Figure, Limit
from offmap.audit.classify import classify
from offmap.audit.frames import POPULATED, Frames
from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.intervals import Intervals
from offmap.audit.join import join, physical_map
from offmap.audit.kinds import kinds_of
from offmap.audit.mappings import KernelMappings
from offmap.audit.regions import DIRECT_MAP, Layout
from offmap.audit.regions import VMALLOC as VMALLOC_SPACE
from offmap.audit.result import Source
from offmap.audit.walk import Walker
from offmap.errors import OffmapError

PAGE = 4096
GIB = 1 << 30
BASE = 0xFFFF_8880_0000_0000  # page_offset_base without KASLR, 4 levels (mm.rst)
VMALLOC = 0xFFFF_C900_0000_0000
# pgtable_types.h: _PAGE_PRESENT | _PAGE_RW, _PAGE_PSE, _PAGE_NX
TABLE, LARGE, NX = 0x3, 0x80, 1 << 63

TERABYTE, SPLIT = "1 TiB in 2M entries", "64 GiB in 4K entries"
RAM = {TERABYTE: 1 << 40, SPLIT: 64 * GIB}
LIMITS = {TERABYTE: 1.0, SPLIT: 5.0}  # seconds
WHAT = {"walk": "walk", "one": "join, guest in one piece", "scattered": "join, scattered guest"}
MAX_BYTES = 200 << 20
_PIECE = {TERABYTE: 512, SPLIT: 16}  # pages of a scattered guest's pieces
_VMALLOC_PAGES = 1 << 16
FIRST = 16 << 20  # physical address of the first table; the others follow it, the top one last


class Image:
    """A PhysicalReader of page tables that stand in a file."""

    def __init__(self, path: Path, ram: int) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.tables = os.fstat(self.fd).st_size // PAGE
        self.ram = ram

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.asarray(pa < self.ram)

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        view = out.reshape(-1).view(np.uint8).data
        breaks = (np.flatnonzero(np.diff(pa) != PAGE) + 1).tolist()
        for start, end in zip([0, *breaks], [*breaks, len(pa)], strict=True):
            os.preadv(self.fd, [view[start * PAGE : end * PAGE]], int(pa[start]) - FIRST)

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.zeros(len(pa), dtype=np.bool_)

    def walk(self) -> KernelMappings:
        walker = Walker(self, FIRST + (self.tables - 1) * PAGE, 4, BASE)
        walker.walk()
        return walker.mappings()

    def read_plain(self) -> float:
        """Seconds that a pread of all tables takes."""
        buffer = memoryview(bytearray(8 << 20))
        started = time.monotonic()
        for offset in range(0, self.tables * PAGE, len(buffer)):
            os.preadv(self.fd, [buffer], offset)
        return time.monotonic() - started


def build(path: Path, ram: int, level: int) -> None:
    """Write tables that map ``ram`` bytes at BASE by leaves of ``level``, and _VMALLOC_PAGES in disorder at VMALLOC."""
    direct = np.arange(0, ram, PAGE if level == 1 else 2 << 20, dtype=np.uint64)
    direct |= np.uint64(TABLE | NX | (LARGE if level == 2 else 0))
    vmalloc = np.random.default_rng(1).permutation(np.arange(GIB, GIB + _VMALLOC_PAGES * PAGE, PAGE, dtype=np.uint64))
    root = np.zeros(512, dtype=np.uint64)
    written = 0
    with path.open("wb") as file:
        for va, lowest, leaves in ((BASE, level, direct), (VMALLOC, 1, vmalloc | np.uint64(TABLE | NX))):
            entries = leaves
            for _ in range(lowest, 4):  # up to the table of level 3; all begin at a multiple of 512 GiB
                tables = -(-len(entries) // 512)
                file.write(np.concatenate((entries, np.zeros(-len(entries) % 512, dtype=np.uint64))).tobytes())
                place = FIRST + (written + np.arange(tables)) * PAGE
                entries = (place | TABLE).astype(np.uint64)
                written += tables
            root[va >> 39 & 511 :][: len(entries)] = entries
        file.write(root.tobytes())


def guest(ram: int, piece: int) -> Frames:
    """A guest that has all but the first gigabyte, in pieces of so many pages; 0: in one."""
    step = piece or (ram - GIB) // PAGE
    pfn = np.arange(GIB // PAGE, ram // PAGE, step, dtype=np.int64)
    np.random.default_rng(2).shuffle(pfn)
    state, page = np.full(len(pfn), POPULATED, dtype=np.uint8), np.arange(len(pfn), dtype=np.int64) * step
    return Frames(page, pfn, state, np.zeros_like(state), total=len(pfn) * step)


def measure(path: Path, name: str, what: str, rounds: int) -> dict[str, Any]:
    """In a process of its own: seconds of each round, and the peak of memory in bytes."""
    image = Image(path, RAM[name])
    ours: list[float] = []
    peer: list[float] = []
    facts: dict[str, Any] = {"tables": image.tables}
    if what == "walk":
        for _ in range(rounds):
            started = time.monotonic()
            mappings = image.walk()
            ours.append(time.monotonic() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        peer = [image.read_plain() for _ in range(rounds)]
        if sum(mappings.facts(4).direct_map_bytes.values()) != RAM[name] or mappings.unreadable:
            raise OffmapError("the walk did not find what the tables map")
        facts["runs"] = len(mappings.runs)
    else:
        mappings = image.walk()
        frames = guest(RAM[name], _PIECE[name] if what == "scattered" else 0)
        layout = Layout([(BASE, VMALLOC, DIRECT_MAP), (VMALLOC, VMALLOC + (1 << 40), VMALLOC_SPACE)])
        ram = GuestRam((RamRange(0x7F00_0000_0000, frames.total * PAGE, Source.MEMSLOT, 0),))
        nothing = Intervals.union(frames.page[:0], frames.page[:0])
        for _ in range(rounds):
            started = time.monotonic()
            kinds = kinds_of(mappings, layout, ())
            judged = classify(frames, frames, nothing, mappings, kinds)
            joined = join(judged, mappings, kinds, layout, ram)
            physical_map(judged, [(0, RAM[name])])
            ours.append(time.monotonic() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if judged.counts().direct_map_pages != frames.total or judged.counts().alias_pages != _VMALLOC_PAGES:
            raise OffmapError("the join did not find what the tables map")
        facts |= {"guest_runs": len(frames.page), "kernel_runs": len(mappings.runs), "sorts": len(joined.reach)}
    return {"ours": ours, "peer": peer, "peak": peak, "facts": facts}


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="one of each")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    if args.one:
        path, name, what = args.one
        if what == "build":
            build(Path(path), RAM[name], 2 if name == TERABYTE else 1)
            return 0
        print(json.dumps(measure(Path(path), name, what, rounds)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for name, limit in LIMITS.items():
            path = Path(folder, "tables")
            # A child's peak begins with what its parent had resident: so this process makes nothing large itself.
            subprocess.run([sys.executable, __file__, "--one", str(path), name, "build"], check=True)
            for what, figure in (
                ("walk", "walk"),
                ("one", "join, guest in one piece"),
                ("scattered", "join, scattered"),
            ):
                command = [sys.executable, __file__, "--rounds", str(rounds), "--one", str(path), name, what]
                done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                peak = {"peak_mib": done["peak"] >> 20}
                if what == "walk":
                    peak["peak_mib_at_most"] = MAX_BYTES >> 20
                Figure(
                    *("walk_scale", f"{figure}: {name}", "s", done["ours"]),
                    *("pread of the same tables" if done["peer"] else "", done["peer"]),
                    *(Limit("ours", limit), done["facts"] | peak),
                ).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
