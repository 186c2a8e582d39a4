"""Where hidden memory for slots comes from."""

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fcntl import ioctl

from offmap.errors import KernelError, OffmapError
from offmap.files import fallocate
from offmap.kvm.handle import Handle
from offmap.memory.backend import parse_backend
from offmap.memory.module_device import open_module
from offmap.memory.pool import Pool
from offmap.memory.unplugged import Unplugged
from offmap.owned import Owned
from offmap.pools import is_of_a_pool
from offmap.uapi import offmap_module as uapi
from offmap.uapi.fs import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from offmap.uapi.page import PAGE_SIZE

_LARGE_PAGES = (1 << 30, 2 << 20)


@dataclass
class Piece(Owned):
    """Zeroed hidden memory that nobody else gets; a context manager that ends our own access to it.

    Attributes:
        fd: an open file. Who maps it gets a mapping that guards itself (OFFMAP_GUARD).
        offset: where the piece begins in it, in bytes.
        size: in bytes.
        address: of our own mapping of it, which does not guard itself.
    """

    fd: int
    offset: int
    size: int
    address: int
    _end: Callable[[], None]

    def close(self) -> None:
        self._end()
        self._end = lambda: None


class Source(ABC):
    """Gives hidden memory, by files that can be mapped shared."""

    @abstractmethod
    def take(self, size: int, address: int) -> Piece:
        """`size` bytes (whole pages) to be mapped at `address`, by large pages where that is possible.

        Raises:
            OffmapError: there is not so much.
        """


def source_of(memory: str) -> Source:
    """The source that ``--memory`` names.

    Raises:
        OffmapError: it cannot be placed under a VMM, or this host does not have it.
    """
    backend = parse_backend(memory)
    source: Source
    if isinstance(backend, Pool):
        source = PoolFiles(backend)
        source.take(PAGE_SIZE, 0).close()  # refused now, and not when the guest begins
    elif isinstance(backend, Unplugged):
        source = DeviceFiles(backend)
        open_module().close()  # the same
    else:
        raise OffmapError(
            f"{backend.name} cannot be placed under a VMM", "use --memory pool or --memory unplugged, which are files"
        )
    return source


def is_hidden(device: int, inode: int) -> bool:
    """Whether a shared mapping of this file, by its numbers in /proc/PID/smaps, is of hidden memory."""
    try:
        found = os.stat(uapi.DEVICE)  # noqa: PTH116 - pathlib costs half a megabyte
    except OSError:  # a container's /dev
        return is_of_a_pool(device)
    return (device, inode) == (found.st_dev, found.st_ino) or is_of_a_pool(device)


def _phase(size: int, address: int) -> int:
    """How far into a large page the piece should begin, so that the kernel can map the whole of it by large pages."""
    return next((address % large for large in _LARGE_PAGES if size >= large), 0)


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

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def take(self, size: int, address: int) -> Piece:
        phase = _phase(size, address)
        fd = self._pool.open_file(phase + size)
        try:
            if phase:
                fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, phase)
            memory, here = _mapped(fd, size, phase)
            _guard(fd)
        except BaseException:
            os.close(fd)
            raise

        def end() -> None:
            memory.close()
            os.close(fd)

        return Piece(fd, phase, size, here, end)


@dataclass
class _Blocks:
    """An open file of /dev/offmap, our mapping of all of it, and its first byte that is free."""

    file: Handle
    memory: mmap.mmap
    address: int
    size: int
    free: int = 0


class DeviceFiles(Source):
    """/dev/offmap: memory blocks that are taken from the running kernel. What one slot leaves of a block others get."""

    def __init__(self, backend: Unplugged) -> None:
        self._backend = backend
        self._open: list[_Blocks] = []

    def take(self, size: int, address: int) -> Piece:
        phase = _phase(size, address) % _LARGE_PAGES[-1]  # memory blocks need not be aligned to more
        for blocks in self._open:
            offset = blocks.free + (phase - blocks.free) % _LARGE_PAGES[-1] if size >= _LARGE_PAGES[-1] else blocks.free
            if offset + size <= blocks.size:
                return self._piece(blocks, offset, size)
        file, there = self._backend.open_file(size)
        try:
            memory, here = _mapped(file.fd, there)
            _guard(file.fd)
        except BaseException:
            file.close()
            raise
        blocks = _Blocks(file, memory, here, there)
        self._open.append(blocks)
        return self._piece(blocks, phase if phase + size <= there else 0, size)

    @staticmethod
    def _piece(blocks: _Blocks, offset: int, size: int) -> Piece:
        blocks.free = offset + size
        return Piece(blocks.file.fd, offset, size, blocks.address + offset, lambda: None)
