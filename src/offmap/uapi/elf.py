"""ELF64: the headers of ``linux/elf.h`` as ``struct`` formats, little-endian.

Shared by the boot loader (``vmlinux``) and the audit (``/proc/kcore`` is an ELF core file). Unpack with
``Elf64_Phdr._make(ELF64_PHDR.unpack_from(data, offset))``.
"""

import struct

from offmap.typed import NamedTuple

ELFMAG = b"\x7fELF"
ELFCLASS64 = 2  # e_ident[EI_CLASS], EI_CLASS = 4
ELFDATA2LSB = 1  # e_ident[EI_DATA], EI_DATA = 5

ET_EXEC = 2
ET_DYN = 3
ET_CORE = 4

EM_X86_64 = 62  # linux/elf-em.h

PT_LOAD = 1
PT_NOTE = 4


ELF64_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
ELF64_PHDR = struct.Struct("<IIQQQQQQ")
ELF64_SHDR = struct.Struct("<IIQQQQIIQQ")
ELF64_NHDR = struct.Struct("<III")

SHT_NOBITS = 8


class Elf64_Ehdr(NamedTuple):
    """``struct elf64_hdr``."""

    e_ident: bytes
    e_type: int
    e_machine: int
    e_version: int
    e_entry: int
    e_phoff: int
    e_shoff: int
    e_flags: int
    e_ehsize: int
    e_phentsize: int
    e_phnum: int
    e_shentsize: int
    e_shnum: int
    e_shstrndx: int


class Elf64_Phdr(NamedTuple):
    """``struct elf64_phdr``: in the 64-bit layout ``p_flags`` comes second."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int


class Elf64_Shdr(NamedTuple):
    """``struct elf64_shdr``."""

    sh_name: int
    sh_type: int
    sh_flags: int
    sh_addr: int
    sh_offset: int
    sh_size: int
    sh_link: int
    sh_info: int
    sh_addralign: int
    sh_entsize: int


def section_headers(data: bytes) -> list[tuple[bytes, Elf64_Shdr]]:
    """The name and the header of each section of an ELF64 file.

    Raises:
        ValueError: it is no such file, or its section headers lie outside it.
    """
    if len(data) < ELF64_EHDR.size or not data.startswith(ELFMAG):
        raise ValueError("no ELF64 file")
    header = Elf64_Ehdr._make(ELF64_EHDR.unpack_from(data))
    if header.e_shoff + header.e_shnum * ELF64_SHDR.size > len(data) or header.e_shstrndx >= header.e_shnum:
        raise ValueError("its section headers lie outside it")
    places = range(header.e_shoff, header.e_shoff + header.e_shnum * ELF64_SHDR.size, ELF64_SHDR.size)
    headers = [Elf64_Shdr._make(ELF64_SHDR.unpack_from(data, at)) for at in places]
    strings = headers[header.e_shstrndx]
    names = data[strings.sh_offset : strings.sh_offset + strings.sh_size]
    return [(names[each.sh_name :].split(b"\0", 1)[0], each) for each in headers]


class Elf64_Nhdr(NamedTuple):
    """``struct elf64_note``: followed by the name and the descriptor, each padded to 4 bytes."""

    n_namesz: int
    n_descsz: int
    n_type: int
