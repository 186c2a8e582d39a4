"""What each kernel mapping is: by the region it lies in, and by /proc/vmallocinfo for those of the vmalloc space.

/proc/vmallocinfo (``mm/vmalloc.c``, ``s_show`` and ``vmalloc_info_show``) prints an area's addresses only to a reader
with CAP_SYSLOG while the sysctl ``kernel.kptr_restrict`` is 1; otherwise they are hashed. What it says of the physical
address of an ioremap or memremap area is never hashed: so those are told apart all the same. It names mappings; no
verdict rests on it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.audit.mappings import KernelMappings
from offmap.audit.procfs import read_path
from offmap.audit.reach import KINDS, Kind
from offmap.audit.regions import Layout
from offmap.uapi.page import PAGE_SIZE

VMALLOCINFO = "/proc/vmallocinfo"
_LINE = re.compile(r"0x([0-9a-f]+)-0x([0-9a-f]+) +(\d+)(.*)")
_PHYS = re.compile(r"phys=(?:0x)?([0-9a-f]+)")


@dataclass(frozen=True)
class Area:
    """One line of /proc/vmallocinfo: addresses [start, end) with the guard page, hashed or not.

    ``caller`` is ``function+offset/size [module]``; ``phys`` where the whole area is in one piece, else None.
    """

    start: int
    end: int
    size: int
    caller: str
    words: tuple[str, ...]
    phys: int | None

    @property
    def hashed(self) -> bool:
        # ptr_to_hashval() keeps 32 bits; no kernel address has as few.
        return self.start < 1 << 32

    @property
    def kind(self) -> Kind:
        if "ioremap" in self.words:
            # memremap() of what is not RAM goes through ioremap_cache(), which names its caller.
            return Kind.MEMREMAP if "memremap" in self.caller.partition("+")[0] else Kind.IOREMAP
        if "vmap" in self.words or "vm_map_ram" in self.words:
            return Kind.VMAP
        return Kind.VMALLOC if "vmalloc" in self.words else Kind.VMALLOC_SPACE


def parse_vmallocinfo(text: str) -> list[Area]:
    """The areas; lines of another form (``unpurged vm_area``, say) keep what they have."""
    areas = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        words = match[4].split()
        phys = next((found for word in words if (found := _PHYS.fullmatch(word))), None)
        caller = words[0] if words and "+0x" in words[0] else ""
        if caller and len(words) > 1 and words[1].startswith("["):
            caller = f"{caller} {words[1]}"
        start, end, size = int(match[1], 16), int(match[2], 16), int(match[3])
        areas.append(Area(start, end, size, caller, tuple(words), int(phys[1], 16) if phys else None))
    return areas


def read_vmallocinfo() -> list[Area]:
    """The areas there are now; none where the file cannot be read (mappings are then named by their region alone)."""
    try:
        return parse_vmallocinfo(read_path(VMALLOCINFO).decode("utf-8", "replace"))
    except OSError:
        return []


@dataclass(frozen=True)
class Kinds:
    """Kind (index into ``KINDS``) and caller (index into ``callers``) of each run of a walk.

    ``named``: whether the areas of the vmalloc space were told apart by address.
    """

    kind: NDArray[np.int8]
    caller: NDArray[np.int32]
    callers: tuple[str, ...]
    named: bool


def kinds_of(mappings: KernelMappings, layout: Layout, areas: Iterable[Area]) -> Kinds:
    """Name every run."""
    runs = mappings.runs
    kind = layout.kinds(runs["va"])
    kind[mappings.is_direct] = KINDS.index(Kind.DIRECT_MAP)
    caller = np.zeros(len(runs), dtype=np.int32)
    callers: dict[str, int] = {"": 0}
    known = list(areas)
    area_kind = np.array([KINDS.index(area.kind) for area in known], dtype=np.int8)
    area_caller = np.array([callers.setdefault(area.caller, len(callers)) for area in known], dtype=np.int32)
    in_space = kind == KINDS.index(Kind.VMALLOC_SPACE)
    plain = np.array([not area.hashed for area in known], dtype=np.bool_)
    if plain.any():
        # Modules are allocated from a space of their own by the same means: they have callers too.
        rows = np.flatnonzero(in_space | (kind == KINDS.index(Kind.MODULE)))
        start = np.array([area.start for area in known], dtype=np.uint64)
        end = np.array([area.end for area in known], dtype=np.uint64)
        order = np.flatnonzero(plain)[np.argsort(start[plain], kind="stable")]
        index = np.searchsorted(start[order], runs["va"][rows], side="right") - 1
        area_of = order[np.maximum(index, 0)]
        found = (index >= 0) & (runs["va"][rows] < end[area_of])
        rows, area_of = rows[found], area_of[found]
        caller[rows] = area_caller[area_of]
        in_area = in_space[rows]
        kind[rows[in_area]] = area_kind[area_of[in_area]]
    else:
        rows = np.flatnonzero(in_space)
        rows = rows[np.argsort(runs["pa"][rows], kind="stable")]
        for number, area in enumerate(known):
            if area.phys is not None:
                # The size has the guard page in it.
                ends = area.phys, area.phys + max(area.size - PAGE_SIZE, PAGE_SIZE)
                low, high = np.searchsorted(runs["pa"][rows], np.array(ends, dtype=np.uint64)).tolist()
                kind[rows[low:high]] = area_kind[number]
                caller[rows[low:high]] = area_caller[number]
    return Kinds(kind, caller, tuple(callers), bool(plain.any()))
