"""Files of a kernel's package: the image, packed as distributions ship it, and its modules; their ELF sections."""

from dataclasses import dataclass
from pathlib import Path

from offmap.boot.packed import KERNEL_REMEDY, unpacked
from offmap.errors import OffmapError
from offmap.uapi import elf


@dataclass(frozen=True)
class Section:
    """A section of an ELF file: its link-time address, and its content."""

    va: int
    data: bytes


def sections_of(path: Path) -> dict[str, Section]:
    """The sections, by their names, of a kernel image or a module.

    Raises:
        OffmapError: it is none, or is packed in a way that cannot be unpacked here.
        KernelError: it cannot be read.
    """
    data = unpacked(path)
    if not data.startswith(elf.ELFMAG) or len(data) < elf.ELF64_EHDR.size:
        raise OffmapError(f"{path} is no kernel image or module that can be read", KERNEL_REMEDY)
    try:
        headers = elf.section_headers(data)
    except ValueError:
        raise OffmapError(f"{path} is damaged: its sections lie outside it", KERNEL_REMEDY) from None
    return {
        name.decode("ascii", "replace"): Section(
            at.sh_addr, b"" if at.sh_type == elf.SHT_NOBITS else data[at.sh_offset : at.sh_offset + at.sh_size]
        )
        for name, at in headers
    }
