"""A piece of host memory, mapped into this process, that becomes guest RAM."""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from io import FileIO

from offmap.errors import KernelError
from offmap.files import fallocate
from offmap.owned import Owned
from offmap.typed import Self
from offmap.uapi.fs import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from offmap.uapi.mman import MAP_NORESERVE
from offmap.uapi.page import PAGE_SIZE

_MAP_FIXED = 0x10  # asm-generic/mman-common.h
_MREMAP_MAYMOVE_FIXED = 3  # linux/mman.h


class Backing(Owned):
    """Maps `size` bytes of `fd` (-1: anonymous memory) readable and writable.

    Args:
        what: what is mapped, for messages.
        guest_memfd: the fd for KVM_SET_USER_MEMORY_REGION2, owned from then on; None where the memslot goes by address.
        discard: the advice (MADV_*) that gives pages of it back to the host, or None.
        page_size: bytes that can only be given back together.
        on_close: runs first when it is closed, while the memory is still mapped.

    Attributes:
        size: bytes.
        address: where it is mapped in this process.
        view: its bytes.

    Raises:
        KernelError: with "mmap of `what`" as the operation.
    """

    def __init__(
        self,
        what: str,
        fd: int,
        size: int,
        *,
        flags: int = mmap.MAP_SHARED,
        offset: int = 0,
        remedy: str = "",
        guest_memfd: int | None = None,
        discard: int | None = None,
        page_size: int = PAGE_SIZE,
        on_close: "Callable[[Backing], None] | None" = None,
    ) -> None:
        try:
            self._mapping, self._start = _map(fd, size, flags, offset, page_size)
        except OSError as error:
            raise KernelError(f"mmap of {size >> 20} MiB of {what}", error, remedy) from None
        self.size = size
        self.view = memoryview(self._mapping)[self._start : self._start + size]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping)) + self._start
        self.guest_memfd = guest_memfd
        self.page_size = page_size
        self._discard = discard
        self._on_close = on_close

    def madvise(self, advice: int) -> bool:
        """Advise the kernel on all of it; False where it does not know or want the advice."""
        try:
            self._mapping.madvise(advice, self._start, self.size)
        except OSError:
            return False
        return True

    def discard(self, offset: int, size: int) -> None:
        """Give these bytes back to the host; they are zeroes when they are touched again, in other frames.

        Args:
            offset, size: whole pages of `page_size`.

        Raises:
            KernelError: the kernel would not; EOPNOTSUPP where there is no way. VM_PFNMAP memory is not the host's to
                take back, and memfd_secret takes neither a hole (it has no fallocate) nor advice (it is locked).
        """
        try:
            if self.guest_memfd is not None:
                fallocate(self.guest_memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
            elif self._discard is not None:
                self._mapping.madvise(self._discard, self._start + offset, size)
            else:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        except OSError as error:
            raise KernelError("giving guest RAM back to the host", error) from None

    def zero(self, start: int = 0, end: int | None = None) -> None:
        """Fill these bytes (by default all) with zeroes, and so give each page a frame. The kernel does the writing.

        Raises:
            KernelError: EFAULT where the backend could not give a page.
        """
        end = self.size if end is None else end
        try:
            with FileIO("/dev/zero") as zeroes:
                while start < end:
                    # Linux moves at most MAX_RW_COUNT (2 GiB less a page) in one call.
                    start += zeroes.readinto(self.view[start : min(end, start + (1 << 30))])
        except OSError as error:
            raise KernelError("populating guest RAM", error) from None

    def exchange(self, one: int, other: int, size: int) -> None:
        """Let the frames of two stretches change places.

        Args:
            one, other, size: offsets, in whole pages.

        Raises:
            KernelError: the kernel would not; the memory is of no use then.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
        length, private = ctypes.c_size_t(size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        aside = libc.mmap(None, length, 0, private, -1, ctypes.c_long(0))
        one, other = self.address + one, self.address + other
        for start, to in ((one, aside), (other, one), (aside, other)):
            moved = libc.mremap(ctypes.c_void_p(start), length, length, _MREMAP_MAYMOVE_FIXED, ctypes.c_void_p(to))
            if moved != to:
                raise KernelError("moving guest RAM", ctypes.get_errno())

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[Self]:
        """Close it if what is done within fails."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._mapping.closed:
            return
        try:
            if self._on_close is not None:
                self._on_close(self)
        finally:
            self.view.release()
            # A view that somebody still holds (the frames of a traceback do) keeps the mapping until it goes.
            with contextlib.suppress(BufferError):
                self._mapping.close()
            if self.guest_memfd is not None:
                os.close(self.guest_memfd)
                self.guest_memfd = None


def _map(fd: int, size: int, flags: int, offset: int, page_size: int) -> tuple[mmap.mmap, int]:
    """Map a file without keeping a descriptor of it. Return the mapping, and where in it the file is.

    Python's own mmap keeps a duplicate (until 3.13: trackfd). One of /dev/mem could map all that there is. So the file
    is mapped over anonymous memory, which Python knows of.

    Raises:
        OSError: it cannot be mapped.
    """
    both = mmap.PROT_READ | mmap.PROT_WRITE
    if fd < 0:
        return mmap.mmap(fd, size, flags, both), 0
    # Where huge pages could map it, the address must not be in the way.
    alignment = max(page_size, 1 << 30 if size >= 1 << 30 else 2 << 20 if size >= 2 << 20 else PAGE_SIZE)
    room = mmap.mmap(-1, size + alignment, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, both)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = -address % alignment
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    if libc.mmap(address + start, size, both, flags | _MAP_FIXED, fd, offset) != address + start:
        error = ctypes.get_errno()
        room.close()
        raise OSError(error, os.strerror(error))
    return room, start
