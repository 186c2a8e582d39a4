"""Where a mapping of /dev/offmap is in physical memory: the module that made it is the only one to know."""

import os
from fcntl import ioctl

from offmap.uapi.offmap_module import DEVICE, OFFMAP_TRANSLATE, offmap_translate


def is_offmap_device(rdev: int) -> bool:
    """Whether `rdev` is the device number of /dev/offmap."""
    try:
        return os.stat(DEVICE).st_rdev == rdev  # noqa: PTH116 - a device, not a document
    except OSError:
        return False


def physical_ranges(pid: int, va: int, size: int) -> list[tuple[int, int]]:
    """What `size` bytes at `va` of process `pid` are, as (physical address, bytes), in order.

    Raises:
        OSError: there is no such mapping of /dev/offmap (ENXIO), or the module may not be asked.
    """
    ranges = []
    with os.fdopen(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC), "rb", buffering=0) as device:
        while size > 0:
            question = offmap_translate(pid=pid, addr=va)
            ioctl(device, OFFMAP_TRANSLATE, question)
            length = min(int(question.length), size)
            if length <= 0:
                raise OSError(f"the offmap module gave no length for {va:#x}")
            ranges.append((int(question.phys), length))
            va += length
            size -= length
    return ranges
