"""A memfd: shared memory that other processes (vhost-user) can map. A baseline: the kernel maps every page of it."""

import mmap
import os

from offmap.errors import KernelError
from offmap.kvm import Vm
from offmap.memory.backend import Backend, check_host_has
from offmap.memory.backing import Backing
from offmap.uapi.mman import MADV_HUGEPAGE
from offmap.uapi.page import PAGE_SIZE


class Memfd(Backend):
    name = "memfd"
    discards = True

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        backing = map_memfd("memfd", size, os.MFD_CLOEXEC)
        backing.madvise(MADV_HUGEPAGE)  # heard where the host's shmem_enabled is "advise"; Debian's is "never"
        return [backing]


def map_memfd(what: str, size: int, flags: int, remedy: str = "", *, page_size: int = PAGE_SIZE) -> Backing:
    """Create a memfd of `size` bytes and map it; the mapping alone keeps it.

    Raises:
        KernelError: memfd_create, ftruncate or mmap failed.
    """
    try:
        fd = os.memfd_create("offmap-ram", flags)
    except OSError as error:
        raise KernelError(f"memfd_create of {what}", error, remedy) from None
    try:
        os.ftruncate(fd, size)
        # MADV_REMOVE makes a hole in the file, as fallocate would.
        return Backing(what, fd, size, remedy=remedy, discard=mmap.MADV_REMOVE, page_size=page_size)
    except OSError as error:
        raise KernelError(f"ftruncate of {what}", error, remedy) from None
    finally:
        os.close(fd)
