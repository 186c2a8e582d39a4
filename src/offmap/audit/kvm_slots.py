"""KVM's own list of a VM's memory slots, read from the kernel's memory: no interface shows it.

The way there: ``task_struct.files`` of the process, its descriptor, ``file.private_data``, and of that ``struct kvm``
the active ``kvm_memslots`` of each address space (``include/linux/kvm_host.h``, Linux 5.17 and later). The offsets are
those of BTF, of the kernel and of kvm.ko. The VM goes on meanwhile, so the list is believed only if it adds up: the VM
is of that process's memory, and the slots have together as many pages as KVM counts (``nr_memslot_pages``).
"""

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from offmap.audit.btf import Btf, Unknown
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.regions import VMALLOC, Layout
from offmap.uapi.page import PAGE_SIZE

KVM_VM_LINK = "anon_inode:kvm-vm"
_BTF = Path("/sys/kernel/btf")
_INIT_PID_NAMESPACE = "pid:[4026531836]"  # include/linux/proc_ns.h, PROC_PID_INIT_INO
_ADDRESS_SPACES = 2  # x86's KVM_ADDRESS_SPACE_NUM, later KVM_MAX_NR_ADDRESS_SPACES: SMM has its own
_HASH_BUCKETS = 128  # DECLARE_HASHTABLE(id_hash, 7)
_NODES = 2  # of each slot, one for each set of slots
_MOST_SLOTS = 32767  # KVM_MEM_SLOTS_NUM, SHRT_MAX
_OF_KVM = _MOST_SLOTS - 3  # KVM_USER_MEM_SLOTS: from there on they are KVM's own (APIC access page, TSS, identity map)
_KVM_MEM_READONLY = 1 << 1  # include/uapi/linux/kvm.h
_KVM_MEM_GUEST_MEMFD = 1 << 2  # the same
_KVM_MEMSLOT_INVALID = 1 << 16  # include/linux/kvm_host.h: being deleted or moved


class OthersVm(Unknown):
    """The VM is of another process's memory: its userspace addresses say nothing in this one."""


@dataclass(frozen=True)
class KvmSlot:
    """One memory slot: where the guest and where the VMM has it; ``read_only`` is ROM.

    ``guest_memfd``: the guest's private pages are in one of those, and not at ``userspace_addr``.
    """

    guest_phys_addr: int
    userspace_addr: int
    bytes: int
    read_only: bool
    guest_memfd: bool = False


@lru_cache(maxsize=1)
def _btf() -> Btf:
    """The kernel's types with those of kvm.ko, which go on where the kernel's end."""
    try:
        # Where KVM is built in, the kernel's own has its types.
        module = (_BTF / "kvm").read_bytes() if (_BTF / "kvm").exists() else b""
        return Btf((_BTF / "vmlinux").read_bytes(), module)
    except OSError as error:
        raise Unknown(f"this kernel does not describe its structures: {error.strerror}") from None


class KvmSlots(KernelObjects):
    """Reads them through an open kcore.

    Raises:
        Unknown: this kernel has no BTF, or this process does not see PIDs as the kernel does.
    """

    # struct kvm and large tables of descriptors are in the vmalloc space, all of each.
    _readable = (*KernelObjects._readable, {VMALLOC})

    def __init__(self, kcore: Kcore, layout: Layout) -> None:
        try:
            namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
        except FileNotFoundError:
            namespace = _INIT_PID_NAMESPACE  # a kernel without PID namespaces (CONFIG_PID_NS) has none but that
        if namespace != _INIT_PID_NAMESPACE:
            raise Unknown("the auditor is in a PID namespace of its own")
        super().__init__(kcore, layout, _btf())

    def of(self, pid: int, descriptors: Mapping[int, str]) -> Sequence[KvmSlot]:
        """The slots of all VMs that process ``pid`` holds by these descriptors: of VMs, or of their vCPUs.

        Args:
            descriptors: what the link of each says.

        Raises:
            Unknown: they cannot be found, or do not add up; OthersVm: they are not of this process's memory.
        """
        task = self._task(pid)
        memory = self._field(task, "task_struct", "mm")
        if not memory:
            raise Unknown(f"process {pid} has no address space")
        table = self._field(self._field(task, "task_struct", "files"), "files_struct", "fdt")
        files, size = self._field(table, "fdtable", "fd"), self._field(table, "fdtable", "max_fds", size=4)
        found: dict[int, list[KvmSlot]] = {}  # by VM
        for number, link in descriptors.items():
            if number >= size:
                raise Unknown(f"process {pid} has no descriptor {number}")
            kvm = self._field(self._pointer(files + 8 * number), "file", "private_data")
            if link != KVM_VM_LINK:
                kvm = self._field(kvm, "kvm_vcpu", "kvm")
            if kvm in found:
                continue
            owner = self._field(kvm, "kvm", "mm")
            if not owner:
                raise Unknown(f"descriptor {number} of process {pid} is no VM's")
            if owner != memory:
                raise OthersVm(f"the VM of process {pid} was made by another")
            found[kvm] = self._slots(kvm)
        return tuple(dict.fromkeys(slot for slots in found.values() for slot in slots))

    def _slots(self, kvm: int) -> list[KvmSlot]:
        found, pages = [], 0
        for space in range(_ADDRESS_SPACES):
            active = self._pointer(kvm + self._btf.offset("kvm", "memslots") + 8 * space)
            node = self._field(active, "kvm_memslots", "node_idx", size=4)
            if node >= _NODES:
                raise Unknown("KVM's slots are not as expected")
            buckets = self._read(active + self._btf.offset("kvm_memslots", "id_hash"), 8 * _HASH_BUCKETS)
            offset = self._btf.offset("kvm_memory_slot", "id_node") + 16 * node  # struct hlist_node: next, pprev
            seen = 0
            for (first,) in struct.iter_unpack("<Q", buckets):
                at = first
                while at:
                    seen += 1
                    if seen > _MOST_SLOTS:
                        raise Unknown("KVM's slots do not end")
                    slot, count = self._slot(at - offset)
                    pages += count
                    found += slot
                    at = self._pointer(at)
        if pages != self._field(kvm, "kvm", "nr_memslot_pages"):
            raise Unknown("KVM's slots do not add up to the pages that it counts")
        return found

    def _slot(self, at: int) -> tuple[list[KvmSlot], int]:
        """The slot there, if it is the VMM's, and how many pages it has."""
        first, pages = (self._field(at, "kvm_memory_slot", name) for name in ("base_gfn", "npages"))
        where = self._field(at, "kvm_memory_slot", "userspace_addr")
        flags = self._field(at, "kvm_memory_slot", "flags", size=4)
        number = self._field(at, "kvm_memory_slot", "id", size=2)
        fits = 0 < pages < 1 << 40 and first < 1 << 40 and not where % PAGE_SIZE and not where >> 56
        if not fits or flags & _KVM_MEMSLOT_INVALID:
            raise Unknown("KVM's slots are being changed")
        if number >= _OF_KVM:
            return [], pages
        read_only, guest_memfd = (bool(flags & flag) for flag in (_KVM_MEM_READONLY, _KVM_MEM_GUEST_MEMFD))
        return [KvmSlot(first * PAGE_SIZE, where, pages * PAGE_SIZE, read_only, guest_memfd)], pages
