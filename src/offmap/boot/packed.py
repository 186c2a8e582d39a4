"""The ELF kernel in a kernel image, as distributions pack it."""

import gzip
import lzma
import struct
from pathlib import Path

from offmap.errors import KernelError, OffmapError
from offmap.uapi import bootparam as bp

KERNEL_REMEDY = "give a vmlinuz or an ELF vmlinux as its distribution ships it"
_BOOT_MAGIC = b"HdrS"
_ZSTD, _XZ, _GZIP = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"\x1f\x8b"


def unpacked(path: Path) -> bytes:
    """The content of a kernel's file, unpacked if it is packed: of a bzImage its ELF kernel, of a module the module.

    Source: Documentation/arch/x86/boot.rst, "payload_offset".

    Raises:
        OffmapError: it is packed in a way that cannot be unpacked here, or damaged.
        KernelError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KernelError(f"reading {path}", error, "name a file that this process may read") from None
    if data[bp.HEADER : bp.HEADER + 4] == _BOOT_MAGIC:
        offset, length = struct.unpack_from("<II", data, bp.PAYLOAD_OFFSET)
        start = ((data[bp.SETUP_SECTS] or 4) + 1) * 512 + offset
        data = data[start : start + length]
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
        raise OffmapError(f"{path} cannot be unpacked: {error}", KERNEL_REMEDY) from None
    return data
