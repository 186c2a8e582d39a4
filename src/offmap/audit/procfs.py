"""Files of the real /proc, which a bind mount cannot forge.

A mount over /proc, or over one file of it, may show anything: an old kcore, or one made up. So these files are opened
below the root of a procfs (``PROC_SUPER_MAGIC``, and the inode number that only its root has), and nothing that is
mounted over them is followed (openat2(2) with ``RESOLVE_NO_XDEV``, Linux 5.6).
"""

import ctypes
import errno
import os
import struct

PROC_SUPER_MAGIC = 0x9FA0  # include/uapi/linux/magic.h
SYSFS_MAGIC = 0x6265_6572  # the same
_PROC_ROOT_INO = 1  # include/linux/proc_ns.h
_SYS_OPENAT2 = 437  # arch/x86/entry/syscalls/syscall_64.tbl
# include/uapi/linux/openat2.h: RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_BENEATH
_RESOLVE = 0x01 | 0x02 | 0x08
_OPEN_HOW = struct.Struct("<QQQ")  # struct open_how: flags, mode, resolve
_STATFS_BYTES = 256  # more than all of struct statfs, which begins with f_type, a long

_libc = ctypes.CDLL(None, use_errno=True)


def open_proc(name: str, flags: int = os.O_RDONLY, root: str = "/proc") -> int:
    """A file descriptor of ``/proc/NAME``, which the caller owns.

    Raises:
        OSError: there is no such file, it may not be opened, or it is not the kernel's own: something else is mounted
            there.
    """
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if file_system(folder) != PROC_SUPER_MAGIC or os.fstat(folder).st_ino != _PROC_ROOT_INO:
            raise OSError(errno.EXDEV, f"{root} is not the root of a procfs")
        how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE)
        fd = int(_libc.syscall(_SYS_OPENAT2, folder, name.encode(), how, len(how)))
        if fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, "something is mounted over it" if error == errno.EXDEV else os.strerror(error))
        return fd
    finally:
        os.close(folder)


def open_path(path: str) -> int:
    """A file descriptor, for reading, of any file; of one below /proc as ``open_proc`` opens it.

    Raises:
        OSError: it cannot be opened.
    """
    if path.startswith("/proc/"):
        return open_proc(path.removeprefix("/proc/"))
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_path(path: str) -> bytes:
    """The whole of a file, opened as ``open_path`` does. Raises OSError: it cannot be opened or read."""
    with os.fdopen(open_path(path), "rb") as file:
        return file.read()


def read_sysfs(path: str) -> bytes:
    """The whole of a file of the kernel's own sysfs.

    Raises:
        OSError: it cannot be opened or read, or a file of another file system is mounted over it.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - the open file is asked what it is
        if file_system(file.fileno()) != SYSFS_MAGIC:
            raise OSError(errno.EXDEV, "something is mounted over it")
        return file.read()


def file_system(fd: int) -> int:
    """Magic number of the file system that an open file is of. Raises OSError: it cannot be asked."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, buffer):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int.from_bytes(buffer.raw[:8], "little")
