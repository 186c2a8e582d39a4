"""Hidden memory under one slot: what stands there is copied, and zeroed where it stood."""

import ctypes
import errno
import mmap
from _collections_abc import Callable, Iterator  # os has it already; collections.abc would bring more

from offmap.errors import OffmapError
from offmap.hidden_files import is_of_a_pool
from offmap.uapi import kvm
from offmap.uapi import ptrace as tracing
from offmap.uapi.page import PAGE_SIZE
from offmap.wrap import address_space
from offmap.wrap.address_space import Area
from offmap.wrap.listener import Call, Listener
from offmap.wrap.source import Piece, Source, is_hidden, own_pool_file
from offmap.wrap.stopped import Stopped

_MAP_FIXED = 0x10  # asm-generic/mman-common.h; not in every Python's mmap
_REGISTERS = ("anon_inode:[vfio-device]", "/dev/vfio/devices/")  # of a device that the guest has: not RAM


class SlotRefused(OffmapError):
    """Memory of this kind cannot be replaced by hidden memory: what, why, what to do."""

    def __init__(self, area: Area | None, why: str, remedy: str) -> None:
        where = (
            "a memory slot" if area is None else f"the slot's memory at {area.start:#x} ({area.path or 'anonymous'})"
        )
        super().__init__(f"{where} cannot be hidden", remedy, why=why)


def region_of(call: Call, pid: int) -> kvm.kvm_userspace_memory_region:
    """What the call that sets a slot says of it."""
    region = kvm.kvm_userspace_memory_region()
    address_space.read_into(pid, call.argument, ctypes.addressof(region), ctypes.sizeof(region))
    return region


def to_place(
    region: kvm.kvm_userspace_memory_region, pid: int, guarded: Callable[[Area], bool], *, trust_shared: bool
) -> list[Area]:
    """The parts of the slot's memory that are not hidden and guarded yet; empty for a slot that needs nothing.

    A slot that is deleted needs nothing, nor registers of a VFIO device. One that the guest can only read needs it as
    others do.

    Args:
        guarded: whether a mapping of hidden memory guards itself.
        trust_shared: the user says that no other process uses the VMM's shared files.

    Raises:
        SlotRefused: memory of this kind cannot be replaced.
    """
    if region.flags & kvm.KVM_MEM_GUEST_MEMFD:
        raise SlotRefused(None, "it is of guest_memfd, which has no address to replace", "turn guest_memfd off")
    start, end = region.userspace_addr, region.userspace_addr + region.memory_size
    if not region.memory_size or start % PAGE_SIZE or end % PAGE_SIZE:
        return []  # KVM deletes the slot, or refuses what is not of pages
    covered = _covered(address_space.areas(pid, start, end), start, end)
    wanted = [area for area in covered if _wanted(area, guarded, trust_shared)]
    if wanted and address_space.pinned(pid):
        raise SlotRefused(
            wanted[0],
            "the VMM has pinned memory, maybe this: a device would go on with what was there before",
            "have it pin nothing before its slots are set, like io_uring's fixed buffers",
        )
    for area in wanted:
        shared = address_space.populated(pid, area.start, area.end, address_space.SHARED)
        if any(address_space.has_data(pid, *run) for run in shared):
            raise SlotRefused(
                area,
                "what it holds is also in the memory of another process: a child's, or merged by KSM",
                "start the guest before the VMM forks, and turn KSM off",
            )
    return wanted


def _covered(found: list[Area], start: int, end: int) -> Iterator[Area]:
    at = start
    for area in found:
        if area.start > at:
            break
        area.cut(start, end)
        at = area.end
        yield area
    if at < end:
        raise SlotRefused(None, f"nothing is mapped at {at:#x}", "report which VMM sets a slot before it has memory")


def _wanted(area: Area, guarded: Callable[[Area], bool], trust_shared: bool) -> bool:
    hidden = _hidden(area)
    if hidden and guarded(area):
        return False
    if area.flags & {"um", "uw", "ui"}:
        raise SlotRefused(
            area,
            "it is registered with userfaultfd, and would lose that",
            "restore the snapshot from a file, not by a page-fault handler",
        )
    if area.perms[:3] not in {"rw-", "r--"}:
        raise SlotRefused(area, f"its mapping is {area.perms[:3]}", "turn off what maps guest memory late")
    if hidden:
        return True
    if area.flags & {"io", "pf"}:
        if area.path.startswith(_REGISTERS):
            return False
        why = "it may be memory of the kernel's or of a device"
        raise SlotRefused(area, why, "turn off what gives it to the guest")
    if area.shared and not trust_shared:
        raise SlotRefused(
            area,
            "it is a shared file, which another process may use too",
            "use private memory, without vhost-user and virtiofs; or --trust-shared if no other process uses it",
        )
    if "ht" in area.flags:
        raise SlotRefused(area, "it is of huge pages", "give the VMM ordinary memory")
    return True


def _hidden(area: Area) -> bool:
    return area.shared and is_hidden(area.device, area.inode)


def place(stopped: Stopped, listener: Listener, call: Call, areas: list[Area], source: Source) -> list[Piece]:
    """Replace these areas by hidden memory with the same contents; returns the piece of each, which the caller owns.

    Hidden memory that the VMM has brought itself is mapped again, by its own file, so that it guards itself.

    Nothing is changed before there is memory for all of them.

    Raises:
        OffmapError: it failed, and the VMM has the memory that it had; or has been ended.
    """
    pieces: list[Piece] = []
    try:
        for area in areas:
            pieces.append(_piece(stopped.pid, area, source))
        files = {fd: listener.give_file(call, fd) for fd in {piece.fd for piece in pieces}}
        stopped.interrupt()
        try:
            for area, piece in zip(areas, pieces, strict=True):
                _replace(stopped, area, piece, files[piece.fd])
        finally:
            for fd in files.values():
                stopped.inject(tracing.SYS_close, fd)
    except BaseException:
        for piece in pieces:
            piece.close()
        raise
    return pieces


def _piece(pid: int, area: Area, source: Source) -> Piece:
    if not _hidden(area):
        return source.take(area.end - area.start, area.start)
    if not is_of_a_pool(area.device):
        raise SlotRefused(
            area,
            "the VMM has opened it itself, so it does not guard itself",
            "give the VMM ordinary memory, or a pool's",
        )
    return own_pool_file(pid, area)


def _replace(stopped: Stopped, area: Area, piece: Piece, fd: int) -> None:
    if _hidden(area):
        _map(stopped, area, piece, fd)
        return
    pid, size, here = stopped.pid, piece.size, piece.address
    # Of a file every byte counts, of other memory only what is there.
    whole = [(area.start, area.end)]
    there = whole if area.inode else address_space.populated(pid, area.start, area.end)
    for start, end in there:
        address_space.read_into(pid, start, here + start - area.start, end - start)
    # What is zeroed is guest memory that would otherwise be freed as it is. A private file's own pages stay its own.
    private_file = area.inode and not area.shared
    zeroed = address_space.populated(pid, area.start, area.end, address_space.OWN) if private_file else there
    for start, end in zeroed:
        address_space.zero(pid, start, end)
    if area.shared:
        stopped.inject(tracing.SYS_madvise, area.start, size, mmap.MADV_REMOVE)  # else its file would keep the pages
    try:
        _map(stopped, area, piece, fd)
    except OffmapError:
        for start, end in zeroed:
            address_space.write_from(pid, start, here + start - area.start, end - start)
        raise


def _map(stopped: Stopped, area: Area, piece: Piece, fd: int) -> None:
    flags = mmap.MAP_SHARED | _MAP_FIXED
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if area.perms[1] == "w" else 0)
    at = stopped.inject(tracing.SYS_mmap, area.start, piece.size, protection, flags, fd, piece.offset)
    if at != area.start:
        name = errno.errorcode.get(-at, str(at))
        raise OffmapError("the VMM could not map hidden memory", "see docs/wrap.md", why=f"mmap: {name}")
