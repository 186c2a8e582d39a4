"""A file of a pool: memory that an administrator has taken off the kernel before (kernel/module/poolfs.c).

Whoever may make a file in the pool's folder can have it, with no other right. It is zeroed already.
"""

import errno
import os
from typing import Self

from offmap.errors import BackendRefused
from offmap.kvm import Vm
from offmap.memory.backend import SEE_LOG, Backend
from offmap.memory.backing import Backing
from offmap.options import Options
from offmap.pools import DEFAULT_PATH, is_of_a_pool
from offmap.units import format_size

_OPEN_REMEDY = {
    errno.EACCES: "ask the administrator for the right to write to that folder",
    errno.ENOENT: "make a pool: offmap pool create SIZE",
}


class Pool(Backend):
    """``pool[,path=FOLDER]``: of the pool that is mounted there."""

    name = "pool"
    usage = f"path=FOLDER, in a pool ({DEFAULT_PATH} without it)"
    hides = True
    may_be_aliased = False
    needs_module = True
    linux_owned = False
    compared = False

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        self.path = path

    @classmethod
    def from_options(cls, options: Options) -> Self:
        return cls(options.text("path", DEFAULT_PATH, str))

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        fd = self.open_file(size)
        try:
            # The mapping holds the file, and with the mapping's end the memory goes back to the pool.
            return [Backing(f"a file in {self.path}", fd, size)]
        finally:
            os.close(fd)

    def open_file(self, size: int) -> int:
        """A new file without a name that has `size` bytes of the pool; its fd, which the caller owns.

        Raises:
            BackendRefused: there is no pool, or it cannot give so much.
        """
        what = f"{self.path} cannot give hidden memory"
        try:
            # First: elsewhere, this would be a file on a disk.
            if not is_of_a_pool(os.stat(self.path).st_dev):  # noqa: PTH116
                raise BackendRefused(what, "it is in no pool of the offmap module", _OPEN_REMEDY[errno.ENOENT])
            fd = os.open(self.path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            remedy = _OPEN_REMEDY.get(error.errno or 0, "see offmap pool status")
            raise BackendRefused(what, os.strerror(error.errno or 0), remedy) from None
        try:
            if not is_of_a_pool(os.fstat(fd).st_dev):
                raise BackendRefused(what, "it has just been unmounted", "try again")
            os.ftruncate(fd, size)
        except OSError as error:
            refusal = self._refusal(error, fd, size)
            os.close(fd)
            raise refusal from None
        except BackendRefused:
            os.close(fd)
            raise
        return fd

    def _refusal(self, error: OSError, fd: int, size: int) -> BackendRefused:
        what = f"{self.path} cannot give {format_size(size)}"
        if error.errno == errno.EDQUOT:
            return BackendRefused(
                what, "a user may not have so much of it", "ask for less, or end another guest of yours"
            )
        if error.errno != errno.ENOSPC:
            return BackendRefused(what, os.strerror(error.errno or 0), SEE_LOG)
        there = os.fstatvfs(fd)
        return BackendRefused(
            what,
            f"{format_size(there.f_bavail * there.f_frsize)} of the pool are free",
            "ask for less, end another guest, or make the pool larger: offmap pool resize",
        )
