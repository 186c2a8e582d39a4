"""VMCOREINFO: what the running kernel says of its own layout, in a note of /proc/kcore.

Source: ``kernel/vmcore_info.c`` and ``arch/x86/kernel/vmcore_info_64.c``; the note's text is one ``KEY=VALUE`` a line.
"""

from dataclasses import dataclass
from typing import Self

from offmap.errors import Undetermined
from offmap.uapi.elf import ELF64_NHDR, Elf64_Nhdr

# arch/x86/include/asm/page_64_types.h, __START_KERNEL_map: the kernel image is mapped from here up.
START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000

# arch/x86/include/asm/page_64_types.h, KERNEL_IMAGE_SIZE without CONFIG_RANDOMIZE_BASE.
_KERNEL_IMAGE_SIZE = 512 << 20


def find_note(notes: bytes, name: bytes) -> bytes | None:
    """The descriptor of the first note of this name in a PT_NOTE segment, or None."""
    position = 0
    while position + ELF64_NHDR.size <= len(notes):
        header = Elf64_Nhdr._make(ELF64_NHDR.unpack_from(notes, position))
        name_at = position + ELF64_NHDR.size
        descriptor_at = name_at + (header.n_namesz + 3 & ~3)
        if notes[name_at : name_at + header.n_namesz].rstrip(b"\0") == name:
            return notes[descriptor_at : descriptor_at + header.n_descsz]
        position = descriptor_at + (header.n_descsz + 3 & ~3)
    return None


@dataclass(frozen=True)
class VmcoreInfo:
    """The few facts of VMCOREINFO that a walk of the page tables needs.

    Addresses are virtual unless they are called ``pa``. ``vmalloc_start`` and ``vmemmap`` are None on kernels that do
    not export them. ``page_bytes`` is the size of ``struct page``, ``page_lru`` and ``page_mapping`` are offsets in it.
    """

    release: str
    init_top_pgt: int
    phys_base: int
    pgtable_l5_enabled: bool
    sme_mask: int
    kernel_image_size: int
    vmalloc_start: int | None
    vmemmap: int | None
    page_bytes: int | None = None
    page_lru: int | None = None
    page_mapping: int | None = None

    @property
    def root_pa(self) -> int:
        """Physical address of the kernel's top-level page table (``__pa_symbol``)."""
        return self.init_top_pgt - START_KERNEL_MAP + self.phys_base

    @property
    def levels(self) -> int:
        """Depth of the page tables: 5 with LA57, else 4."""
        return 5 if self.pgtable_l5_enabled else 4

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the note's text.

        Raises:
            Undetermined: a line that the walk depends on is missing or malformed; nothing is guessed.
        """
        facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

        def number(key: str, base: int) -> int | None:
            try:
                return int(facts[key], base) if key in facts else None
            except ValueError:
                raise Undetermined(f"VMCOREINFO has {key}={facts[key]!r}, which is not a number") from None

        def needed(key: str, base: int, other: str = "") -> int:
            value = number(key if key in facts else other, base)
            if value is None:
                raise Undetermined(f"VMCOREINFO of this kernel has no {key}, so its page tables cannot be found")
            return value

        return cls(
            release=facts.get("OSRELEASE", ""),
            init_top_pgt=needed("SYMBOL(init_top_pgt)", 16, "SYMBOL(swapper_pg_dir)"),
            phys_base=needed("NUMBER(phys_base)", 10),
            pgtable_l5_enabled=bool(needed("NUMBER(pgtable_l5_enabled)", 10)),
            # Absent where the kernel is built without AMD memory encryption: then no bit of an entry is the C-bit.
            sme_mask=(number("NUMBER(sme_mask)", 10) or 0) & (1 << 64) - 1,
            kernel_image_size=number("NUMBER(KERNEL_IMAGE_SIZE)", 10) or _KERNEL_IMAGE_SIZE,
            vmalloc_start=number("NUMBER(VMALLOC_START)", 16),
            vmemmap=number("SYMBOL(vmemmap)", 16),
            page_bytes=number("SIZE(page)", 10),
            page_lru=number("OFFSET(page.lru)", 10),
            page_mapping=number("OFFSET(page.mapping)", 10),
        )
