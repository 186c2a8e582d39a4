"""A VM of the host's, as the attacker sees it: KVM's structures, the guest's memory by way of the VMM's page tables."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from offmap.attack.host import Host
from offmap.attack.linux import Lost, Process
from offmap.attack.primitive import NotMapped, Unreadable
from offmap.attack.vma import vma_at
from offmap.audit import xarray
from offmap.audit.intervals import Ints
from offmap.audit.mappings import KernelMappings, covered
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_MOST_SLOTS = 32767  # KVM_MEM_SLOTS_NUM
_OF_KVM = _MOST_SLOTS - 3  # KVM_USER_MEM_SLOTS: from there on they are KVM's own
_KVM_MEMSLOT_INVALID = 1 << 16  # include/linux/kvm_host.h
_KVM_MEM_GUEST_MEMFD = 1 << 2  # include/uapi/linux/kvm.h
_FILE = "kvm-vm"  # the name that KVM gives a VM's file (virt/kvm/kvm_main.c)


class Hidden(Exception):
    """The host's page tables map a page of the guest's nowhere that the attacker knows of.

    Attributes:
        gpa: its guest-physical address.
        pa: its host-physical address.
    """

    def __init__(self, gpa: int, pa: int) -> None:
        self.gpa, self.pa = gpa, pa
        super().__init__(f"guest page {gpa:#x}, which is host page {pa:#x}, is not mapped")


class Reached(Exception):
    """A mapping of the kernel's leads to a page of the guest's, and this primitive cannot read it."""

    def __init__(self, gpa: int, va: int) -> None:
        super().__init__(f"guest page {gpa:#x} is mapped at kernel address {va:#x}, where this primitive cannot read")


class NotThere(Exception):
    """The VMM's page tables have no page there now."""


@dataclass(frozen=True)
class Slot:
    """A memory slot: where the guest has it, where the VMM has it, its bytes."""

    gpa: int
    hva: int
    bytes: int
    guest_memfd: bool


def find_vm(host: Host, vmm: Process) -> int:
    """Address of the ``struct kvm`` that this process has open, and made.

    Raises:
        Lost: there is none, or more than one has memory.
    """
    found = []
    for file in host.files(vmm):
        if file.name == _FILE:
            kvm = host.pointer_in(file.file, "file", "private_data")
            if host.field(kvm, "kvm", "mm") == vmm.memory and kvm not in found:
                found.append(kvm)
    with_memory = [kvm for kvm in found if host.field(kvm, "kvm", "nr_memslot_pages")]
    if len(with_memory) != 1:
        raise Lost(f"process {vmm.pid} ({vmm.name}) has {len(with_memory)} VMs with memory, not one")
    return with_memory[0]


def read_slots(host: Host, kvm: int) -> list[Slot]:
    """The memory slots of a VM, all address spaces, each once; not KVM's own.

    Raises:
        Lost: they do not add up.
    """
    kernel, found, total = host.kernel, [], 0
    spaces = kernel.elements("kvm", "memslots")
    pointers = host.read(kvm + kernel.offset("kvm", "memslots"), 8 * spaces)
    for active in struct.unpack(f"<{spaces}Q", pointers):
        for number, slot in _slots(host, active) if active else ():
            total += slot.bytes // PAGE_SIZE
            if number < _OF_KVM:
                found.append(slot)
    if total != host.field(kvm, "kvm", "nr_memslot_pages"):
        raise Lost("KVM's memory slots do not add up to the pages that it counts")
    if not found:
        raise Lost("the VM has no memory slots")
    return sorted(dict.fromkeys(found), key=lambda slot: slot.gpa)


def _slots(host: Host, active: int) -> Iterator[tuple[int, Slot]]:
    kernel = host.kernel
    node = host.field(active, "kvm_memslots", "node_idx", size=4)
    if node >= kernel.elements("kvm_memory_slot", "id_node"):
        raise Lost(f"kvm_memslots.node_idx cannot be {node}")
    offset = kernel.offset("kvm_memory_slot", "id_node") + 16 * node  # struct hlist_node
    buckets = kernel.elements("kvm_memslots", "id_hash")
    heads = host.read(active + kernel.offset("kvm_memslots", "id_hash"), 8 * buckets)
    seen = 0
    for (head,) in struct.iter_unpack("<Q", heads):
        at = head
        while at:
            seen += 1
            if seen > _MOST_SLOTS:
                raise Lost("KVM's memory slots do not end")
            yield _slot(host, at - offset)
            at = int.from_bytes(host.read(at), "little")


def _slot(host: Host, at: int) -> tuple[int, Slot]:
    gfn, pages, hva = (host.field(at, "kvm_memory_slot", name) for name in ("base_gfn", "npages", "userspace_addr"))
    flags = host.field(at, "kvm_memory_slot", "flags", size=4)
    number = host.field(at, "kvm_memory_slot", "id", size=2)
    if flags & _KVM_MEMSLOT_INVALID or not 0 < pages < 1 << 40 or gfn >= 1 << 40 or hva % PAGE_SIZE or hva >> 56:
        raise Lost("a memory slot of KVM's is not what it should be, or being changed")
    return number, Slot(gfn << PAGE_SHIFT, hva, pages << PAGE_SHIFT, bool(flags & _KVM_MEM_GUEST_MEMFD))


class GuestMemory:
    """The guest's physical memory, through whatever mapping of it the host kernel has.

    Args:
        host: with its direct map found.
        vmm: the VMM's process.
        slots: the VM's.

    Raises:
        Lost: the VMM has no page tables where they should be.
    """

    def __init__(self, host: Host, vmm: Process, slots: list[Slot]) -> None:
        self._host, self._vmm, self.slots = host, vmm, slots
        self.table = host.top_table(vmm.memory)
        self._known: dict[int, int] = {}  # page of the guest: page of the host
        self._mappings: KernelMappings | None = None
        none = np.zeros(0, dtype=np.int64)
        self._mapped = none, none  # pages of the guest that are mapped, and the host's for each
        self.by_user: set[int] = set()  # pages of the guest that only the VMM's own mapping led to

    def place(self, gpa: int) -> int:
        """The host-physical address behind a guest-physical one.

        Raises:
            NotThere: it has none now.
        """
        page = gpa >> PAGE_SHIFT
        if page not in self._known:
            hva = self._hva(gpa)
            leaf = self._host.leaf(self.table, hva)
            if leaf is None:
                raise NotThere(f"the VMM's page tables have no page for guest address {gpa:#x}")
            self._known[page] = leaf.pa + (hva - leaf.va) >> PAGE_SHIFT
        return self._known[page] << PAGE_SHIFT | gpa % PAGE_SIZE

    def read(self, gpa: int, size: int = 8) -> bytes:
        """Bytes of the guest's.

        Raises:
            Hidden: a page of them is mapped nowhere that is known.
            NotThere: a page of them is not there.
        """
        parts = []
        while size > 0:
            step = min(size, PAGE_SIZE - gpa % PAGE_SIZE)
            parts.append(self._within(gpa, step))
            gpa, size = gpa + step, size - step
        return b"".join(parts)

    def _within(self, gpa: int, size: int) -> bytes:
        pa = self.place(gpa)
        for va in (self._host.direct_map + pa, *self._aliases_of(pa)):
            try:
                return self._host.read(va, size)
            except NotMapped:
                continue
            except Unreadable:
                raise Reached(gpa, va) from None
        try:
            data = self._host.read_user(self._vmm, self._hva(gpa), size)
        except NotMapped:
            raise Hidden(gpa, pa) from None
        self.by_user.add(gpa >> PAGE_SHIFT)
        return data

    def _hva(self, gpa: int) -> int:
        """Where the VMM has it.

        Raises:
            NotThere: it is in no slot.
        """
        slot = next((slot for slot in self.slots if slot.gpa <= gpa < slot.gpa + slot.bytes), None)
        if slot is None:
            raise NotThere(f"guest address {gpa:#x} is in no memory slot")
        return slot.hva + gpa - slot.gpa

    def _aliases_of(self, pa: int) -> list[int]:
        return [] if self._mappings is None else self._mappings.addresses_of(pa)

    def frames(self) -> tuple[Ints, Ints]:
        """All pages of the guest's that the VMM's page tables have: guest pages, host pages."""
        guest, host = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for slot in self.slots:
            end = slot.hva + slot.bytes
            for size, va, entry in self._host.leaf_entries(self.table, slot.hva, end):
                within = np.arange(size >> PAGE_SHIFT, dtype=np.int64)
                pa = (entry & np.uint64(self._host.mask & -size)).astype(np.int64)
                pages = ((va >> PAGE_SHIFT)[:, None] + within).reshape(-1)
                frames = ((pa >> PAGE_SHIFT)[:, None] + within).reshape(-1)
                ours = (pages >= slot.hva >> PAGE_SHIFT) & (pages < end >> PAGE_SHIFT)
                guest.append(pages[ours] + (slot.gpa - slot.hva >> PAGE_SHIFT))
                host.append(frames[ours])
        return np.concatenate(guest), np.concatenate(host)

    def missing(self, guest: Ints) -> tuple[int, int]:
        """How many pages of guest RAM the VMM's page tables do not have; and how many of these may hold something.

        Args:
            guest: those that they have.

        Raises:
            Lost: what backs them cannot be told.
        """
        missing = doubtful = 0
        for slot in self.slots:
            first, count = slot.gpa >> PAGE_SHIFT, slot.bytes >> PAGE_SHIFT
            there = np.zeros(count, dtype=np.bool_)
            there[guest[(guest >= first) & (guest < first + count)] - first] = True
            gone = np.flatnonzero(~there)
            missing += len(gone)
            if slot.guest_memfd:
                doubtful += len(gone)
                continue
            while len(gone):
                va = slot.hva + (int(gone[0]) << PAGE_SHIFT)
                vma = vma_at(self._host, self._vmm.memory, va)
                if vma is None:
                    raise Lost(f"the VMM has nothing at {va:#x}, where a memory slot is")
                within = int(np.searchsorted(gone, (vma.end - slot.hva) >> PAGE_SHIFT))
                doubtful += 0 if vma.own else within
                gone = gone[within:]
        return missing, doubtful

    def use_aliases(self, mappings: KernelMappings, guest: Ints, host: Ints) -> int:
        """Read by any of these mappings from now on.

        Args:
            guest, host: the guest's pages, as ``frames`` gives them.

        Returns:
            How many of them are mapped.
        """
        self._mappings = mappings
        mapped = covered(mappings.runs, host.astype(np.uint64))
        self._mapped = guest[mapped], host[mapped]
        return int(mapped.sum())

    def mapped(self) -> Iterator[tuple[int, bytes]]:
        """The pages that ``use_aliases`` found mapped: guest-physical address, content.

        Raises:
            Reached: one cannot be read.
            Hidden: one is mapped no more.
        """
        for page, frame in zip(*(part.tolist() for part in self._mapped), strict=True):
            gpa, pa = page << PAGE_SHIFT, frame << PAGE_SHIFT
            for va in self._aliases_of(pa):
                try:
                    yield gpa, self._host.read(va, PAGE_SIZE)
                    break
                except Unreadable:
                    raise Reached(gpa, va) from None
                except NotMapped:
                    continue
            else:
                raise Hidden(gpa, pa)


def vcpus(host: Host, kvm: int) -> list[int]:
    """Addresses of the ``struct kvm_vcpu`` of a VM's.

    Raises:
        Unknown: they are being changed.
    """
    array = kvm + host.kernel.offset("kvm", "vcpu_array")
    _, _, found = xarray.entries(host.read, host.kernel, array)
    return [int(each) for each in found.tolist()]


def nested_place(host: Host, kvm: int, gpa: int) -> int | None:
    """The host-physical address that KVM's own page tables have for a guest-physical one; None if they have none now.

    Raises:
        Lost: there are no such tables.
    """
    for vcpu in vcpus(host, kvm):
        root = host.field(vcpu, "kvm_vcpu", "arch", "root_mmu", "root", "hpa")
        level = host.field(vcpu, "kvm_vcpu", "arch", "root_mmu", "root_role", "word", size=4) & 15
        if root == (1 << 64) - 1:  # INVALID_PAGE
            continue
        if root % PAGE_SIZE or level not in {4, 5}:
            raise Lost("the root of the nested page tables is not where it should be")
        leaf = host.leaf_of(root & host.mask, level, gpa)
        return None if leaf is None else leaf.pa + gpa - leaf.va
    return None
