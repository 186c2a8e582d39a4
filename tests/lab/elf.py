"""The ELF kernel in a bzImage, as scripts/extract-vmlinux of the Linux tree finds it."""

import lzma
import struct

from offmap.uapi import bootparam as bp

__all__ = ["extract_vmlinux"]


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel that a bzImage carries (boot.rst, "payload_offset")."""
    offset, length = struct.unpack_from("<II", bzimage, bp.PAYLOAD_OFFSET)
    start = ((bzimage[bp.SETUP_SECTS] or 4) + 1) * 512 + offset
    packed = bzimage[start : start + length]
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    # What follows the archive is the length of its content.
    return lzma.LZMADecompressor().decompress(packed)
