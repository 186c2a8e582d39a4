"""A memfd: shared memory that other processes (vhost-user) can map. A baseline: the kernel maps every page of it."""

import os

from offmap.errors import KernelError
from offmap.kvm import Vm
from offmap.memory.backend import Backend, check_host_has
from offmap.memory.backing import Backing, map_backing

__all__ = ["Memfd"]


class Memfd(Backend):
    name = "memfd"

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        return [map_memfd("memfd", "offmap-ram", size, os.MFD_CLOEXEC)]


def map_memfd(what: str, name: str, size: int, flags: int, remedy: str = "") -> Backing:
    """Create a memfd of `size` bytes and map it; the mapping alone keeps it.

    Raises:
        KernelError: memfd_create, ftruncate or mmap failed.
    """
    try:
        fd = os.memfd_create(name, flags)
    except OSError as error:
        raise KernelError(f"memfd_create of {what}", error, remedy) from None
    try:
        os.ftruncate(fd, size)
        return map_backing(what, fd, size, remedy=remedy)
    except OSError as error:
        raise KernelError(f"ftruncate of {what}", error, remedy) from None
    finally:
        os.close(fd)
