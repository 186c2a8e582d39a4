"""Facts about a built module: the strings of its .modinfo section (include/linux/moduleinfo.h)."""

from pathlib import Path

from offmap.errors import OffmapError
from offmap.uapi import elf

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
    try:
        headers = elf.section_headers(data)
    except ValueError:
        return None
    return next((data[at.sh_offset : at.sh_offset + at.sh_size] for found, at in headers if found == name), None)
