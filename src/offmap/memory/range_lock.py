"""Arbitration between VMMs of one host: locks on ranges of physical addresses.

The locked file is /dev/mem: each byte stands for the byte of physical memory at that address. A file below /run could
be deleted under its holders, and is another file in every mount namespace. The locks are open-file-description locks
(fcntl(2), F_OFD_SETLK), which a device takes like any file. The kernel drops them with a VMM's last fd, however that
VMM ended.
"""

import errno
import fcntl
import os
import time
from collections.abc import Sequence

from offmap.errors import KernelError
from offmap.files import FileName
from offmap.kvm.handle import open_device
from offmap.memory.iomem import PhysicalRange, intersect, subtract
from offmap.owned import Owned
from offmap.uapi.mman import F_OFD_GETLK, F_OFD_SETLK, FLOCK

_MOMENT = 0.5  # seconds from a VMM's last words until its broker lets go
_AGAIN = 0.01


class RangeLock(Owned):
    """Holds locks on ranges of physical memory until it is closed.

    Raises:
        KernelError: the file to lock cannot be opened.
    """

    def __init__(self, path: FileName) -> None:
        self._fd = open_device(path, "run as root", flags=os.O_NOFOLLOW)

    def take(self, free: list[PhysicalRange], size: int, alignment: int) -> PhysicalRange | None:
        """Lock `size` bytes somewhere in `free` that nobody holds; None where there is no such run."""
        for candidate in free:
            start = -(-candidate.start // alignment) * alignment
            while start + size <= candidate.end:
                holder = self._conflict(start, size)
                if holder is None:
                    if self._lock(start, size):
                        return PhysicalRange(start, start + size)
                    continue  # somebody was faster: ask again who
                start = -(-holder.end // alignment) * alignment
        return None

    def take_soon(self, free: list[PhysicalRange], size: int, alignments: Sequence[int]) -> PhysicalRange | None:
        """As `take`, with the first alignment that there is room for. A lock outlives its VMM by a moment.

        None where there is no such run, and for half a second (longer on a busy machine) there was none.
        """
        until = 0.0
        while True:
            waits = any(map(self.held_by_others, free))  # asked first: who lets go after that leaves room for us
            for alignment in alignments:
                if (taken := self.take(free, size, alignment)) is not None:
                    return taken
            if not waits or 0 < until <= time.monotonic():
                return None
            if not until:
                from offmap.patience import scaled  # who finds room at once does not wait for it

                until = time.monotonic() + scaled(_MOMENT)
            time.sleep(_AGAIN)  # one can wait for the lock of one range, not for any of several

    def held_by_others(self, within: PhysicalRange) -> list[PhysicalRange]:
        """The parts of `within` that other VMMs hold now, in order."""
        held = []
        ask = [within]
        while ask:
            part = ask.pop()
            holder = self._conflict(part.start, part.size)
            if holder is not None:
                held += intersect([part], [holder])
                # The kernel names one of those that are in the way, and not always the lowest.
                ask += subtract([part], [holder])
        return sorted(held)

    def _conflict(self, start: int, size: int) -> PhysicalRange | None:
        question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, size, 0)
        kind, _, found, length, _ = FLOCK.unpack(fcntl.fcntl(self._fd, F_OFD_GETLK, question))
        if kind == fcntl.F_UNLCK:
            return None
        return PhysicalRange(found, found + length if length else 1 << 62)

    def _lock(self, start: int, size: int) -> bool:
        try:
            fcntl.fcntl(self._fd, F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, size, 0))
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise KernelError("F_OFD_SETLK", error) from None
        return True

    @property
    def fd(self) -> int:
        """The locked file."""
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
