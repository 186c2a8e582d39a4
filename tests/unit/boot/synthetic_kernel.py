"""Kernel files made for tests: a bzImage and an ELF vmlinux, each field of them to be spoilt."""

import struct

from offmap.uapi import bootparam as bp
from offmap.uapi.elf import (
    ELF64_EHDR,
    ELF64_PHDR,
    ELFCLASS64,
    ELFDATA2LSB,
    ELFMAG,
    EM_X86_64,
    ET_EXEC,
    PT_LOAD,
    Elf64_Ehdr,
    Elf64_Phdr,
)

MIB = 1 << 20
CODE = bytes(range(256)) * 64  # 16 KiB

BZIMAGE = {
    # offset: (format, value)
    bp.SETUP_SECTS: ("<B", 3),
    bp.SYSSIZE: ("<I", len(CODE) // 16),
    bp.BOOT_FLAG: ("<H", bp.BOOT_FLAG_MAGIC),
    bp.JUMP: ("<BB", (0xEB, 0x6A)),
    bp.VERSION: ("<H", 0x20F),
    bp.LOADFLAGS: ("<B", bp.LOADED_HIGH),
    bp.INITRD_ADDR_MAX: ("<I", 0x7FFFFFFF),
    bp.KERNEL_ALIGNMENT: ("<I", 2 * MIB),
    bp.RELOCATABLE_KERNEL: ("<B", 1),
    bp.XLOADFLAGS: ("<H", bp.XLF_KERNEL_64),
    bp.CMDLINE_SIZE: ("<I", 2047),
    bp.PREF_ADDRESS: ("<Q", 16 * MIB),
    bp.INIT_SIZE: ("<I", 4 * MIB),
}


def bzimage(changes: dict[int, int] | None = None, code: bytes = CODE) -> bytes:
    """A bzImage; `changes` are values by the offset of their field."""
    fields = {offset: (fmt, value) for offset, (fmt, value) in BZIMAGE.items()}
    for offset, value in (changes or {}).items():
        fields[offset] = (fields[offset][0], value)
    sectors = fields[bp.SETUP_SECTS][1] or 4
    assert isinstance(sectors, int)
    image = bytearray(512 * (sectors + 1))
    image[bp.HEADER : bp.HEADER + 4] = bp.HEADER_MAGIC
    for offset, (fmt, values) in fields.items():
        struct.pack_into(fmt, image, offset, *(values if isinstance(values, tuple) else (values,)))
    return bytes(image) + code


EHDR = Elf64_Ehdr(
    e_ident=ELFMAG + bytes((ELFCLASS64, ELFDATA2LSB, 1)) + bytes(9),
    e_type=ET_EXEC,
    e_machine=EM_X86_64,
    e_version=1,
    e_entry=16 * MIB + 0x40,
    e_phoff=ELF64_EHDR.size,
    e_shoff=0,
    e_flags=0,
    e_ehsize=ELF64_EHDR.size,
    e_phentsize=ELF64_PHDR.size,
    e_phnum=2,
    e_shentsize=0,
    e_shnum=0,
    e_shstrndx=0,
)
TEXT = Elf64_Phdr(PT_LOAD, 5, 0x1000, 0xFFFFFFFF81000000, 16 * MIB, 0x2000, 0x2000, 0x1000)
DATA = Elf64_Phdr(PT_LOAD, 6, 0x3000, 0xFFFFFFFF81400000, 20 * MIB, 0x1000, 0x8000, 0x1000)


def vmlinux(
    ehdr: Elf64_Ehdr = EHDR, phdrs: tuple[Elf64_Phdr, ...] = (TEXT, DATA), body: bytes = CODE[: 0x4000 - 0x1000]
) -> bytes:
    """An ELF kernel of these headers; `body` starts at file offset 0x1000."""
    head = ELF64_EHDR.pack(*ehdr) + b"".join(ELF64_PHDR.pack(*phdr) for phdr in phdrs)
    return head.ljust(0x1000, b"\0") + body
