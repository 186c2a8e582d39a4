"""Files of a kernel's package: the image, packed as distributions ship it, and its modules; their ELF sections."""

import gzip
import lzma
import struct
from dataclasses import dataclass
from pathlib import Path

from offmap.errors import KernelError, OffmapError
from offmap.uapi import bootparam as bp
from offmap.uapi import elf

_BOOT_MAGIC = b"HdrS"
_ZSTD, _XZ, _GZIP = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"\x1f\x8b"
_REMEDY = "give a vmlinuz or an ELF vmlinux as its distribution ships it"


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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KernelError(f"reading {path}", error, "name a file that this process may read") from None
    if data[bp.HEADER : bp.HEADER + 4] == _BOOT_MAGIC:
        offset, length = struct.unpack_from("<II", data, bp.PAYLOAD_OFFSET)
        start = ((data[bp.SETUP_SECTS] or 4) + 1) * 512 + offset  # boot.rst, "payload_offset"
        data = data[start : start + length]
    data = _unpacked(data, path)
    if not data.startswith(elf.ELFMAG) or len(data) < elf.ELF64_EHDR.size:
        raise OffmapError(f"{path} is no kernel image or module that can be read", _REMEDY)
    try:
        headers = elf.section_headers(data)
    except ValueError:
        raise OffmapError(f"{path} is damaged: its sections lie outside it", _REMEDY) from None
    return {
        name.decode("ascii", "replace"): Section(
            at.sh_addr, b"" if at.sh_type == elf.SHT_NOBITS else data[at.sh_offset : at.sh_offset + at.sh_size]
        )
        for name, at in headers
    }


def _unpacked(data: bytes, path: Path) -> bytes:
    try:
        if data.startswith(_ZSTD):
            try:
                import zstandard
            except ImportError:
                what = f"{path} is packed with zstd, and the Python package zstandard is not installed"
                raise OffmapError(what, "install it: pip install 'offmap[attack]'") from None
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        if data.startswith(_GZIP):
            return gzip.decompress(data)
        if data.startswith(_XZ) or data[:1] == b"\x5d":  # what follows the archive is the length of its content
            return lzma.LZMADecompressor().decompress(data)
    except (lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise OffmapError(f"{path} cannot be unpacked: {error}", _REMEDY) from None
    return data
