"""Which part of the kernel's address space an address lies in, by the names the kernel's documentation uses.

Source: ``Documentation/arch/x86/x86_64/mm.rst``, "Complete virtual memory map with 4-level page tables" and the same
"with 5-level page tables". The bases that KASLR moves (direct map, vmalloc, vmemmap) are the running kernel's; where
it does not tell one, the table's fixed base is used.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offmap.audit.kcore import Segment
from offmap.audit.reach import KINDS, Kind
from offmap.audit.vmcoreinfo import START_KERNEL_MAP, VmcoreInfo
from offmap.uapi.page import PAGE_MASK

LDT_REMAP = "LDT remap for PTI"
DIRECT_MAP = "direct mapping of all physical memory"
VMALLOC = "vmalloc/ioremap space"
VMEMMAP = "virtual memory map"
KASAN = "KASAN shadow memory"
CPU_ENTRY_AREA = "cpu_entry_area mapping"
ESPFIX = "%esp fixup stacks"
EFI = "EFI region mapping space"
KERNEL_TEXT = "kernel text mapping"
MODULES = "module mapping space"
FIXMAP = "kernel-internal fixmap range"
VSYSCALL = "legacy vsyscall ABI"
HOLE = "unused hole"

_KINDS = {
    LDT_REMAP: Kind.LDT_REMAP,
    DIRECT_MAP: Kind.OTHER,  # within that region, but at another place than the direct map has the page
    VMALLOC: Kind.VMALLOC_SPACE,
    VMEMMAP: Kind.VMEMMAP,
    KASAN: Kind.KASAN,
    CPU_ENTRY_AREA: Kind.CPU_ENTRY_AREA,
    ESPFIX: Kind.ESPFIX,
    EFI: Kind.EFI,
    KERNEL_TEXT: Kind.KERNEL_IMAGE,
    MODULES: Kind.MODULE,
    FIXMAP: Kind.FIXMAP,
    VSYSCALL: Kind.VSYSCALL,
}

_TOP = 1 << 64
# arch/x86/mm/kaslr.c, vaddr_end: CPU_ENTRY_AREA_BASE. (mm.rst says 2 TiB less; KASLR does put vmemmap above that.)
VADDR_END = 0xFFFF_FE00_0000_0000
# mm.rst, the part that is the same for 4 and 5 levels.
_KASAN_END = 0xFFFF_FC00_0000_0000
_FIXED = (
    (VADDR_END, 0xFFFF_FE80_0000_0000, CPU_ENTRY_AREA),
    (0xFFFF_FF00_0000_0000, 0xFFFF_FF80_0000_0000, ESPFIX),
    (0xFFFF_FFEF_0000_0000, 0xFFFF_FFFF_0000_0000, EFI),
    # FIXADDR_START varies with the build; nothing else lies between the modules and the vsyscall page.
    (0xFFFF_FFFF_FF00_0000, 0xFFFF_FFFF_FF60_0000, FIXMAP),
    (0xFFFF_FFFF_FF60_0000, 0xFFFF_FFFF_FF60_1000, VSYSCALL),
)
_MODULES_END = 0xFFFF_FFFF_FF00_0000


class _Bases(NamedTuple):
    """Bases and ends of one paging mode without KASLR (mm.rst). The LDT remap ends where the direct map begins."""

    ldt_remap: int
    direct_map: int
    vmalloc: int
    vmalloc_end: int
    vmemmap: int
    vmemmap_end: int
    kasan: int


_FOUR_LEVELS = _Bases(
    0xFFFF_8800_0000_0000,
    0xFFFF_8880_0000_0000,
    0xFFFF_C900_0000_0000,
    0xFFFF_E900_0000_0000,
    0xFFFF_EA00_0000_0000,
    0xFFFF_EB00_0000_0000,
    0xFFFF_EC00_0000_0000,
)
_FIVE_LEVELS = _Bases(
    0xFF10_0000_0000_0000,
    0xFF11_0000_0000_0000,
    0xFFA0_0000_0000_0000,
    0xFFD2_0000_0000_0000,
    0xFFD4_0000_0000_0000,
    0xFFD6_0000_0000_0000,
    0xFFDF_0000_0000_0000,
)


class Layout:
    """The running kernel's map of its own addresses: names ranges, never decides a verdict."""

    def __init__(self, ranges: Sequence[tuple[int, int, str]]) -> None:
        self.vmemmap = next((start for start, _, name in ranges if name == VMEMMAP), VADDR_END)
        self._ranges = sorted(ranges)
        self._starts = [start for start, _, _ in self._ranges]

    def name(self, va: int) -> str:
        """Name of the region that holds this address."""
        index = bisect_right(self._starts, va) - 1
        return self._ranges[index][2] if index >= 0 and va < self._ranges[index][1] else HOLE

    def names(self, va: NDArray[np.uint64]) -> tuple[NDArray[np.intp], tuple[str, ...]]:
        """The regions of many addresses: for each an index into the names, and the names."""
        # An empty range in front, so that every address has one at or below it.
        ranges = [(0, 0, HOLE), *self._ranges]
        starts, ends = (np.array([min(r[side], _TOP - 1) for r in ranges], dtype=np.uint64) for side in (0, 1))
        index = np.searchsorted(starts, va, side="right") - 1
        return np.where(va < ends[index], index, 0), tuple(name for _, _, name in ranges)

    def kinds(self, va: NDArray[np.uint64]) -> NDArray[np.int8]:
        """What a mapping at each address is, if it is not the direct map's own, as an index into ``KINDS``."""
        index, names = self.names(va)
        codes = np.array([KINDS.index(_KINDS.get(name, Kind.OTHER)) for name in names], dtype=np.int8)
        return np.asarray(codes[index], dtype=np.int8)

    @classmethod
    def of(cls, info: VmcoreInfo, page_offset_base: int, segments: Sequence[Segment] = ()) -> "Layout":
        """Derive the layout from what the kernel says of itself.

        Args:
            info: VMCOREINFO.
            page_offset_base: base of the direct map.
            segments: of /proc/kcore; they tell where the vmalloc space ends, and where it starts on kernels whose
                VMCOREINFO does not.
        """
        fixed = _FIVE_LEVELS if info.pgtable_l5_enabled else _FOUR_LEVELS
        # Half of the smallest vmalloc space there is (32 TiB): only that segment is so large.
        large = [s for s in segments if s.pa is None and s.va < VADDR_END and s.size >= 16 << 40]
        moved = page_offset_base != fixed.direct_map
        if large:
            vmalloc, vmalloc_end = large[0].va, large[0].va + large[0].size + 1 & PAGE_MASK
        else:
            vmalloc = info.vmalloc_start or fixed.vmalloc
            vmalloc_end = vmalloc + fixed.vmalloc_end - fixed.vmalloc
        vmemmap = info.vmemmap
        if vmemmap is None:
            above = [s.va for s in segments if s.pa is None and vmalloc_end <= s.va < VADDR_END]
            vmemmap = min(above, default=fixed.vmemmap)
        # KASAN's shadow has a fixed place, and KASLR of the bases is off with it (CONFIG_RANDOMIZE_MEMORY).
        vmemmap_end = VADDR_END if moved else fixed.vmemmap_end
        ranges = [
            (fixed.ldt_remap, fixed.direct_map, LDT_REMAP),
            (page_offset_base, vmalloc, DIRECT_MAP),
            (vmalloc, vmalloc_end, VMALLOC),
            (vmemmap, vmemmap_end, VMEMMAP),
            (START_KERNEL_MAP, START_KERNEL_MAP + info.kernel_image_size, KERNEL_TEXT),
            (START_KERNEL_MAP + info.kernel_image_size, _MODULES_END, MODULES),
            *_FIXED,
        ]
        if not moved:
            ranges.append((fixed.kasan, _KASAN_END, KASAN))
        return cls([(start, min(end, _TOP), name) for start, end, name in ranges if start < end])
