"""A raw image or block device on the host, as the bytes behind a drive.

One system call moves a request's data between the file and guest memory: the kernel copies it from or to its page
cache. Nothing passes through this process's own memory, but for two cases that go by a bounce buffer: the user asked
for it, or the file system wants the guest's pages themselves (GUP), which hidden RAM refuses (EFAULT). The buffer is
wiped after each use.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Sequence
from ctypes import memset
from pathlib import Path

from offmap.devices.virtio.iov import address_of, gather, length, part, scatter
from offmap.errors import KernelError, OffmapError
from offmap.files import fallocate
from offmap.owned import Owned
from offmap.uapi import fs
from offmap.uapi.mman import F_OFD_SETLK, FLOCK
from offmap.uapi.page import PAGE_SIZE

SECTOR = 512
_BOUNCE_SIZE = 1 << 20
_MOST_WRITTEN = 4 << 20  # bytes of zeroes at once
_MOST_QUICK = 256 << 20  # bytes that the file system forgets at once
_DEFAULT_PHYSICAL_BLOCK = 4096  # the usual block of file systems; an aligned guest spares the host a read
_PUNCH_HOLE = fs.FALLOC_FL_PUNCH_HOLE | fs.FALLOC_FL_KEEP_SIZE
_RANGE = struct.Struct("=QQ")  # of BLKDISCARD and BLKZEROOUT


class Disk(Owned):
    """An open, locked file. To be used on one thread.

    Args:
        path: a regular file or a block device.
        readonly: it is neither opened for writing nor changed.
        direct: go past the host's page cache (O_DIRECT).
        bounce: let all data pass through a buffer of this process.
        say: takes a line for the user.

    Attributes:
        path: as given.
        size: bytes, whole sectors.
        logical_block_size: what requests must be aligned to, in bytes.
        physical_block_size: what they better were.

    Raises:
        OffmapError: it cannot be used, with the reason and the remedy.
    """

    def __init__(
        self,
        path: Path,
        *,
        readonly: bool = False,
        direct: bool = False,
        bounce: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path = path
        self._say = say
        self._bounce: mmap.mmap | None = None
        self._always_bounce = bounce
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            self.fd = os.open(path, flags | os.O_NONBLOCK)  # a FIFO would wait for somebody
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ENXIO):
                raise _no_drive(path) from None
            raise KernelError(f"open of the drive {path}", error, _open_remedy(error, readonly, direct)) from None
        with contextlib.ExitStack() as opening:
            opening.callback(self.close)
            # Of the open file: the path may lead elsewhere by now.
            self._is_block_device = _check_kind(path, os.fstat(self.fd).st_mode)
            os.set_blocking(self.fd, True)
            self._lock(readonly)
            self._measure(direct)
            opening.pop_all()

    def _lock(self, readonly: bool) -> None:
        """Lock the file: two guests that write one image destroy it. QEMU and offmap respect each other's locks."""
        kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OffmapError(
                    f"the drive {self.path} is in use: another guest "
                    + ("writes to it" if readonly else "has it open, and this one would write to it"),
                    "end the other, or give both the drive with readonly=on",
                ) from None
            self._say(
                f"the drive {self.path} cannot be locked ({error.strerror}): nothing keeps a second guest from it"
            )

    def _measure(self, direct: bool) -> None:
        try:
            whole = os.lseek(self.fd, 0, os.SEEK_END)
            self.logical_block_size, self.physical_block_size = SECTOR, _DEFAULT_PHYSICAL_BLOCK
            if self._is_block_device:
                self.logical_block_size = _ioctl_int(self.fd, fs.BLKSSZGET)
                self.physical_block_size = _ioctl_int(self.fd, fs.BLKPBSZGET)
            elif direct:
                self.logical_block_size = self._direct_alignment()
        except OSError as error:
            raise KernelError(f"finding the size of the drive {self.path}", error) from None
        block = self.logical_block_size
        self.size = whole // block * block
        if not self.size:
            raise OffmapError(
                f"the drive {self.path} has {whole} bytes, which is less than a sector ({block})",
                "make the file larger (truncate -s 1G FILE)",
            )
        if self.size != whole:
            self._say(
                f"the drive {self.path} has {whole} bytes: the guest does not see the last {whole - self.size}, "
                f"as they are no whole sector ({block})"
            )

    def _direct_alignment(self) -> int:
        """The smallest alignment for direct I/O on this file. It is tried, as it depends on file system and disk."""
        with mmap.mmap(-1, PAGE_SIZE) as page, memoryview(page) as view:
            for size in (SECTOR, 1024, 2048):
                try:
                    os.preadv(self.fd, [view[:size]], 0)
                except OSError as error:
                    if error.errno == errno.EINVAL:
                        continue
                    raise
                return size
        return PAGE_SIZE

    # --- data ---

    def read(self, views: list[memoryview], size: int, offset: int) -> None:
        """Fill `views`, `size` bytes together, from `offset`.

        Raises:
            OSError: as the host's; EIO where the file ends before.
        """
        self._move(os.preadv, self._read_bounced, views, size, offset)

    def write(self, views: list[memoryview], size: int, offset: int, *, sync: bool = False) -> None:
        """Write `views`, `size` bytes together, at `offset`; with `sync` they are on the disk afterwards.

        Raises:
            OSError: as the host's.
        """
        self._move(os.pwritev, self._write_bounced, views, size, offset)
        if sync:
            self.flush()

    def _move(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        bounced: Callable[[list[memoryview], int], int],
        views: list[memoryview],
        size: int,
        offset: int,
    ) -> None:
        """Repeat `call` until all bytes are moved. One call moves 2 GiB at most, and a full disk takes a part."""
        while size:
            if self._always_bounce:
                done = bounced(views, offset)
            else:
                try:
                    done = call(self.fd, views, offset)
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    done = self._without_gup(bounced, views, offset)
            if not done:
                raise OSError(errno.EIO, "the file has become shorter than it was")
            size -= done
            offset += done
            if size:
                views = part(views, done)

    def _without_gup(
        self, bounced: Callable[[list[memoryview], int], int], views: list[memoryview], offset: int
    ) -> int:
        """Use the bounce buffer after an EFAULT: this file system pins pages, and hidden pages cannot be pinned."""
        done = bounced(views, offset)
        if not self._always_bounce:
            self._always_bounce = True
            self._say(
                f"the drive {self.path} cannot be read into hidden RAM directly (its file system pins the pages): "
                "its data goes through a buffer of offmap's own, which the host kernel does map"
            )
        return done

    def _buffer(self) -> mmap.mmap:
        if self._bounce is None:
            self._bounce = mmap.mmap(-1, _BOUNCE_SIZE)
        return self._bounce

    def _read_bounced(self, views: list[memoryview], offset: int) -> int:
        with memoryview(self._buffer()) as buffer, buffer[: length(views)] as room:
            try:
                done = os.preadv(self.fd, [room], offset)
                scatter(room[:done], views)
            finally:
                _wipe(room)
        return done

    def _write_bounced(self, views: list[memoryview], offset: int) -> int:
        with memoryview(self._buffer()) as buffer, buffer[: gather(views, buffer)] as data:
            try:
                return os.pwritev(self.fd, [data], offset)
            finally:
                _wipe(data)

    # --- the rest ---

    def flush(self) -> None:
        """What was written is on the disk afterwards. Raises OSError: as the host's."""
        os.fdatasync(self.fd)

    def discard(self, offset: int, size: int) -> int:
        """The guest does not need these bytes any more.

        Returns:
            How many of them are done. It does at most so many at once that it soon comes back.

        Raises:
            OSError: as the host's; EOPNOTSUPP where it cannot give them back.
        """
        size = min(size, _MOST_QUICK)
        if not size:
            return 0
        if self._is_block_device:
            fcntl.ioctl(self.fd, fs.BLKDISCARD, _RANGE.pack(offset, size))
        else:
            fallocate(self.fd, _PUNCH_HOLE, offset, size)
        return size

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> tuple[int, bool]:
        """These bytes read as zeroes afterwards; with `unmap` they need not take room.

        Returns:
            How many of them are done, and whether that was quick: else they were, or may have been, written one by one.

        Raises:
            OSError: as the host's.
        """
        if not size:
            return 0, True
        if self._is_block_device:
            size = min(size, _MOST_WRITTEN)  # it writes them if it must
            fcntl.ioctl(self.fd, fs.BLKZEROOUT, _RANGE.pack(offset, size))
            return size, False
        quick = min(size, _MOST_QUICK)
        for mode in (_PUNCH_HOLE, fs.FALLOC_FL_ZERO_RANGE) if unmap else (fs.FALLOC_FL_ZERO_RANGE,):
            try:
                fallocate(self.fd, mode, offset, quick)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            else:
                return quick, True
        return os.pwrite(self.fd, bytes(min(size, _MOST_WRITTEN)), offset), False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)  # and with it the lock
            self.fd = -1
        if self._bounce is not None:
            self._bounce.close()


def _wipe(data: memoryview) -> None:
    """Leave nothing of the guest in memory that the host kernel maps."""
    memset(address_of(data), 0, len(data))


def _check_kind(path: Path, mode: int) -> bool:
    """Whether it is a block device. Raises OffmapError: it is neither that nor a regular file."""
    if stat.S_ISREG(mode):
        return False
    if stat.S_ISBLK(mode):
        return True
    raise _no_drive(path)


def _no_drive(path: Path) -> OffmapError:
    return OffmapError(f"the drive {path} is neither a regular file nor a block device", "give a raw image")


def _open_remedy(error: OSError, readonly: bool, direct: bool) -> str:
    if error.errno == errno.ENOENT:
        return "make it first (truncate -s 1G FILE)"
    if direct and error.errno == errno.EINVAL:
        return "leave direct=on out: this file system has no direct I/O"
    if not readonly and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "add readonly=on, if the guest need not write to it"
    return ""


def _ioctl_int(fd: int, request: int) -> int:
    value: int
    (value,) = struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))
    return value
