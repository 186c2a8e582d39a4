"""All VMs of this host, as KVM itself lists them (``vm_list``), with their memory slots and virtual processors.

No interface of the kernel shows that list, so it is read from the kernel's memory, with the offsets of its BTF and that
of kvm.ko (``include/linux/kvm_host.h``, Linux 5.17 and later). No VM can keep itself off it, whoever holds its
descriptors. The kernel goes on working meanwhile. So each link of a list is checked both ways, and slots are believed
if their generation is the same before and after: KVM raises it at each change. What cannot be read is ``Unknown``,
which is never an empty list.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from offmap.audit import xarray
from offmap.audit.btf import Btf, Unknown
from offmap.audit.intervals import Ints
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_list import links
from offmap.audit.kernel_objects import KernelObjects, module_symbol, symbol
from offmap.audit.kvm_btf import kvm_types, vendor_types
from offmap.audit.kvm_caches import KvmCaches
from offmap.audit.kvm_slots import generations_of, slots_of
from offmap.audit.kvm_vcpu import VCpu, vcpu_at
from offmap.audit.procfs import SYSFS_MAGIC, file_system, read_path
from offmap.audit.regions import VMALLOC, Layout
from offmap.uapi.page import PAGE_SIZE

_MODULES = Path("/sys/module")
_ATTEMPTS = 16
# What came last of all that is read here, with Linux 5.17 and 6.1.
_NEWEST = (("kvm_memslots", "id_hash"), ("kvm", "mmu_invalidate_seq"))
_MOST_VMS = 1 << 16

_T = TypeVar("_T")


@dataclass(frozen=True)
class GuestMemfd:
    """The part of a guest_memfd that a slot has: the kernel address of its ``struct file`` (0: closed), its inode
    number, where the slot begins in it, in bytes, and its device as /proc/PID/maps has it (``00:0f``)."""

    file: int
    inode: int
    offset: int
    device: str = ""


@dataclass(frozen=True)
class KvmSlot:
    """One memory slot: where the guest and where the VMM has it.

    ``read_only``: the guest cannot write to it. ``guest_memfd``: where the guest's private pages are.
    """

    guest_phys_addr: int
    userspace_addr: int
    bytes: int
    read_only: bool
    guest_memfd: GuestMemfd | None = None


@dataclass(frozen=True)
class Vm:
    """One VM, at one moment.

    Attributes:
        address: of its ``struct kvm``.
        memory: kernel address of the address space that it was made by, and that alone can run it.
        label: what KVM calls it (``kvm-PID``, the thread that made it).
        generations: of its slots, for each address space; they differ after any change.
        slots: all but KVM's own, of all address spaces, each once.
        intact: no slot was ever taken away, moved or changed since the VM was made.
        changed: when its slots were last changed, at the latest; CLOCK_MONOTONIC, in nanoseconds.
        made: when it was made; the same clock. None if that is not told.
        invalidations: how often memory under its slots was unmapped or moved by the VMM or the kernel.
        vcpus: its virtual processors.
        caches: guest-physical addresses of pages that KVM keeps a kernel mapping of (``gfn_to_pfn_cache``).
        clocks: those of them at which a virtual processor's kvm-clock is.
        once_mapped: members of KVM's structures that have been such a cache, and hold no mapping now.
    """

    address: int
    memory: int
    label: str
    generations: tuple[tuple[int, int], ...]
    slots: tuple[KvmSlot, ...] = field(repr=False)
    intact: bool
    changed: int
    invalidations: int
    vcpus: tuple[VCpu, ...]
    caches: tuple[int, ...]
    made: int | None = field(default=None, compare=False)
    clocks: tuple[int, ...] = ()
    once_mapped: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[int, int, str]:
        """What no VM has that is made later, but by the same thread."""
        return self.address, self.memory, self.label

    def made_since(self, moment: int) -> bool:
        """Whether it may have been made since this moment (CLOCK_MONOTONIC, nanoseconds)."""
        return (self.changed if self.made is None else self.made) >= moment

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why its RAM cannot be called hidden, whatever the page tables show at a moment."""
        found = [f"KVM keeps a kernel mapping of the guest's page at {page:#x}" for page in self.caches]
        found += [
            f"KVM once had a kernel mapping of a page of the guest ({name}), and may have it again for a moment"
            for name in self.once_mapped
        ]
        found += [f"vCPU {vcpu.number} {doubt}" for vcpu in self.vcpus for doubt in vcpu.doubts]
        if any(slot.guest_memfd is not None and not slot.guest_memfd.file for slot in self.slots):
            found.append("the guest_memfd of a memory slot was closed, so that its pages cannot be found")
        return tuple(found)


def _loaded() -> bool:
    """Whether KVM is, or may be: a module is in /proc/modules, and one that is built in in the kernel's own sysfs."""
    try:
        if b"\nkvm " in b"\n" + read_path("/proc/modules"):
            return True
        fd = os.open(_MODULES, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return file_system(fd) != SYSFS_MAGIC or os.access("kvm", os.F_OK, dir_fd=fd)
    finally:
        os.close(fd)


class KvmList(KvmCaches):
    """Reads KVM's list through an open kcore.

    Raises:
        Unknown: this kernel has no BTF of its KVM or is too old, or this process does not see PIDs as the kernel does.
    """

    # struct kvm is in the vmalloc space, all of each.
    _readable = (*KernelObjects._readable, {VMALLOC})

    def __init__(self, kcore: Kcore, layout: Layout, btf: Btf | None = None) -> None:
        super().__init__(kcore, layout, kvm_types() if btf is None else btf)
        if _loaded():
            for member in _NEWEST:
                self._btf.offset(*member)
            with suppress(Unknown):  # who needs it asks again; the kernel's own symbols are found by the same reading
                module_symbol("vm_list", "kvm")

    def vms(self) -> list[Vm]:
        """All VMs there are. One that begins or ends meanwhile may be among them or not; no other is missing.

        Raises:
            Unknown: the list, or a VM that stays on it, cannot be read.
        """
        return self._read_all(self.addresses())

    def of_memory(self, memory: int) -> list[Vm]:
        """The VMs that this address space made; raises as ``vms``. Others need not be readable."""
        addresses = [at for at in self.addresses() if self._owner(at) in {memory, None}]
        return [vm for vm in self._read_all(addresses) if vm.memory == memory]

    def _read_all(self, addresses: list[int]) -> list[Vm]:
        once: dict[int, Vm] = {}
        for address in addresses:
            with suppress(Unknown):
                once[address] = self._read_vm(address)
        # Only what is on the list afterwards too was a VM all the time.
        left = set(self.addresses()) if addresses else set()
        found = []
        for address in addresses:
            if address in left:
                vm = once.get(address) or self.read(address)
                if vm is not None:
                    found.append(vm)
        return found

    def addresses(self) -> list[int]:
        """Where the ``struct kvm`` of each VM is. Raises Unknown: the list cannot be read."""
        if not _loaded():
            return []
        head, node = module_symbol("vm_list", "kvm"), self._btf.offset("kvm", "vm_list")
        return self._again(lambda: [at - node for at in links(self._read, head, _MOST_VMS)])

    def ended_since(self, moment: int) -> bool:
        """Whether a VM of this host may have ended since this moment (CLOCK_MONOTONIC, nanoseconds).

        A VM that ends leaves the list, is then taken off its address space, for which the kernel waits for a grace
        period (``mmu_notifier_unregister``), and is no more counted as one that uses the processor's virtualization at
        last (``kvm_destroy_vm``). So these are read in this order.
        """
        for _ in range(_ATTEMPTS):
            try:
                listed = len(self.addresses())
                using = self._number(module_symbol("kvm_usage_count", "kvm"), 4)
                with suppress(Unknown):  # since 6.12 one is counted from the module's start on
                    using -= self._number(module_symbol("enable_virt_at_load", "kvm"), 1)
                if using == listed:
                    return self._last_grace_period(symbol("srcu")) >= moment
            except Unknown:
                return True
            time.sleep(0.001)  # one is being made, or ends
        return True

    def debugfs_folders(self) -> set[int]:
        """Inode numbers of the folders in debugfs of the VMs that are listed; raises as ``addresses``.

        A VM has none where another has the name, and in a kernel without debugfs.
        """
        found = set()
        for address in self.addresses():
            with suppress(Unknown):  # it ended meanwhile, or has no folder
                found.add(self._field(self._folder(address), "inode", "i_ino"))
        return found

    def read(self, address: int) -> Vm | None:
        """The VM whose ``struct kvm`` is there; None if it has ended.

        Raises:
            Unknown: it cannot be read, though it is on KVM's list.
        """
        for attempt in range(_ATTEMPTS):
            try:
                vm = self._read_vm(address)
            except Unknown:
                if attempt == _ATTEMPTS - 1 and address in self.addresses():
                    raise
                vm = None
            # Only what stood on the list afterwards too was a VM all the time.
            if address not in self.addresses():
                return None
            if vm is not None and self._owner(address) == vm.memory:
                return vm
            time.sleep(0)  # whoever changes it goes on meanwhile
        raise Unknown("a VM kept changing while it was read")

    def changed(self, vm: Vm) -> bool:
        """Whether the slots of a VM, or the memory under them, were changed since it was read. Takes a few reads.

        A VM that has ended counts as changed.
        """
        try:
            return (
                self._owner(vm.address) != vm.memory
                or self._generations(vm.address) != vm.generations
                or self._field(vm.address, "kvm", "mmu_invalidate_seq") != vm.invalidations
            )
        except Unknown:
            return True

    def held(self, tid: int, descriptors: Mapping[int, str], task: int = 0) -> set[int]:
        """Addresses of the VMs that these descriptors of a thread lead to, of VMs or of their vCPUs.

        Args:
            descriptors: what the link of each says.
            task: address of the thread's ``struct task_struct``, if it is known.

        Raises:
            Unknown: they cannot be followed.
        """
        table = self._field(self._field(task or self.task_of(tid), "task_struct", "files"), "files_struct", "fdt")
        files, size = self._field(table, "fdtable", "fd"), self._field(table, "fdtable", "max_fds", size=4)
        found = set()
        for number, link in descriptors.items():
            if number >= size:
                raise Unknown(f"process {tid} has no descriptor {number}")
            kvm = self._field(self._pointer(files + 8 * number), "file", "private_data")
            found.add(self._field(kvm, "kvm_vcpu", "kvm") if "vcpu" in link else kvm)
        return found

    def guest_memfd_pages(self, part: GuestMemfd, size: int) -> tuple[Ints, Ints, Ints]:
        """The pages that ``size`` bytes of a guest_memfd have: runs of (page of the part, frame, pages), in order.

        Raises:
            Unknown: they cannot be read.
        """
        if not part.file:
            raise Unknown("its guest_memfd is closed")
        inode = self._field(part.file, "file", "f_inode")
        mapping = self._field(inode, "inode", "i_mapping")
        same = self._inode(part.file) == (part.inode, part.device)
        if not same or self._field(mapping, "address_space", "host") != inode:
            raise Unknown("its guest_memfd is not where KVM said")
        pages = mapping + self._btf.offset("address_space", "i_pages")
        index, count, entry = self._again(lambda: xarray.entries(self._read, self._btf, pages))
        away = entry - np.uint64(self._layout.vmemmap)
        if (entry & np.uint64(1)).any() or (away % np.uint64(self._page_size)).any() or (away >> np.uint64(46)).any():
            raise Unknown("its guest_memfd has entries that are no pages")
        pfn = (away // np.uint64(self._page_size)).astype(np.int64)
        first = part.offset // PAGE_SIZE
        start, end = np.maximum(index, first), np.minimum(index + count, first + size // PAGE_SIZE)
        some = start < end
        return (start - first)[some], (pfn + start - index)[some], (end - start)[some]

    def _again(self, look: Callable[[], _T]) -> _T:
        """What this finds, once it finds something that is not being changed."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return look()
            except Unknown:
                time.sleep(0)
        return look()

    def _owner(self, address: int) -> int | None:
        try:
            return self._field(address, "kvm", "mm")
        except Unknown:
            return None

    def _read_vm(self, address: int) -> Vm:
        memory = self._field(address, "kvm", "mm")
        generations = self._generations(address)
        invalidations = self._field(address, "kvm", "mmu_invalidate_seq")
        changed = self._last_change(address)
        slots, total, updates = [], 0, True
        for space, (active, generation) in enumerate(generations):
            here = list(self._slots(active)) if active else []
            total += sum(pages for _, pages in here)
            slots += [slot for slot, _ in here if slot is not None]
            # Each slot that is made raises the generation once; whatever else is done to one raises it too.
            step = sum(bool(each) for each, _ in generations)
            updates = updates and (not active or generation == space + step * len(here))
        if total != self._field(address, "kvm", "nr_memslot_pages"):
            raise Unknown("KVM's slots do not add up to the pages that it counts")
        caches = dict(self._caches(address))
        vcpus = self._vcpu_addresses(address)
        vm = Vm(
            address,
            memory,
            self._string(address + self._btf.offset("kvm", "stats_id")),
            generations,
            tuple(dict.fromkeys(slots)),
            updates,
            changed,
            invalidations,
            self._vcpus(address),
            tuple(caches.values()),
            self._made(address),
            tuple(caches[at] for at in self._clocks(vcpus) if at in caches),
            tuple(dict.fromkeys(self._once_mapped(address, vcpus, set(caches)))),
        )
        if self._generations(address) != generations or not memory:
            raise Unknown("KVM's slots are being changed")
        return vm

    def _generations(self, address: int) -> tuple[tuple[int, int], ...]:
        """(active set of slots, its generation) of each address space."""
        return generations_of(self._read, self._btf, address)

    def _slots(self, active: int) -> Iterator[tuple[KvmSlot | None, int]]:
        """Each slot of a set, None for those of KVM's own, and its pages."""
        for slot in slots_of(self._read, self._btf, active):
            part = None
            if slot.guest_memfd:
                inode, device = self._inode(slot.file) if slot.file else (0, "")
                part = GuestMemfd(slot.file, inode, slot.offset, device)
            found = None if slot.of_kvm else KvmSlot(slot.gpa, slot.hva, slot.bytes, slot.read_only, part)
            yield found, slot.bytes // PAGE_SIZE

    def _inode(self, file: int) -> tuple[int, str]:
        """Inode number and device of an open file, as /proc/PID/maps has them."""
        inode = self._field(file, "file", "f_inode")
        device = self._field(self._field(inode, "inode", "i_sb"), "super_block", "s_dev", size=4)
        major, minor = device >> 20, device & 0xF_FFFF  # include/linux/kdev_t.h: MINORBITS
        return self._field(inode, "inode", "i_ino"), f"{major:02x}:{minor:02x}"

    def _vcpu_addresses(self, address: int) -> list[int]:
        array = address + self._btf.offset("kvm", "vcpu_array")
        return [int(at) for at in xarray.entries(self._read, self._btf, array)[2]]

    def _vcpus(self, address: int) -> tuple[VCpu, ...]:
        found = self._vcpu_addresses(address)
        if len(found) != self._field(address, "kvm", "online_vcpus", size=4):
            raise Unknown("a vCPU is being made")
        vendor = vendor_types() if len(found) else (self._btf, "kvm_vcpu")
        return tuple(vcpu_at(self._read, self._btf, vendor, at) for at in found)
