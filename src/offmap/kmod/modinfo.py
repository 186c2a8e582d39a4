"""Facts about a built module: the strings of its .modinfo section (include/linux/moduleinfo.h)."""

import struct
from pathlib import Path

from offmap.errors import OffmapError
from offmap.uapi import elf

_SHDR = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr: sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, …
_SIGNATURE = b"~Module signature appended~\n"  # MODULE_SIG_STRING, include/linux/module_signature.h


def modinfo(module: Path) -> dict[str, str]:
    """The ``tag=value`` strings of a module. If a tag occurs several times, the first counts.

    Raises:
        OffmapError: it cannot be read, or is no kernel module.
    """
    try:
        data = module.read_bytes()
    except OSError as error:
        raise OffmapError(f"cannot read {module}: {error.strerror}", "run offmap module build") from None
    section = _section(data, b".modinfo")
    if section is None:
        raise OffmapError(f"{module} is no kernel module", "remove it, and run offmap module build")
    found: dict[str, str] = {}
    for text in section.split(b"\0"):
        tag, equals, value = text.decode(errors="replace").partition("=")
        if equals:
            found.setdefault(tag, value)
    return found


def release_of(module: Path) -> str:
    """The kernel release that a module was built for: the first word of its version magic."""
    return modinfo(module).get("vermagic", "").partition(" ")[0]


def is_signed(module: Path) -> bool:
    """Whether a signature is appended to a module."""
    return module.read_bytes().endswith(_SIGNATURE)


def _section(data: bytes, name: bytes) -> bytes | None:
    """Contents of an ELF64 section by name; None if there is no such section."""
    if len(data) < elf.ELF64_EHDR.size or data[: len(elf.ELFMAG)] != elf.ELFMAG:
        return None
    header = elf.Elf64_Ehdr._make(elf.ELF64_EHDR.unpack_from(data))
    if header.e_shoff + header.e_shnum * _SHDR.size > len(data) or header.e_shstrndx >= header.e_shnum:
        return None

    def contents(index: int) -> tuple[int, bytes]:
        sh_name, _, _, _, offset, size, *_ = _SHDR.unpack_from(data, header.e_shoff + index * _SHDR.size)
        return sh_name, data[offset : offset + size]

    names = contents(header.e_shstrndx)[1]
    for sh_name, section in map(contents, range(header.e_shnum)):
        if names[sh_name:].split(b"\0", 1)[0] == name:
            return section
    return None
