"""The primitive for disposable hosts: a module that reads kernel memory by plain loads, and survives their faults.

The module stands among the tests (``tests/modules/peek``), as nobody should load it on a host of value.
"""

import ctypes
import fcntl
import os

from offmap.attack.primitive import NotMapped, Primitive
from offmap.errors import KernelError
from offmap.uapi.ioctl import iowr

DEVICE = "/dev/offmap-peek"


class _PeekRead(ctypes.Structure):
    """``struct peek_read``."""

    _fields_ = [("address", ctypes.c_uint64), ("to", ctypes.c_uint64), ("length", ctypes.c_uint64)]


_PEEK_READ = iowr(ord("P"), 1, _PeekRead)


class ModulePrimitive(Primitive):
    """Reads by the module's device.

    Raises:
        KernelError: the module is not loaded, or the device may not be opened.
    """

    name = "module"

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()
        try:
            self._fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            remedy = "load tests/modules/peek in a disposable host, as root; elsewhere use --primitive kcore"
            raise KernelError(f"opening {device}", error, remedy) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fetch(self, va: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        asked = _PeekRead(va, ctypes.addressof(buffer), size)
        try:
            fcntl.ioctl(self._fd, _PEEK_READ, asked)
        except OSError as error:
            raise KernelError(f"reading {size} bytes at {va:#x}", error) from None
        if asked.length < size:
            raise NotMapped(va + asked.length)
        return buffer.raw
