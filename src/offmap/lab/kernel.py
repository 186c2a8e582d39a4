"""A kernel to boot: its image, its modules, and what its header says of it."""

import struct
from dataclasses import dataclass
from pathlib import Path

from offmap.lab.errors import LabError

# Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"
_SETUP_SECTS = 0x1F1
_SYSSIZE = 0x1F4  # u32, in 16-byte units
_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_KERNEL_VERSION = 0x20E  # u16, offset of the version string, less 0x200
_HEADER_END = 0x268


@dataclass(frozen=True)
class HostKernel:
    """A kernel that a lab host can run.

    Attributes:
        name: how it was asked for, ``debian:6.12`` or a path.
        release: what ``uname -r`` says in it.
        vmlinuz: its bzImage.
        modules: its ``lib/modules/RELEASE`` folder; may be absent where everything needed is built in.
    """

    name: str
    release: str
    vmlinuz: Path
    modules: Path


def image_release(path: Path) -> str:
    """Return the release that a bzImage carries in its header.

    Raises:
        LabError: the file cannot be read, is no bzImage, or is shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            head = file.read(0x8000)  # setup_sects is at most 63 sectors of 512 bytes
        size = path.stat().st_size
    except OSError as error:
        raise LabError(f"cannot read the kernel {path}: {error.strerror}", "give a readable bzImage") from error
    if (
        len(head) < _HEADER_END
        or head[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS"
        or head[_BOOT_FLAG : _BOOT_FLAG + 2] != b"\x55\xaa"
    ):
        raise LabError(f"{path} is no x86 Linux kernel (no boot header)", "give a bzImage (vmlinuz)")
    setup = ((head[_SETUP_SECTS] or 4) + 1) * 512
    if size < setup + struct.unpack_from("<I", head, _SYSSIZE)[0] * 16:
        raise LabError(f"the kernel {path} is cut short", "copy it again")
    (offset,) = struct.unpack_from("<H", head, _KERNEL_VERSION)
    version = head[0x200 + offset :].split(b"\0", 1)[0].decode(errors="replace").split()
    if not offset or not version:
        raise LabError(f"the kernel {path} does not say its release", "give a bzImage (vmlinuz)")
    return version[0]
