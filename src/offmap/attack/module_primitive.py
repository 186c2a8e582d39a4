"""The primitive for disposable hosts: a module that reads kernel memory by plain loads, and survives their faults.

The module stands among the tests (``tests/modules/peek``), as nobody should load it on a host of value.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence

from offmap.attack.primitive import NotMapped, Primitive, Unreadable, neighbours
from offmap.errors import KernelError
from offmap.uapi.ioctl import iowr
from offmap.uapi.page import PAGE_SIZE

DEVICE = "/dev/offmap-peek"


class _PeekRead(ctypes.Structure):
    """``struct peek_read``."""

    _fields_ = [("address", ctypes.c_uint64), ("to", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _PeekReadUser(ctypes.Structure):
    """``struct peek_read_user``."""

    _fields_ = [("read", _PeekRead), ("pid", ctypes.c_uint64)]


_PEEK_READ = iowr(ord("P"), 1, _PeekRead)
_PEEK_READ_USER = iowr(ord("P"), 2, _PeekReadUser)
_MOST = 1 << 20  # PEEK_MOST


class ModulePrimitive(Primitive):
    """Reads by the module's device.

    Args:
        user_memory: it may read user memory too.

    Raises:
        KernelError: the module is not loaded, or the device may not be opened.
    """

    name = "module"

    def __init__(self, device: str = DEVICE, user_memory: bool = False) -> None:
        super().__init__()
        self.user_memory = user_memory
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
        read = self._peek(va, ctypes.addressof(buffer), size)
        if read < size:
            raise NotMapped(va + read)
        return buffer.raw

    def _fetch_pages(self, vas: Sequence[int]) -> "list[bytes | NotMapped | Unreadable]":
        found: list[bytes | NotMapped | Unreadable] = []
        for va, count in neighbours(vas):
            buffer = ctypes.create_string_buffer(count * PAGE_SIZE)
            done = 0  # pages
            while done < count:
                at = ctypes.addressof(buffer) + done * PAGE_SIZE
                read = self._peek(va + done * PAGE_SIZE, at, (count - done) * PAGE_SIZE) // PAGE_SIZE
                found += (ctypes.string_at(at + each * PAGE_SIZE, PAGE_SIZE) for each in range(read))
                done += read
                if done < count:
                    found.append(NotMapped(va + done * PAGE_SIZE))
                    done += 1
        return found

    def _peek(self, va: int, to: int, size: int) -> int:
        """Bytes that were read, from ``va`` on: fewer than asked for, if the next one is not mapped."""
        asked = _PeekRead(va, to, size)
        try:
            fcntl.ioctl(self._fd, _PEEK_READ, asked)
        except OSError as error:
            raise KernelError(f"reading {size} bytes at {va:#x}", error) from None
        return int(asked.length)

    def _fetch_user(self, pid: int, va: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        asked = _PeekReadUser(_PeekRead(va, ctypes.addressof(buffer), size), pid)
        try:
            fcntl.ioctl(self._fd, _PEEK_READ_USER, asked)
        except OSError as error:
            if error.errno in {errno.EFAULT, errno.ESRCH}:
                raise NotMapped(va) from None
            raise KernelError(f"reading {size} bytes at {va:#x} of process {pid}", error) from None
        return buffer.raw

    def fill(self, va: int, view: memoryview) -> None:
        base = ctypes.addressof(ctypes.c_char.from_buffer(view))
        done = 0
        while done < len(view):
            size = min(len(view) - done, _MOST)
            read = self._peek(va + done, base + done, size)
            done += read
            if read < size:
                gap = min(PAGE_SIZE - (va + done) % PAGE_SIZE, len(view) - done)
                ctypes.memset(base + done, 0, gap)
                done += gap
