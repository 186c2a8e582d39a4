"""Naming mappings, by their region and by /proc/vmallocinfo."""

import numpy as np

from offmap.audit.kinds import kinds_of, parse_vmallocinfo
from offmap.audit.mappings import RUN, KernelMappings
from offmap.audit.reach import Kind
from offmap.audit.regions import KERNEL_TEXT, MODULES, VMALLOC, Layout

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
SPACE = 0xFF6F_03A8_C000_0000
TEXT = 0xFFFF_FFFF_8000_0000
MODULE = 0xFFFF_FFFF_C000_0000
LAYOUT = Layout(
    [
        (SPACE, SPACE + (1 << 40), VMALLOC),
        (TEXT, TEXT + (512 << 20), KERNEL_TEXT),
        (MODULE, MODULE + (1 << 28), MODULES),
    ]
)

# As Linux 6.12 prints it to root, with kernel.kptr_restrict=1.
SHOWN = """\
0xff6f03a8c0000000-0xff6f03a8c0005000   20480 irq_init_percpu_irqstack+0xf4/0x130 vmap
0xff6f03a8c0005000-0xff6f03a8c0007000    8192 acpi_os_map_iomem+0x1a9/0x1e0 phys=0x000000003ffe2000 ioremap
0xff6f03a8c000e000-0xff6f03a8c0010000    8192 gen_pool_add_owner+0x3e/0xc0 pages=1 vmalloc N0=1
0xff6f03a8c003d000-0xff6f03a8c003f000    8192 memremap+0x164/0x230 phys=0x00000000000f5000 ioremap
0xff6f03a8c0050000-0xff6f03a8c0054000   16384 alias_write+0x366/0x3c0 [offmap_alias] vmap
0xff6f03a8c0060000-0xff6f03a8c0062000    8192 vm_map_ram
0xff6f03a8c0070000-0xff6f03a8c0072000    8192 unpurged vm_area
0xffffffffc0877000-0xffffffffc0884000   53248 load_module+0x784/0x21b0 pages=12 vmalloc N0=12
"""
# The same with kptr_restrict=0: hashes, which keep 32 bits.
HASHED = """\
0x0000000070b1a09f-0x0000000023ad6bf1   20480 irq_init_percpu_irqstack+0xf4/0x130 vmap
0x0000000023ad6bf1-0x0000000065a7ded1    8192 acpi_os_map_iomem+0x1a9/0x1e0 phys=0x000000003ffe2000 ioremap
0x0000000065a7ded1-0x0000000065a7ded2   16384 memremap+0x164/0x230 phys=0x0000000060000000 ioremap
"""


def mappings(*pairs: tuple[int, int]) -> KernelMappings:
    """One page at each (va, pa)."""
    runs = np.zeros(len(pairs), dtype=RUN)
    for index, (va, pa) in enumerate(pairs):
        runs[index] = (va, pa, PAGE, 1, True, True, True)
    return KernelMappings(runs, (), {}, BASE)


def named(text: str, *pairs: tuple[int, int]) -> list[tuple[Kind, str]]:
    found = kinds_of(mappings(*pairs), LAYOUT, parse_vmallocinfo(text))
    order = tuple(Kind)
    return [(order[kind], found.callers[caller]) for kind, caller in zip(found.kind, found.caller, strict=True)]


def test_areas_are_named_by_their_address() -> None:
    places = [0, 0x5000, 0xE000, 0x3D000, 0x52000, 0x60000, 0x70000, 0x90000]
    assert named(SHOWN, *((SPACE + place, 0x1000_0000) for place in places)) == [
        (Kind.VMAP, "irq_init_percpu_irqstack+0xf4/0x130"),
        (Kind.IOREMAP, "acpi_os_map_iomem+0x1a9/0x1e0"),
        (Kind.VMALLOC, "gen_pool_add_owner+0x3e/0xc0"),
        (Kind.MEMREMAP, "memremap+0x164/0x230"),
        (Kind.VMAP, "alias_write+0x366/0x3c0 [offmap_alias]"),
        (Kind.VMAP, ""),
        (Kind.VMALLOC_SPACE, ""),
        (Kind.VMALLOC_SPACE, ""),
    ]


def test_other_regions_keep_their_name_and_modules_have_a_caller() -> None:
    assert named(SHOWN, (BASE + 0x5000, 0x5000), (TEXT, 0x100_0000), (MODULE + 0x87_7000, 0x2000), (1 << 63, 0)) == [
        (Kind.DIRECT_MAP, ""),
        (Kind.KERNEL_IMAGE, ""),
        (Kind.MODULE, "load_module+0x784/0x21b0"),
        (Kind.OTHER, ""),
    ]


def test_hashed_addresses_name_only_what_has_a_physical_one() -> None:
    pages = [(SPACE, 0x1000_0000), (SPACE + PAGE, 0x6000_2000), (SPACE + 2 * PAGE, 0x6000_3000), (SPACE, 0x3FFE_2000)]
    assert named(HASHED, *pages) == [
        (Kind.VMALLOC_SPACE, ""),
        (Kind.MEMREMAP, "memremap+0x164/0x230"),
        (Kind.VMALLOC_SPACE, ""),  # the guard page, which nothing of the area maps
        (Kind.IOREMAP, "acpi_os_map_iomem+0x1a9/0x1e0"),
    ]
    assert not kinds_of(mappings(*pages), LAYOUT, parse_vmallocinfo(HASHED)).named


def test_no_vmallocinfo_leaves_the_region() -> None:
    assert named("", (SPACE, 0)) == [(Kind.VMALLOC_SPACE, "")]
    assert parse_vmallocinfo("garbage\n0x12-nothing\n") == []
