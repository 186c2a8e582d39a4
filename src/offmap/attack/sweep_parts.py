"""What it is that a sweep reads: named for people, with sizes. No verdict rests on it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offmap.attack.result import Part
from offmap.audit.kinds import read_vmallocinfo
from offmap.audit.pageflags import KPF_ANON, KPF_BUDDY, KPF_LRU, KPF_MMAP, KPF_PGTABLE, KPF_SLAB, PageFlags
from offmap.audit.readable import Piece, clip, union
from offmap.audit.regions import DIRECT_MAP, Layout
from offmap.uapi.page import PAGE_SIZE

_STACKS = ("dup_task_struct", "copy_process", "kernel_clone")  # who allocates a kernel stack, as it was inlined
# By page flags, the first that is set.
_KINDS = (
    (KPF_BUDDY, "free pages"),
    (KPF_SLAB, "slab"),
    (KPF_PGTABLE, "page tables"),
    (KPF_ANON, "memory of processes, plain guests' RAM among it"),
    (KPF_LRU, "page cache, memory files among it"),
    (KPF_MMAP, "other memory that processes map"),
)
_OTHER = "other memory of the kernel's own"


def parts_of(pieces: Sequence[Piece], flags: PageFlags, layout: Layout) -> tuple[Part, ...]:
    """The direct map by what each of its pages is, kernel stacks, and all else by its region; the largest first."""
    found: Counter[str] = Counter()
    stacks = union((area.start, area.end) for area in read_vmallocinfo() if area.caller.startswith(_STACKS))
    of_stacks, others = clip(pieces, stacks, virtual=True)
    found["kernel stacks"] += sum(piece.bytes for piece in of_stacks)
    for piece in others:
        name = layout.name(piece.va)
        if name == DIRECT_MAP:
            found.update(_by_flags(flags.range(piece.pa // PAGE_SIZE, -(-piece.bytes // PAGE_SIZE))))
        else:
            found[name] += piece.bytes
    return tuple(Part(name=name, bytes=size) for name, size in found.most_common() if size)


def _by_flags(flags: NDArray[np.uint64]) -> dict[str, int]:
    sizes, left = {}, np.ones(len(flags), dtype=np.bool_)
    for bit, name in _KINDS:
        here = left & (flags >> np.uint64(bit) & np.uint64(1) != 0)
        sizes[name] = int(here.sum()) * PAGE_SIZE
        left &= ~here
    return {**sizes, _OTHER: int(left.sum()) * PAGE_SIZE}
