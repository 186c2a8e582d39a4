"""Each kind of guest RAM, got and populated: every page zeroed, and mapped in this process.

By what the backends themselves do, less their probes (which take the same time for any size), and with the number of
threads as a parameter.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Vm
from offmap.memory.anon import Anon
from offmap.memory.backend import BACKENDS, parse_backend
from offmap.memory.backing import Backing
from offmap.memory.guest_memfd import MAPPABLE, guest_memfd_flags, map_guest_memfd
from offmap.memory.guest_memfd_unmapped import unknown_flags
from offmap.memory.hugetlb import Hugetlb
from offmap.memory.memfd import Memfd, map_memfd
from offmap.memory.module_device import open_module
from offmap.memory.populate import populate
from offmap.memory.reserved import Reserved
from offmap.memory.secretmem import map_secret, secret_backing, secret_file
from offmap.uapi import offmap_module as module
from offmap.uapi.mman import MADV_POPULATE_WRITE

__all__ = [
    "KINDS",
    "PAGE",
    "SELF_THREADED",
    "Populate",
    "guest_memfd_unmapped_by_faults",
    "memfd",
    "memfd_by_advice",
    "memfd_huge",
    "shares",
    "unplugged",
]

PAGE = 4096
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)

Populate = Callable[[Vm, int, int], Backing]
"""(vm, size in bytes, threads) -> populated RAM, which the caller owns."""


def shares(size: int, threads: int, unit: int = PAGE) -> list[tuple[int, int]]:
    """Offset and length of each thread's part of `size` bytes, in whole `unit`."""
    step = -(-size // threads // unit) * unit
    return [(start, min(step, size - start)) for start in range(0, size, step)]


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise KernelError(name, ctypes.get_errno())


def _each(size: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Let each thread do its share; Python's lock is free while ctypes calls."""
    parts = shares(size, threads, 2 << 20)
    if len(parts) == 1:
        work(*parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(work, *part) for part in parts]:
            done.result()


@contextmanager
def _closed_on_error(backing: Backing) -> Iterator[Backing]:
    """RAM that goes back if it cannot be populated, so that another kind can have its place."""
    try:
        yield backing
    except BaseException:
        backing.close()
        raise


def _advise(backing: Backing, threads: int) -> Backing:
    """MADV_POPULATE_WRITE: frames and page-table entries, without writing a second time."""

    def work(start: int, length: int) -> None:
        place = ctypes.c_void_p(backing.address + start)
        _call("madvise", place, ctypes.c_size_t(length), MADV_POPULATE_WRITE)

    with _closed_on_error(backing):
        _each(backing.size, threads, work)
    return backing


def _touch(backing: Backing) -> Backing:
    """Write a byte to each page: for what has its frames, and may lack page-table entries."""
    np.frombuffer(backing.view, dtype=np.uint8)[::PAGE] = 0
    return backing


def anon(vm: Vm, size: int, threads: int) -> Backing:
    """With transparent huge pages, where the host has them."""
    return _advise(Anon().allocate(vm, size)[0], threads)


def memfd(vm: Vm, size: int, threads: int) -> Backing:
    """By fallocate and then MADV_POPULATE_WRITE: of the fair ways the fastest."""
    fd = os.memfd_create("offmap-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)

        def work(start: int, length: int) -> None:
            _call("fallocate", fd, 0, ctypes.c_long(start), ctypes.c_long(length))

        _each(size, threads, work)
        return _advise(Backing("memfd", fd, size), threads)
    finally:
        os.close(fd)


def memfd_by_advice(vm: Vm, size: int, threads: int) -> Backing:
    """By MADV_POPULATE_WRITE alone."""
    return _advise(map_memfd("memfd", size, os.MFD_CLOEXEC), threads)


def memfd_huge(vm: Vm, size: int, threads: int) -> Backing:
    """As the backend has it: with 2M pages, where the host's shmem_enabled is "advise" (Debian's is "never")."""
    return _advise(Memfd().allocate(vm, size)[0], threads)


def hugetlb(vm: Vm, size: int, threads: int) -> Backing:
    return _advise(Hugetlb().allocate(vm, size)[0], threads)


def reserved(vm: Vm, size: int, threads: int) -> Backing:
    return Reserved().allocate(vm, size)[0]


def unplugged(vm: Vm, size: int, threads: int) -> Backing:
    return _by_itself("unplugged", vm, size, threads)


def _by_itself(kind: str, vm: Vm, size: int, threads: int) -> Backing:
    """As the backend gives it; then each page is touched."""
    return _touch(parse_backend(kind).allocate(vm, size)[0])


def secretmem(vm: Vm, size: int, threads: int) -> Backing:
    with _closed_on_error(secret_backing(size)) as backing:
        populate(backing, threads)
    return backing


def secretmem_bridge(vm: Vm, size: int, threads: int) -> Backing:
    with open_module() as device:
        fd = secret_file(size)
        try:
            with map_secret(fd, size) as secret:
                populate(secret, threads)
            device.call("OFFMAP_BIND_SECRETMEM", module.OFFMAP_BIND_SECRETMEM, module.offmap_secretmem(fd, 0, 0))
        finally:
            os.close(fd)
        return _touch(Backing(module.DEVICE, device.fd, size))


def _guest_memfd(vm: Vm, size: int, threads: int, flags: int) -> Backing:
    with _closed_on_error(map_guest_memfd(vm, size, MAPPABLE | flags)) as backing:

        def work(start: int, length: int) -> None:
            fd = backing.guest_memfd
            _call("fallocate", fd, FALLOC_FL_KEEP_SIZE, ctypes.c_long(start), ctypes.c_long(length))

        _each(size, threads, work)
        populate(backing, threads)  # GUP refuses the flagged one, so not by advice
    return backing


def guest_memfd(vm: Vm, size: int, threads: int) -> Backing:
    guest_memfd_flags(vm)
    return _guest_memfd(vm, size, threads, 0)


def _no_direct_map_flag(vm: Vm) -> int:
    flag = next(unknown_flags(guest_memfd_flags(vm)), None)
    if flag is None:
        raise BackendRefused(
            "this kernel's guest_memfd has no flag to leave the direct map",
            "it advertises none",
            "use a patched kernel",
        )
    return flag


def guest_memfd_unmapped(vm: Vm, size: int, threads: int) -> Backing:
    return _guest_memfd(vm, size, threads, _no_direct_map_flag(vm))


def guest_memfd_unmapped_by_faults(vm: Vm, size: int) -> Backing:
    """Just touched: the control of how flushes are counted, one a page."""
    with _closed_on_error(map_guest_memfd(vm, size, MAPPABLE | _no_direct_map_flag(vm))) as backing:
        populate(backing, 1)
    return backing


_OWN_WAY: Mapping[str, Populate] = {
    "anon": anon,
    "memfd": memfd,
    "hugetlb": hugetlb,
    "reserved": reserved,
    "secretmem": secretmem,
    "secretmem-bridge": secretmem_bridge,
    "guest_memfd": guest_memfd,
    "guest_memfd-unmapped": guest_memfd_unmapped,
}
"""Kinds that need more than `_by_itself` to be populated, or to be so by a chosen number of threads."""

KINDS: Mapping[str, Populate] = {name: _OWN_WAY.get(name, partial(_by_itself, name)) for name in BACKENDS}
"""By the backend's name."""

SELF_THREADED: Mapping[str, str] = {
    "unplugged": "the module zeroes with one a CPU",
    "reserved": "one call of read(2) zeroes it all",
}
"""Kinds that take no number of threads, and why."""
