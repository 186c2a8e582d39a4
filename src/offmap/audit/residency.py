"""Where pages stand that the process itself does not have in its page tables: in a file, or in the offmap module.

A file may hold pages that another mapping put there, or that reclaim dropped from this one. The file is opened a second
time, mapped read-only, and asked with mincore(2), which brings nothing in. Only pages that are resident already are
touched, so that our own pagemap tells their frames. Nothing is written, and no page is allocated. Where a mapping of
/dev/offmap is in physical memory, only the module that made it knows.
"""

import ctypes
import errno
import faulthandler
import mmap
import os
import select
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from fcntl import ioctl
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offmap.audit import pagemap
from offmap.audit.process import Mapping, Process
from offmap.audit.procfs import file_system
from offmap.audit.status import memfd_device, open_file, status_of
from offmap.errors import Undetermined
from offmap.uapi.offmap_module import DEVICE, OFFMAP_TRANSLATE, offmap_translate
from offmap.uapi.page import PAGE_SIZE

_SYS_PIDFD_GETFD = 438  # arch/x86/entry/syscalls/syscall_64.tbl
_MAP_NORESERVE = 0x4000  # asm-generic/mman.h
_LONGEST_LOOK = 60  # seconds that a foreign file may keep us: far more than a look at memory that is there takes
_LONGEST_END = 5  # seconds that a child which was killed may take to end
_ANSWER = np.dtype([("pfn", np.uint64), ("resident", np.bool_), ("empty", np.bool_)])
_libc = ctypes.CDLL(None, use_errno=True)


class Backing(Enum):
    """What kind of file stands behind a mapping: each keeps account of its pages in its own way."""

    SHMEM = "shmem"  # counts every page in st_blocks, swapped ones too; holes tell what was never written
    HUGETLB = "hugetlbfs"  # counts in st_blocks; mincore(2) sees only the caller's own page tables
    SECRETMEM = "secretmem"  # memfd_secret: st_blocks says 0; what is not resident does not exist
    GUEST_MEMFD = "guest_memfd"  # the same; whether the kernel maps its pages depends on a flag that nothing shows
    FILE = "file"  # a disk file: dirty pages may not be counted yet
    OTHER = "other"  # a device, or anything that cannot be asked

    @property
    def unswappable(self) -> bool:
        """Whether what is not resident does not exist."""
        return self in {Backing.SECRETMEM, Backing.GUEST_MEMFD}

    @property
    def memory(self) -> str:
        """What the pages are that are not there yet, for people; empty where the kernel will not map them."""
        return {
            Backing.SECRETMEM: "",
            Backing.GUEST_MEMFD: "guest_memfd memory, which need not be hidden",
            Backing.SHMEM: "shared memory",
            Backing.HUGETLB: "huge pages",
        }.get(self, "a file")


_MAGIC = {  # include/uapi/linux/magic.h
    0x01021994: Backing.SHMEM,  # TMPFS_MAGIC
    0x958458F6: Backing.HUGETLB,  # HUGETLBFS_MAGIC
    0x5345434D: Backing.SECRETMEM,  # SECRETMEM_MAGIC
    0x474D454D: Backing.GUEST_MEMFD,  # GUEST_MEMFD_MAGIC
}
_MAGIC_BYTES = 8
_ANSWERED_BY_OTHERS = {0x65735546, 0x794C7630}  # FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC: to open a file is to ask too


@contextmanager
def open_backing(process: Process, mapping: Mapping) -> Iterator[tuple[Backing, int | None]]:
    """The kind of file behind a mapping, and a second handle on it, or None where there is no way to one.

    /proc/PID/map_files serves memfd, tmpfs and ordinary files; a memfd_secret inode cannot be opened again, so its
    descriptor is duplicated from the process if it is still open there.

    Raises:
        TimeoutError: its file system does not answer.
        OSError: no child can ask it.
    """
    try:
        place = process.open(link(mapping), os.O_PATH)
    except Undetermined:
        yield Backing.OTHER, None
        return
    try:
        kind = _kind_of(place)
        fd = None if kind is Backing.OTHER else _open_again(place)
        if fd is None and kind is Backing.SECRETMEM:
            fd = _duplicate(process, mapping)
        try:
            yield kind, fd
        finally:
            if fd is not None:
                os.close(fd)
    finally:
        os.close(place)


def _kind_of(place: int) -> Backing:
    """The kind of file that an O_PATH descriptor leads to, by its file system's magic number; raises as above."""
    status = status_of(open_file(place))
    if status is None or not stat.S_ISREG(status.st_mode):
        return Backing.OTHER
    if status.st_dev == memfd_device():
        return Backing.SHMEM
    with mmap.mmap(-1, _MAGIC_BYTES) as answer:

        def ask() -> None:
            answer.write(file_system(place).to_bytes(_MAGIC_BYTES, "little"))

        _in_child(ask)
        magic = int.from_bytes(answer[:], "little")
    return Backing.OTHER if magic in _ANSWERED_BY_OTHERS else _MAGIC.get(magic, Backing.FILE)


def _open_again(place: int) -> int | None:
    try:
        return os.open(open_file(place), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def link(mapping: Mapping) -> str:
    """Name of a mapping's file below /proc/PID."""
    return f"map_files/{mapping.start:x}-{mapping.end:x}"


def allocated_bytes(process: Process, mapping: Mapping) -> int | None:
    """Bytes that the mapping's file holds (``st_blocks``); None where it cannot be asked."""
    status = process.stat(link(mapping))
    return None if status is None else status.st_blocks * 512


def _duplicate(process: Process, mapping: Mapping) -> int | None:
    major, minor = (int(part, 16) for part in mapping.device.split(":"))
    for number in process.descriptors():
        status = process.stat(f"fd/{number}")
        if status is None or (status.st_dev, status.st_ino) != (os.makedev(major, minor), mapping.inode):
            continue
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            return None
        try:
            copy = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
        finally:
            os.close(pidfd)
        if copy >= 0:
            again = os.fstat(copy)
            if (again.st_dev, again.st_ino) == (status.st_dev, status.st_ino):
                return copy
            os.close(copy)
    return None


def resident_frames(
    fd: int, offset: int, pages: int, wanted: NDArray[np.bool_], counts_holes: bool
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the wanted pages of a file are.

    Args:
        fd: the file; page ``i`` is at byte ``offset + i * 4096``.
        wanted: which of the ``pages`` pages to look for.
        counts_holes: whether a page that is not resident and lies in a hole (SEEK_DATA) holds nothing; False for
            files where not resident means not there at all (memfd_secret is never swapped).

    Returns:
        frames, and two masks: resident (the frame is valid) and empty (the file has no such page).

    The file may be such that a touch is a SIGBUS, or never comes back: somebody else chose it. So a child looks at it.

    Raises:
        OSError: the file cannot be mapped or asked, or the child died of it.
    """
    with mmap.mmap(-1, pages * _ANSWER.itemsize) as shared:
        answer = np.frombuffer(shared, dtype=_ANSWER)
        try:
            _in_child(partial(_look, fd, offset, wanted, counts_holes, answer))
            return answer["pfn"].copy(), answer["resident"].copy(), answer["empty"].copy()
        finally:
            del answer  # the mapping cannot be closed before


def _in_child(work: Callable[[], None]) -> None:
    """Run this in a child that may die of it.

    Raises:
        TimeoutError: it took too long. A child that waits for an answer of a file system may not even end when it is
            killed: then it is left alone.
        OSError: the work raised it, or a signal killed the child.
    """
    child = os.fork()
    if child == 0:
        status = errno.EIO
        try:
            faulthandler.disable()  # to die of it is no bug
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):  # whoever reads our output must not wait for the end of this one
                os.dup2(null, stream)
            work()
            status = 0
        except OSError as error:
            status = error.errno or errno.EIO
        finally:
            os._exit(min(status, 255))
    pidfd, ended = os.pidfd_open(child), False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        ended = bool(poll.poll(_LONGEST_LOOK * 1000))
    finally:
        if not ended:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll.poll(_LONGEST_END * 1000)
        os.close(pidfd)
        _, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        raise TimeoutError(errno.ETIMEDOUT, "a look at it took too long")
    status = os.waitstatus_to_exitcode(status)
    if status < 0:
        raise OSError(errno.EFAULT, f"a look at it ended with signal {-status}")
    if status:
        raise OSError(status, os.strerror(status))


def _look(fd: int, offset: int, wanted: NDArray[np.bool_], counts_holes: bool, answer: NDArray[np.void]) -> None:
    """What ``resident_frames`` returns, into the rows of ``answer``; raises as it does."""
    pages = len(wanted)
    # MAP_NORESERVE: a hugetlb file must not lose huge pages to our reservation.
    flags = mmap.MAP_SHARED | _MAP_NORESERVE
    with mmap.mmap(fd, pages * PAGE_SIZE, flags=flags, prot=mmap.PROT_READ, offset=offset) as view:
        # A read-only mmap exports no writable buffer, so its address is asked of numpy, which does not keep it.
        address = int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
        vector = np.zeros(pages, dtype=np.uint8)
        size, out = ctypes.c_size_t(pages * PAGE_SIZE), vector.ctypes.data_as(ctypes.c_void_p)
        if _libc.mincore(ctypes.c_void_p(address), size, out):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        cached = wanted & (vector & 1 != 0)
        for index in np.flatnonzero(cached).tolist():
            view[index * PAGE_SIZE]
        entries = pagemap.own_entries(address, pages)
    empty = wanted & ~cached
    if counts_holes:
        empty &= ~_data(fd, offset, pages)
    answer["pfn"], answer["resident"], answer["empty"] = pagemap.pfn(entries), cached & pagemap.present(entries), empty


def _data(fd: int, offset: int, pages: int) -> NDArray[np.bool_]:
    """Which pages lie in data rather than in a hole of the file."""
    data = np.zeros(pages, dtype=np.bool_)
    position, end = offset, offset + pages * PAGE_SIZE
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                break
            raise  # it cannot be asked, which is not the same as a hole
        position = os.lseek(fd, start, os.SEEK_HOLE)
        data[max(start - offset, 0) // PAGE_SIZE : max(-(-(position - offset) // PAGE_SIZE), 0)] = True
    return data


def is_offmap_device(rdev: int) -> bool:
    """Whether `rdev` is the device number of /dev/offmap."""
    try:
        return os.stat(DEVICE).st_rdev == rdev  # noqa: PTH116 - a device, not a document
    except OSError:
        return False


def physical_ranges(pid: int, va: int, size: int) -> list[tuple[int, int]]:
    """What `size` bytes at `va` of process `pid` are, as (physical address, bytes), in order.

    Raises:
        OSError: there is no such mapping of /dev/offmap or of a pool's file (ENXIO), that file has a hole there
            (ENODATA), or the module may not be asked.
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
