"""An audit of 200 VMs scattered over a host of 1 TiB: processor time of all that offmap itself does.

The page tables are an image made here (those of ``walk_scale.py``: 1 TiB in 2M entries), and so is the pagemap of a VM,
in a file. Each VM has a 200th of the RAM, in pieces of 2 MiB in no order. As in ``offmap audit --all``, the tables are
walked 20 times, once for all; each VM's pagemap is read before and after, and its pages are judged and joined. The
kernel's part of reading a real pagemap and a real kcore is not in it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import walk_scale
from command import benchmark_parser
from figure import Figure, Limit
from offmap.audit import pagemap
from offmap.audit.classify import classify
from offmap.audit.frames import EMPTY, POPULATED, Frames, runs_of_pages
from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.intervals import Intervals
from offmap.audit.join import join, physical_map
from offmap.audit.kinds import kinds_of
from offmap.audit.regions import DIRECT_MAP, Layout
from offmap.audit.regions import VMALLOC as VMALLOC_SPACE
from offmap.audit.result import Source
from offmap.audit.walk import Walker
from offmap.errors import OffmapError

VMS, WALKS = 200, 20
LIMIT = 60.0  # seconds of processor time
VA = 0x7F00_0000_0000
_PIECE = 512  # pages
_CHUNK = 1 << 17  # pages asked of pagemap at once (offmap.audit.frames)
_PRESENT = 1 << 63  # Documentation/admin-guide/mm/pagemap.rst


def look(fd: int, pages: int) -> Frames:
    """The frames of a VM, as its pagemap has them."""
    parts = []
    for first in range(0, pages, _CHUNK):
        entries = pagemap.read_pagemap(fd, first * walk_scale.PAGE, min(_CHUNK, pages - first))
        state = np.where(pagemap.present(entries), POPULATED, EMPTY).astype(np.uint8)
        parts.append(runs_of_pages(pagemap.pfn(entries).astype(np.int64), state, np.zeros(len(state), dtype=np.uint8)))
    starts = np.cumsum([0, *(part.total for part in parts)])
    page = np.concatenate([part.page + start for part, start in zip(parts, starts, strict=False)])
    pfn, state, why = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pfn", "state", "why"))
    return Frames(page, pfn, state, why, total=pages)


def audit(image: walk_scale.Image, folder: Path, vms: int) -> tuple[float, float]:
    """Seconds of processor time that the walks took, and that all VMs did."""
    name = walk_scale.TERABYTE
    pieces = np.random.default_rng(3).permutation(np.arange(0, walk_scale.RAM[name] // walk_scale.PAGE, _PIECE))
    layout = Layout(
        [
            (walk_scale.BASE, walk_scale.VMALLOC, DIRECT_MAP),
            (walk_scale.VMALLOC, walk_scale.VMALLOC + (1 << 40), VMALLOC_SPACE),
        ]
    )
    spent = time.process_time()
    walker = Walker(image, walk_scale.FIRST + (image.tables - 1) * walk_scale.PAGE, 4, walk_scale.BASE)
    for _ in range(WALKS):
        walker.walk()
    mappings = walker.mappings()
    kinds = kinds_of(mappings, layout, ())
    walks, judging = time.process_time() - spent, 0.0
    for number in range(vms):
        mine = pieces[number::VMS]
        path = folder / "pagemap"
        (np.repeat(mine, _PIECE) + np.tile(np.arange(_PIECE), len(mine)) | np.int64(_PRESENT - (1 << 64))).tofile(path)
        pages, fd = len(mine) * _PIECE, os.open(path, os.O_RDONLY)
        spent = time.process_time()
        before, after = look(fd, pages), look(fd, pages)
        ram = GuestRam((RamRange(VA, pages * walk_scale.PAGE, Source.MEMSLOT, 0),))
        judged = classify(before, after, Intervals.union(mine[:0], mine[:0]), mappings, kinds)
        join(judged, mappings, kinds, layout, ram)
        physical_map(judged, [(0, walk_scale.RAM[name])])
        judging += time.process_time() - spent
        os.close(fd)
        if judged.counts().direct_map_pages != pages:
            raise OffmapError("the audit did not find what the tables map")
    return walks, judging


def main() -> int:
    args = benchmark_parser(__doc__, rounds=1, quick="a tenth of the VMs").parse_args()
    vms = VMS // 10 if args.quick else VMS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tables")
        build = [sys.executable, walk_scale.__file__, "--one", str(path), walk_scale.TERABYTE, "build"]
        subprocess.run(build, check=True)
        image = walk_scale.Image(path, walk_scale.RAM[walk_scale.TERABYTE])
        found = [audit(image, Path(folder), vms) for _ in range(args.rounds)]
    facts = {"vms": vms, "walks": WALKS, "walks_seconds": round(min(walks for walks, _ in found), 3)}
    samples = [walks + judging * VMS / vms for walks, judging in found]
    limit = Limit("ours", LIMIT)
    Figure("fleet", f"{VMS} VMs on 1 TiB", "s of processor time", samples, limit=limit, facts=facts).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
