"""A VM of the host's, as the attacker sees it: KVM's structures, the guest's memory by way of the VMM's page tables."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from offmap.attack.host import Host
from offmap.attack.linux import Lost, Process
from offmap.attack.page_cache import pages_of
from offmap.attack.primitive import NotMapped, Unreadable
from offmap.attack.vma import vma_at
from offmap.audit import xarray
from offmap.audit.intervals import Ints
from offmap.audit.kernel_list import links
from offmap.audit.kvm_slots import Memslot, generations_of, slots_of
from offmap.audit.mappings import KernelMappings, covered
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_VM, _VCPU = "kvm-vm", "kvm-vcpu:"  # the names that KVM gives its files (virt/kvm/kvm_main.c)
_MOST_VMS = 1 << 16
_NONE = np.zeros(0, dtype=np.int64)


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
class Pages:
    """The pages of guest RAM that the host has, as page numbers.

    Attributes:
        guest, host: pairs. A guest page stands there twice if it was found at two places.
        missing: pages of guest RAM that neither the VMM's page tables nor a guest_memfd have.
        doubtful: pages that the VMM's page tables do not have, and that Linux may keep elsewhere.
        nested: pages that KVM's own page tables have.
        astray: of these, those that lead to a host page that nothing else has for that guest page.
    """

    guest: Ints
    host: Ints
    missing: int
    doubtful: int
    nested: int
    astray: int


def find_vm(host: Host, vmm: Process) -> tuple[int, int]:
    """Address of the ``struct kvm`` that this process made, and how many VMs there are beside it.

    What the process has open leads to one. From there KVM's own list leads to all of them.

    Raises:
        Lost: there is none, or more than one with memory.
        Unknown: KVM's list is being changed.
    """
    open_one = next(_opened(host, vmm), 0)
    if not open_one:
        raise Lost(f"process {vmm.pid} ({vmm.name}) has no VM")
    own, listed = [], 0
    for kvm in _listed(host, open_one):
        listed += 1
        with suppress(NotMapped, Unreadable):  # the head of the list is no VM
            if host.field(kvm, "kvm", "mm") == vmm.memory and host.field(kvm, "kvm", "nr_memslot_pages"):
                own.append(kvm)
    if len(own) != 1:
        raise Lost(f"process {vmm.pid} ({vmm.name}) has {len(own)} VMs with memory, not one")
    return own[0], listed - 2


def _opened(host: Host, vmm: Process) -> Iterator[int]:
    """The VMs that this process made and has open, or a vCPU of them."""
    for file in host.files(vmm):
        if file.name == _VM or file.name.startswith(_VCPU):
            kvm = host.pointer_in(file.file, "file", "private_data")
            if file.name != _VM:
                kvm = host.pointer_in(kvm, "kvm_vcpu", "kvm")
            if host.field(kvm, "kvm", "mm") == vmm.memory:
                yield kvm


def _listed(host: Host, kvm: int) -> Iterator[int]:
    """All that is on KVM's list (``vm_list``), from one VM on; among it where the head would be, were it a VM."""
    offset = host.kernel.offset("kvm", "vm_list")
    yield kvm
    for at in links(host.read, kvm + offset, _MOST_VMS):
        yield at - offset


def read_slots(host: Host, kvm: int) -> list[Memslot]:
    """The memory slots of a VM, all address spaces, each once; not KVM's own.

    Raises:
        Lost: they do not add up.
        Unknown: they are no slots, or are being changed.
    """
    found, total = [], 0
    generations = generations_of(host.read, host.kernel, kvm)
    for active, _ in generations:
        for slot in slots_of(host.read, host.kernel, active) if active else ():
            total += slot.bytes // PAGE_SIZE
            if not slot.of_kvm:
                found.append(slot)
    if total != host.field(kvm, "kvm", "nr_memslot_pages"):
        raise Lost("KVM's memory slots do not add up to the pages that it counts")
    if generations_of(host.read, host.kernel, kvm) != generations:
        raise Lost("KVM's memory slots are being changed")
    if not found:
        raise Lost("the VM has no memory slots")
    return sorted(dict.fromkeys(found), key=lambda slot: slot.gpa)


class GuestMemory:
    """The guest's physical memory, through whatever mapping of it the host kernel has.

    Args:
        host: with its direct map found.
        vmm: the VMM's process.
        slots: the VM's.

    Raises:
        Lost: the VMM has no page tables where they should be.
    """

    def __init__(self, host: Host, vmm: Process, slots: list[Memslot]) -> None:
        self._host, self._vmm, self.slots = host, vmm, slots
        self.table = host.top_table(vmm.memory)
        self._known: dict[int, int] = {}  # page of the guest: page of the host
        self._files: dict[Memslot, dict[int, int]] = {}  # of those that have a guest_memfd
        self._mappings: KernelMappings | None = None
        self._mapped = _NONE, _NONE  # pages of the guest that are mapped, and the host's for each
        self.by_user: set[int] = set()  # pages of the guest that only the VMM's own mapping led to

    def place(self, gpa: int) -> int:
        """The host-physical address behind a guest-physical one. Raises NotThere: it has none now."""
        page = gpa >> PAGE_SHIFT
        if page not in self._known:
            slot = self._slot(gpa)
            hva = slot.hva + gpa - slot.gpa
            private = self._of_file(slot)
            if (index := gpa - slot.gpa >> PAGE_SHIFT) in private:
                self._known[page] = private[index]
            elif (leaf := self._host.leaf(self.table, hva)) is not None:
                self._known[page] = leaf.pa + (hva - leaf.va) >> PAGE_SHIFT
            else:
                raise NotThere(f"the VMM's page tables have no page for guest address {gpa:#x}")
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
        """Where the VMM has it; raises as ``_slot``."""
        slot = self._slot(gpa)
        return slot.hva + gpa - slot.gpa

    def _slot(self, gpa: int) -> Memslot:
        """The slot that has it. Raises NotThere: it is in none."""
        slot = next((slot for slot in self.slots if slot.gpa <= gpa < slot.gpa + slot.bytes), None)
        if slot is None:
            raise NotThere(f"guest address {gpa:#x} is in no memory slot")
        return slot

    def _aliases_of(self, pa: int) -> list[int]:
        return [] if self._mappings is None else self._mappings.addresses_of(pa)

    def _of_file(self, slot: Memslot) -> dict[int, int]:
        """The pages that a slot's guest_memfd has: the host's for each page of the slot, in order."""
        if slot not in self._files:
            self._files[slot] = dict(self._file_pages(slot)) if slot.guest_memfd else {}
        return self._files[slot]

    def _file_pages(self, slot: Memslot) -> Iterator[tuple[int, int]]:
        if not slot.file:
            raise Lost("the guest_memfd of a memory slot was closed, so that its pages cannot be found")
        inode = self._host.pointer_in(slot.file, "file", "f_inode")
        mapping = self._host.pointer_in(inode, "inode", "i_mapping")
        for number, pa in pages_of(self._host, mapping):
            index = number - (slot.offset >> PAGE_SHIFT)
            if 0 <= index < slot.bytes >> PAGE_SHIFT:
                yield index, pa >> PAGE_SHIFT

    def pages(self, roots: Iterable[tuple[int, int]]) -> Pages:
        """All pages of the guest's that the host has now.

        Args:
            roots: of KVM's own page tables for this guest (`nested_roots`).

        Raises:
            Lost: what backs a page that is missing cannot be told.
        """
        self._files.clear()
        guest, host = [_NONE], [_NONE]
        missing = doubtful = nested = astray = 0
        roots = list(roots)
        for slot in self.slots:
            first, count = slot.gpa >> PAGE_SHIFT, slot.bytes >> PAGE_SHIFT
            private = self._of_file(slot)
            of_file = np.array(list(private), dtype=np.int64), np.array(list(private.values()), dtype=np.int64)
            of_vmm = self._mapped_by(self.table, None, slot.hva, slot.bytes)
            there = np.zeros(count, dtype=np.bool_)
            there[of_vmm[0]] = True
            doubtful += self._doubtful(slot, np.flatnonzero(~there))
            there[of_file[0]] = True
            missing += int(count - there.sum())
            other = _found(of_vmm, of_file[0]) != of_file[1]
            found = [of_vmm, (of_file[0][other], of_file[1][other])]
            for root, levels in roots:
                index, frame = self._mapped_by(root, levels, slot.gpa, slot.bytes)
                stray = (_found(of_vmm, index) != frame) & (_found(of_file, index) != frame)
                nested, astray = nested + len(index), astray + int(stray.sum())
                found.append((index[stray], frame[stray]))
            guest += [index + first for index, _ in found]
            host += [frame for _, frame in found]
        return Pages(np.concatenate(guest), np.concatenate(host), missing, doubtful, nested, astray)

    def _mapped_by(self, table: int, levels: int | None, start: int, size: int) -> tuple[Ints, Ints]:
        """What page tables have of a stretch of addresses: pages from its start on, in order; the host's for each."""
        index, frame = [_NONE], [_NONE]
        for bytes_, va, entry in self._host.leaf_entries(table, start, start + size, levels):
            within = np.arange(bytes_ >> PAGE_SHIFT, dtype=np.int64)
            pa = (entry & np.uint64(self._host.mask & -bytes_)).astype(np.int64)
            index.append(((va - start >> PAGE_SHIFT)[:, None] + within).reshape(-1))
            frame.append(((pa >> PAGE_SHIFT)[:, None] + within).reshape(-1))
        pages, frames = np.concatenate(index), np.concatenate(frame)
        ours = (pages >= 0) & (pages < size >> PAGE_SHIFT)
        return pages[ours], frames[ours]

    def _doubtful(self, slot: Memslot, gone: Ints) -> int:
        """How many of these pages of a slot, which the VMM's page tables do not have, Linux may keep elsewhere."""
        doubtful = 0
        inode = self._host.pointer_in(slot.file, "file", "f_inode") if slot.guest_memfd else 0
        while len(gone):
            va = slot.hva + (int(gone[0]) << PAGE_SHIFT)
            vma = vma_at(self._host, self._vmm.memory, va)
            if vma is None:
                raise Lost(f"the VMM has nothing at {va:#x}, where a memory slot is")
            within = int(np.searchsorted(gone, (vma.end - slot.hva) >> PAGE_SHIFT))
            # The pages of a guest_memfd were all found; Linux does not swap them out.
            doubtful += 0 if vma.own or (inode and vma.inode == inode) else within
            gone = gone[within:]
        return doubtful

    def use_aliases(self, mappings: KernelMappings, pages: Pages) -> tuple[int, int]:
        """Read by any of these mappings from now on.

        Returns:
            How many pages these are, and how many of them are mapped.
        """
        self._mappings = mappings
        mapped = covered(mappings.runs, pages.host.astype(np.uint64))
        self._mapped = pages.guest[mapped], pages.host[mapped]
        return len(pages.host), int(mapped.sum())

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
    """Addresses of the ``struct kvm_vcpu`` of a VM's. Raises Unknown: they are being changed."""
    array = kvm + host.kernel.offset("kvm", "vcpu_array")
    _, _, found = xarray.entries(host.read, host.kernel, array)
    return [int(each) for each in found.tolist()]


def nested_roots(host: Host, kvm: int) -> list[tuple[int, int]]:
    """The top tables of KVM's own page tables for a guest: physical address and levels, each once.

    Raises:
        Lost: they are not where they should be.
    """
    found: dict[tuple[int, int], None] = {}
    for vcpu in vcpus(host, kvm):
        root = host.field(vcpu, "kvm_vcpu", "arch", "root_mmu", "root", "hpa")
        level = host.field(vcpu, "kvm_vcpu", "arch", "root_mmu", "root_role", "word", size=4) & 15
        if root == (1 << 64) - 1:  # INVALID_PAGE
            continue
        if root % PAGE_SIZE or level not in {4, 5}:
            raise Lost("the root of the nested page tables is not where it should be")
        found[root & host.mask, level] = None
    return list(found)


def nested_place(host: Host, kvm: int, gpa: int) -> int | None:
    """The host-physical address that KVM's own page tables have for a guest-physical one; None if they have none now.

    Raises:
        Lost: there are no such tables.
    """
    for root, level in nested_roots(host, kvm):
        leaf = host.leaf_of(root, level, gpa)
        if leaf is not None:
            return leaf.pa + gpa - leaf.va
    return None


def _found(pages: tuple[Ints, Ints], wanted: Ints) -> Ints:
    """The host's page for each of these pages, -1 where there is none, in what ``_mapped_by`` found."""
    index, frame = pages
    if not len(index):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(index, wanted), len(index) - 1)
    return np.where(index[at] == wanted, frame[at], -1)
