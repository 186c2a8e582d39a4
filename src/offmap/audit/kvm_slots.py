"""A VM's memory slots as KVM keeps them (``struct kvm_memslots``, ``include/linux/kvm_host.h``, Linux 5.17 and later).

The audit reads them by /proc/kcore, the attack by its primitive: both say how kernel memory is read. KVM raises the
generation of a set of slots at each change, so slots are believed if it is the same before and after.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from offmap.audit.btf import Unknown
from offmap.audit.xarray import Read, Types
from offmap.uapi.page import PAGE_SIZE

_MOST_SLOTS = 32767  # KVM_MEM_SLOTS_NUM, SHRT_MAX
_OF_KVM = _MOST_SLOTS - 3  # KVM_USER_MEM_SLOTS: from there on they are KVM's own (APIC access page, TSS, identity map)
_KVM_MEM_READONLY = 1 << 1  # include/uapi/linux/kvm.h
_KVM_MEM_GUEST_MEMFD = 1 << 2  # the same
_KVM_MEMSLOT_INVALID = 1 << 16  # include/linux/kvm_host.h: being deleted or moved
_UPDATE_IN_PROGRESS = 1 << 63  # KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS


@dataclass(frozen=True)
class Memslot:
    """One ``struct kvm_memory_slot``: where the guest and where the VMM has it, in bytes.

    Attributes:
        of_kvm: it is one of KVM's own, and no guest RAM.
        read_only: the guest cannot write to it.
        guest_memfd: it has a guest_memfd: ``file`` is the address of its ``struct file`` (0: closed), ``offset`` where
            the slot begins in it, in bytes.
    """

    gpa: int
    hva: int
    bytes: int
    of_kvm: bool
    read_only: bool
    guest_memfd: bool
    file: int = 0
    offset: int = 0


def generations_of(read: Read, types: Types, kvm: int) -> tuple[tuple[int, int], ...]:
    """(address of the active set of slots, its generation) of each address space of a ``struct kvm``.

    Raises:
        Unknown: they are being changed.
    """
    spaces, found = types.elements("kvm", "memslots"), []
    for active in struct.unpack(f"<{spaces}Q", read(kvm + types.offset("kvm", "memslots"), 8 * spaces)):
        generation = _number(read, active + types.offset("kvm_memslots", "generation"), 8) if active else 0
        if generation & _UPDATE_IN_PROGRESS:
            raise Unknown("KVM's slots are being changed")
        found.append((active, generation))
    return tuple(found)


def slots_of(read: Read, types: Types, active: int) -> Iterator[Memslot]:
    """Each slot of a set. Raises Unknown: they are no slots, or are being changed."""
    node = _number(read, active + types.offset("kvm_memslots", "node_idx"), 4)
    if node >= types.elements("kvm_memory_slot", "id_node"):
        raise Unknown("KVM's slots are not as expected")
    buckets = types.elements("kvm_memslots", "id_hash")
    offset = types.offset("kvm_memory_slot", "id_node") + 16 * node  # struct hlist_node: next, pprev
    seen: set[int] = set()
    for (at,) in struct.iter_unpack("<Q", read(active + types.offset("kvm_memslots", "id_hash"), 8 * buckets)):
        while at:
            if at in seen:
                raise Unknown("KVM's slots do not end")
            seen.add(at)
            yield _slot(read, types, at - offset)
            at = _number(read, at, 8)  # noqa: PLW2901 - along the bucket


def _slot(read: Read, types: Types, at: int) -> Memslot:
    def field(*members: str, size: int = 8) -> int:
        return _number(read, at + types.offset("kvm_memory_slot", *members), size)

    first, pages, where = field("base_gfn"), field("npages"), field("userspace_addr")
    flags, number = field("flags", size=4), field("id", size=2)
    fits = 0 < pages < 1 << 40 and first < 1 << 40 and not where % PAGE_SIZE and not where >> 56
    if not fits or flags & _KVM_MEMSLOT_INVALID:
        raise Unknown("KVM's slots are being changed")
    guest_memfd, file, offset = bool(flags & _KVM_MEM_GUEST_MEMFD), 0, 0
    if guest_memfd:
        file, offset = field("gmem", "file"), field("gmem", "pgoff") * PAGE_SIZE
    return Memslot(
        first * PAGE_SIZE,
        where,
        pages * PAGE_SIZE,
        number >= _OF_KVM,
        bool(flags & _KVM_MEM_READONLY),
        guest_memfd,
        file,
        offset,
    )


def _number(read: Read, at: int, size: int) -> int:
    return int.from_bytes(read(at, size), "little")
