"""Physical memory that Linux never owned (``memmap=SIZE$START`` on the host's command line), through /dev/mem.

It has no struct page and is not in the direct map. Nobody else zeroes or arbitrates it, so this module does both: VMMs
of one host take disjoint, locked sub-ranges. Each is zeroed before its guest sees it, and after its guest is gone.
"""

import errno
import os
from ctypes import memset

from offmap.errors import BackendRefused, OffmapError
from offmap.files import read_text
from offmap.kvm import Vm
from offmap.kvm.handle import open_device
from offmap.memory.backend import Backend, Keeper, refused
from offmap.memory.backing import Backing
from offmap.memory.iomem import (
    PhysicalRange,
    intersect,
    memmap_reservations,
    merged,
    parse_iomem,
    subtract,
    suggest_reservation,
)
from offmap.memory.range_lock import RangeLock
from offmap.options import Options
from offmap.typed import Self
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size, parse_size

_DEV_MEM = "/dev/mem"
_DEV_MEM_REMEDY = {
    errno.EACCES: "run as root",
    errno.EPERM: "run as root; a host in lockdown mode (Secure Boot) allows nobody",
    errno.ENOENT: "use a kernel with CONFIG_DEVMEM",
}
_ALIGNMENT = 2 << 20  # so that a later, larger mapping of the same range can be one of whole 2M pages


class Reserved(Backend):
    """``reserved[,base=ADDRESS]``: somewhere in what is reserved, or exactly at physical `base`."""

    name = "reserved"
    usage = "base=ADDRESS"
    hides = True
    may_be_aliased = False
    linux_owned = False

    def __init__(self, base: int | None = None) -> None:
        self.base = base

    @classmethod
    def from_options(cls, options: Options) -> Self:
        base = options.text("base", None, parse_size)
        if base is not None and base % PAGE_SIZE:
            options.refuse(f"base={base:#x} is not the address of a page", f"use a multiple of {PAGE_SIZE:#x}")
        return cls(base)

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        ranges = reserved_ranges()
        if not ranges:
            raise BackendRefused(
                "this host cannot give reserved memory",
                "it has no physical memory reserved for guests",
                _how_to_reserve(),
            )
        free = ranges
        if self.base is not None:
            free = intersect(ranges, [PhysicalRange(self.base, self.base + size)])
        with refused(_DEV_MEM_REMEDY):
            lock = RangeLock(_DEV_MEM)
        try:
            tries = (PAGE_SIZE,) if self.base is not None else (_ALIGNMENT, PAGE_SIZE)
            taken = lock.take_soon(free, size, tries)
            if taken is None:
                raise self._refusal(ranges, lock, size)
            return [_map(taken, lock, self.keeper)]
        except BaseException:
            lock.close()
            raise

    def _refusal(self, ranges: list[PhysicalRange], lock: RangeLock, size: int) -> BackendRefused:
        held = [h for r in ranges for h in lock.held_by_others(r)]
        largest = max((r.size for r in subtract(ranges, held)), default=0)
        where = "" if self.base is None else f" at {self.base:#x}"
        reserved, in_use = sum(r.size for r in ranges), sum(h.size for h in held)
        return BackendRefused(
            f"no {format_size(size)} of reserved physical memory are free{where}",
            f"{format_size(reserved)} reserved, {format_size(in_use)} of it in use, "
            f"largest free run {format_size(largest)}",
            "ask for less, stop another guest, or reserve more with memmap=",
        )


def reserved_ranges() -> list[PhysicalRange]:
    """The physical memory that the host's command line took from Linux, in whole pages, in order.

    The firmware reports it as RAM, ``memmap=`` reserves it, and /proc/iomem shows it as Reserved. A range that the
    firmware reserved for itself is never touched.

    Raises:
        OffmapError: /proc/iomem hides its addresses from this user.
    """
    asked = memmap_reservations(read_text("/proc/cmdline"))
    if not asked:
        return []
    iomem = read_text("/proc/iomem")
    ranges = intersect(asked, parse_iomem(iomem, "Reserved"))
    ranges = subtract(ranges, parse_iomem(iomem, "System RAM"))
    if firmware := list(_firmware_ram()):
        ranges = intersect(ranges, firmware)
    return [r for r in (r.aligned(PAGE_SIZE) for r in ranges) if r.size]


def _how_to_reserve() -> str:
    """The boot parameter, with addresses of this host."""
    try:
        there = suggest_reservation(read_text("/proc/iomem"))
    except OffmapError:  # addresses are for root only
        there = None
    if there is None:
        return "boot it with memmap=SIZE$START, a range of its RAM, on its kernel command line"
    parameter = f"memmap={there.size >> 20}M${there.start:#x}"
    return f"boot it with {parameter} on its kernel command line (in a GRUB file, write the $ as \\$)"


def _firmware_ram() -> list[PhysicalRange]:
    """RAM as the firmware reported it, before the command line changed the map (/sys/firmware/memmap)."""
    found = []
    folder = "/sys/firmware/memmap"
    for entry in os.listdir(folder) if os.path.isdir(folder) else ():  # noqa: PTH112, PTH208
        try:
            if read_text(f"{folder}/{entry}/type").strip() == "System RAM":
                start, last = (int(read_text(f"{folder}/{entry}/{name}"), 16) for name in ("start", "end"))
                found.append(PhysicalRange(start, last + 1))
        except OSError as error:
            # Memory that is unplugged takes its entry with it (firmware_map_remove); it was Linux's own, not reserved.
            # ENODEV where it goes while the file is open (kernfs_get_active).
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
    return merged(found)


def _map(taken: PhysicalRange, lock: RangeLock, keeper: Keeper | None) -> Backing:
    def give_back(backing: Backing) -> None:
        try:
            # The next user of the range must not read this guest. No file is opened for it, as a sandbox allows none.
            memset(backing.address, 0, backing.size)
            if keeper is not None:
                keeper.zeroed()
        finally:
            lock.close()

    with refused(_DEV_MEM_REMEDY):
        fd = open_device(_DEV_MEM)
        try:
            what = f"{_DEV_MEM} at {taken.start:#x}"
            backing = Backing(what, fd, taken.size, offset=taken.start, on_close=give_back)
        finally:
            os.close(fd)
    with backing.closed_on_error():
        memset(backing.address, 0, backing.size)  # a VMM that was killed could not; the kernel takes twice as long
        if keeper is not None:
            keeper.keep_range(lock.fd, taken.start, taken.size)
            lock.close()  # here only: the lock is the open file's
    return backing
