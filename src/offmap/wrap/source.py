"""Where hidden memory for slots comes from."""

import ctypes
import mmap
import os
from _collections_abc import Callable  # os has it already; collections.abc would bring more
from abc import ABC, abstractmethod
from fcntl import ioctl

from offmap.errors import BackendRefused, KernelError, OffmapError
from offmap.files import fallocate
from offmap.hidden_files import DEFAULT_POOL, device_file, is_of_a_pool, pool_file, unplugged_file
from offmap.owned import Owned
from offmap.uapi import offmap_module as uapi
from offmap.uapi.fs import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from offmap.uapi.page import PAGE_SIZE
from offmap.wrap.address_space import Area

_LARGE_PAGES = (1 << 30, 2 << 20)


class Piece(Owned):
    """Zeroed hidden memory that nobody else gets; a context manager that ends our own access to it.

    Attributes:
        fd: an open file. Who maps it gets a mapping that guards itself (OFFMAP_GUARD).
        offset: where the piece begins in it, in bytes.
        size: in bytes.
        address: of our own mapping of it, which does not guard itself.
    """

    def __init__(self, fd: int, offset: int, size: int, address: int, end: Callable[[], None]) -> None:
        self.fd = fd
        self.offset = offset
        self.size = size
        self.address = address
        self._end = end

    def close(self) -> None:
        self._end()
        self._end = lambda: None


class Source(ABC):
    """Gives hidden memory, by files that can be mapped shared."""

    @abstractmethod
    def check(self) -> None:
        """Raise OffmapError if this host does not have it, or not for us."""

    @abstractmethod
    def take(self, size: int, address: int) -> Piece:
        """`size` bytes (whole pages) to be mapped at `address`, by large pages where that is possible.

        Raises:
            OffmapError: there is not so much.
        """


def source_for(memory: str) -> Source:
    """The source that ``--memory`` names.

    Raises:
        OffmapError: there is no such kind of memory, or it cannot be placed under a VMM.
    """
    if memory == "pool":  # in the usual case nothing needs to be parsed: backends take long to import
        return PoolFiles(DEFAULT_POOL)
    if memory == "unplugged":
        return DeviceFiles(uapi.OFFMAP_ANY_NODE)
    from offmap.memory.backend import parse_backend

    kind, value = parse_backend(memory).placed_from()
    return PoolFiles(value) if kind == "pool" else DeviceFiles(int(value))


def is_hidden(device: int, inode: int) -> bool:
    """Whether a shared mapping of this file, by its numbers in /proc/PID/smaps, is of hidden memory."""
    try:
        found = os.stat(uapi.DEVICE)  # noqa: PTH116 - pathlib costs half a megabyte
    except OSError:  # a container's /dev
        return is_of_a_pool(device)
    return (device, inode) == (found.st_dev, found.st_ino) or is_of_a_pool(device)


def _phases(size: int, address: int) -> list[int]:
    """How far into a large page the piece may begin, so that the kernel can map all of it by such: the best first."""
    return [*(address % large for large in _LARGE_PAGES if size >= large), 0]


def _guard(fd: int) -> None:
    try:
        ioctl(fd, uapi.OFFMAP_GUARD)
    except OSError as error:
        raise KernelError("OFFMAP_GUARD", error, "load the module of this version: offmap module load") from None


def _mapped(fd: int, size: int, offset: int = 0) -> tuple[mmap.mmap, int]:
    """Map a file here; returns the mapping and its address, which is good as long as the mapping is open."""
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, offset=offset)
    window = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(window)
    del window
    return memory, address


class PoolFiles(Source):
    """Files of a pool, one for each piece."""

    def __init__(self, path: str) -> None:
        self._path = path

    def check(self) -> None:
        os.close(pool_file(self._path, PAGE_SIZE))

    def take(self, size: int, address: int) -> Piece:
        *better, worst = _phases(size, address)
        for phase in better:
            try:
                return self._take(size, phase)
            except BackendRefused:  # maybe no room for what is in front of it too, which goes back at once
                continue
        return self._take(size, worst)

    def _take(self, size: int, phase: int) -> Piece:
        fd = pool_file(self._path, phase + size)
        try:
            if phase:
                fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, phase)
        except BaseException:
            os.close(fd)
            raise
        return _piece_of(fd, size, phase)


def own_pool_file(pid: int, area: Area) -> Piece:
    """The memory of this mapping of a pool's file, by another open file of it.

    Raises:
        OffmapError: the process has closed the file, and we may not open what is mapped; or it may not be opened.
    """
    mapped = f"/proc/{pid}/map_files/{area.whole[0]:x}-{area.whole[1]:x}"  # for root, or CAP_CHECKPOINT_RESTORE
    files = f"/proc/{pid}/fd"
    for path in (mapped, *(f"{files}/{name}" for name in os.listdir(files))):  # noqa: PTH208
        try:
            if not _is_of(area, os.stat(path)):  # noqa: PTH116 - what it is must be known before it is opened
                continue
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if _is_of(area, os.fstat(fd)):
                return _piece_of(fd, area.end - area.start, area.offset)
            os.close(fd)
        except (OSError, ValueError):  # the latter: it is shorter than what is mapped
            continue
    raise OffmapError(
        f"the guest's memory at {area.start:#x} cannot be guarded",
        "wrap it as root, or give the VMM ordinary memory",
        why=f"no open file of {area.path} can be had",
    )


def _is_of(area: Area, found: os.stat_result) -> bool:
    return (found.st_dev, found.st_ino) == (area.device, area.inode)


def _piece_of(fd: int, size: int, offset: int) -> Piece:
    """A piece that owns a pool's file."""
    try:
        memory, here = _mapped(fd, size, offset)
        _guard(fd)
    except BaseException:
        os.close(fd)
        raise

    def end() -> None:
        memory.close()
        os.close(fd)

    return Piece(fd, offset, size, here, end)


class _Blocks:
    """An open file of /dev/offmap, our mapping of all of it, and its first byte that is free."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.memory, self.address = _mapped(fd, size)
        self.free = 0


class DeviceFiles(Source):
    """/dev/offmap: memory blocks that are taken from the running kernel. What one slot leaves of a block others get."""

    def __init__(self, node: int) -> None:
        self._node = node
        self._open: list[_Blocks] = []

    def check(self) -> None:
        os.close(device_file())

    def take(self, size: int, address: int) -> Piece:
        phase = _phases(size, address)[0] % _LARGE_PAGES[-1]  # memory blocks need not be aligned to more
        for blocks in self._open:
            offset = blocks.free + (phase - blocks.free) % _LARGE_PAGES[-1] if size >= _LARGE_PAGES[-1] else blocks.free
            if offset + size <= blocks.size:
                return self._piece(blocks, offset, size)
        fd, there = unplugged_file(size, self._node)
        try:
            blocks = _Blocks(fd, there)
            _guard(fd)
        except BaseException:
            os.close(fd)
            raise
        self._open.append(blocks)
        return self._piece(blocks, phase if phase + size <= there else 0, size)

    @staticmethod
    def _piece(blocks: _Blocks, offset: int, size: int) -> Piece:
        blocks.free = offset + size
        return Piece(blocks.fd, offset, size, blocks.address + offset, lambda: None)
