"""The folder of vsock's sockets on the host. A socket in it is used only if no other user can have put it there.

A guest names a port, and PATH_<port> is opened with the rights of the VMM. Somebody who may write to a folder of PATH
could plant a symbolic link there, and so connect the guest to a socket that he may not use himself.
"""

import errno
import os
import stat
from pathlib import Path

from offmap.errors import KernelError, OffmapError
from offmap.owned import Owned

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


class SocketFolder(Owned):
    """An open folder that only its owner can change: this user, or root.

    Attributes:
        fd: of the folder (O_PATH).

    Raises:
        OffmapError: it cannot be opened, or others may write to it or to a folder above it.
    """

    def __init__(self, path: Path) -> None:
        self.fd = -1
        try:
            self.fd = _open(Path(os.path.realpath(path)))
        except OSError as error:
            raise KernelError(f"open of the folder {path} of a vsock path", error, "make it first") from None

    @property
    def path(self) -> str:
        """A short path to it, which no renaming changes, for calls that take a path only."""
        return f"/proc/self/fd/{self.fd}"

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_socket(folder: int, name: str) -> int:
    """Open the socket file `name` in an open folder (O_PATH): its fd, which the caller owns.

    Raises:
        OSError: there is none, or (ECONNREFUSED) it is a symbolic link or anything else.
    """
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return fd


def _open(path: Path) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open("/", flags)
    try:
        above = os.fstat(fd)
        trusted = {0, os.geteuid(), above.st_uid}
        for name in path.parts[1:]:
            below = os.open(name, flags, dir_fd=fd)
            os.close(fd)
            fd = below
            folder = os.fstat(fd)
            # In a sticky folder nobody but its owner can replace the one below it.
            _check(path, above, trusted, replaceable=not (above.st_mode & stat.S_ISVTX and folder.st_uid in trusted))
            above = folder
        _check(path, above, trusted, replaceable=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(path: Path, folder: os.stat_result, trusted: set[int], *, replaceable: bool) -> None:
    writers = _WRITABLE if folder.st_gid not in {0, os.getegid()} else stat.S_IWOTH
    if folder.st_uid not in trusted or (replaceable and folder.st_mode & writers):
        raise OffmapError(
            f"others may write to the folder {path}, or to one above it: they could put a socket there that the guest "
            "is connected to",
            "give a vsock path in a folder of which only this user may write each part, like /run",
        )
