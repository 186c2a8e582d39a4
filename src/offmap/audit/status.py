"""stat(2) of a VMM's file, by what the kernel itself knows of it.

A VMM may have mounted a file system that it answers for itself (FUSE). Who asks that and gets no answer waits for ever,
and cannot be killed. statx(2) can be told not to ask.
"""

import ctypes
import os
import struct
from functools import lru_cache
from typing import NamedTuple

_SYS_STATX = 332  # arch/x86/entry/syscalls/syscall_64.tbl
_AT_STATX_DONT_SYNC = 0x4000  # include/uapi/linux/fcntl.h
_BASIC_STATS = 0x07FF  # include/uapi/linux/stat.h, STATX_BASIC_STATS
_STATX_BYTES = 256
# struct statx: stx_uid, stx_mode, stx_ino, stx_blocks; stx_rdev_major, stx_rdev_minor, stx_dev_major, stx_dev_minor
_FILE, _FILE_AT = struct.Struct("<I4xH2xQ8xQ"), 20
_DEVICES, _DEVICES_AT = struct.Struct("<4I"), 128

_libc = ctypes.CDLL(None, use_errno=True)


class Status(NamedTuple):
    """As in ``os.stat_result``."""

    st_uid: int
    st_mode: int
    st_ino: int
    st_blocks: int
    st_rdev: int
    st_dev: int


def open_file(fd: int) -> str:
    """A path of an open file of our own, which O_PATH opens without a question to its file system."""
    return f"/proc/self/fd/{fd}"


def status_of(name: str, folder: int = -1) -> Status | None:
    """The status of a file, below an open folder if it has no path; a link is followed. None where there is none."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.syscall(_SYS_STATX, folder, os.fsencode(name), _AT_STATX_DONT_SYNC, _BASIC_STATS, buffer):
        return None
    rdev_major, rdev_minor, major, minor = _DEVICES.unpack_from(buffer, _DEVICES_AT)
    uid, mode, ino, blocks = _FILE.unpack_from(buffer, _FILE_AT)
    return Status(uid, mode, ino, blocks, os.makedev(rdev_major, rdev_minor), os.makedev(major, minor))


@lru_cache(maxsize=1)
def memfd_device() -> int:
    """The device that all memfds are on (but those of huge pages)."""
    fd = os.memfd_create("offmap-audit")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
