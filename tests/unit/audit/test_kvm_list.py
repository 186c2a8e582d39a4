"""KVM's list of VMs, out of kernel memory made here: each VM, each slot, and nothing that does not add up."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offmap.audit.btf import Unknown
from offmap.audit.kvm_list import GuestMemfd, KvmList, KvmSlot
from offmap.audit.kvm_vcpu import VCpu
from offmap.audit.procfs import SYSFS_MAGIC

from .kernel_memory import OFFSETS, Memory, Types

PAGE = 4096
HEAD = 0x6000
MM, OTHER_MM = 0xA000, 0xB000
VMEMMAP = 0x4000_0000
READ_ONLY, GUEST_MEMFD, INVALID = 1 << 1, 1 << 2, 1 << 16
SVME, VMXE = 1 << 12, 1 << 13


class Kernel(KvmList):
    """A list of VMs in memory made here."""

    def __init__(self) -> None:
        self._btf = Types()  # type: ignore[assignment]
        self._page_size = 64
        self._layout = type("Layout", (), {"vmemmap": VMEMMAP})()
        self.memory = Memory()
        self.memory.list_head(HEAD)
        self.reads = 0

    def _read(self, va: int, size: int) -> bytes:
        self.reads += 1
        self.at_read(self.reads)
        return self.memory.read(va, size)

    def at_read(self, number: int) -> None:
        """What happens before the n-th read."""

    def vm(self, mm: int = MM, label: bytes = b"kvm-42") -> int:
        """One more VM without slots; the address of its ``struct kvm``."""
        memory, kvm = self.memory, self.memory.make()
        memory.put(kvm, "kvm", "mm", value=mm)
        usage = memory.make()
        memory.put(kvm + OFFSETS["kvm", "srcu"], "srcu_struct", "srcu_sup", value=usage)
        memory.put(usage, "srcu_usage", "srcu_last_gp_end", value=77)
        for space in range(2):
            active = memory.make()
            memory.write(kvm + OFFSETS["kvm", "memslots"] + 8 * space, active)
            memory.put(active, "kvm_memslots", "generation", value=space)
            memory.put(active, "kvm_memslots", "node_idx", value=1, size=4)
        memory.list_head(kvm + OFFSETS["kvm", "gpc_list"])
        memory.list_add(kvm + OFFSETS["kvm", "vm_list"], HEAD)
        for index, byte in enumerate(label):
            memory.write(kvm + OFFSETS["kvm", "stats_id"] + index, byte, 1)
        return kvm

    def slots_of(self, kvm: int, space: int = 0) -> int:
        return self.memory.get(kvm + OFFSETS["kvm", "memslots"] + 8 * space)

    def slot(self, kvm: int, gfn: int, pages: int, va: int, flags: int = 0, number: int = 0, space: int = 0) -> int:
        """One more slot, as KVM makes it."""
        memory, at, active = self.memory, self.memory.make(), self.slots_of(kvm, space)
        for name, value, size in (
            *(("base_gfn", gfn, 8), ("npages", pages, 8), ("userspace_addr", va, 8)),
            *(("flags", flags, 4), ("id", number, 2)),
        ):
            memory.put(at, "kvm_memory_slot", name, value=value, size=size)
        head = active + OFFSETS["kvm_memslots", "id_hash"] + 8 * (number % 128)
        link = at + OFFSETS["kvm_memory_slot", "id_node"] + 16
        memory.write(link, memory.get(head))
        memory.write(head, link)
        total = kvm + OFFSETS["kvm", "nr_memslot_pages"]
        memory.write(total, memory.get(total) + pages)
        memory.write(active, memory.get(active) + 2)
        return at

    def vcpu(
        self,
        kvm: int,
        efer: int = 0,
        cr4: int = 0,
        runs: int = 0,
        mapped: int = 0,
        once: int = 0,
        clock: int = 0,
        gfn: int = 0,
    ) -> None:
        vcpu = self.memory.make()
        for members, value in (
            (("arch", "efer"), efer),
            (("arch", "cr4"), cr4),
            (("stat", "nested_run"), runs),
        ):
            self.memory.put(vcpu, "kvm_vcpu", *members, value=value)
        self.memory.put(vcpu + 0x100, "kvm_host_map", "hva", value=mapped)
        self.memory.put(vcpu + 0x100, "kvm_host_map", "gfn", value=gfn)
        self.memory.put(vcpu, "vcpu_svm", "nested", "vmcb02", "pa", value=once)
        self.memory.put(vcpu + 0x200, "gfn_to_pfn_cache", "uhva", value=clock)
        self.memory.put(kvm + OFFSETS["kvm", "vcpu_array"], "xarray", "xa_head", value=vcpu)
        self.memory.put(kvm, "kvm", "online_vcpus", value=1, size=4)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr("offmap.audit.kvm_list.module_symbol", lambda name, module: HEAD)
    monkeypatch.setattr("offmap.audit.kvm_list.vendor_types", lambda: (Types(), "vcpu_svm"))
    monkeypatch.setattr("offmap.audit.kvm_list._MODULES", Path("/nowhere"))
    return Kernel()


def test_every_vm_of_the_list_whoever_made_it(kernel: Kernel) -> None:
    assert kernel.vms() == []
    first, second = kernel.vm(), kernel.vm(OTHER_MM, b"kvm-43")
    assert [(vm.address, vm.memory, vm.label) for vm in kernel.vms()] == [
        (second, OTHER_MM, "kvm-43"),
        (first, MM, "kvm-42"),
    ]
    assert [vm.address for vm in kernel.of_memory(MM)] == [first]


def test_no_list_is_read_where_kvm_is_not_loaded(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offmap.audit.kvm_list._MODULES", tmp_path)
    monkeypatch.setattr("offmap.audit.kvm_list.read_path", lambda path: b"kvmgt 4096 0\nloop 4096 0\n")
    monkeypatch.setattr("offmap.audit.kvm_list.file_system", lambda fd: SYSFS_MAGIC)
    assert kernel.vms() == [] and not kernel.reads
    # A folder that was mounted there says nothing of the kernel.
    monkeypatch.setattr("offmap.audit.kvm_list.file_system", lambda fd: 0x0102_1994)
    assert kernel.vms() == [] and kernel.reads
    kernel.reads = 0
    monkeypatch.setattr("offmap.audit.kvm_list.file_system", lambda fd: SYSFS_MAGIC)
    monkeypatch.setattr("offmap.audit.kvm_list.read_path", lambda path: b"loop 4096 0\nkvm 4096 0\n")
    assert kernel.vms() == [] and kernel.reads


def test_a_list_that_reads_as_zeroes_is_no_empty_list(kernel: Kernel) -> None:
    kernel.memory.write(HEAD, 0)
    with pytest.raises(Unknown, match="being changed"):
        kernel.vms()


@pytest.mark.parametrize("newest", [("kvm_memslots", "id_hash"), ("kvm", "mmu_invalidate_seq")])
def test_a_kvm_that_is_older_than_its_list_can_be_read_is_told_before_any_process_is_asked_for(
    newest: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offmap.audit.kvm_list._loaded", lambda: True)
    monkeypatch.setattr("offmap.audit.kvm_list.module_symbol", lambda name, module: HEAD)
    monkeypatch.setattr("offmap.audit.tasks._NAMESPACES", {})
    kcore: Any = None
    layout: Any = None
    types: Any = Types()
    KvmList(kcore, layout, types)
    monkeypatch.delitem(OFFSETS, newest)
    with pytest.raises(Unknown, match=newest[1]):
        KvmList(kcore, layout, types)


def test_slots_of_both_address_spaces_each_once_and_kvms_own_are_no_ram(kernel: Kernel) -> None:
    kvm = kernel.vm()
    kernel.slot(kvm, 0, 160, 0x7F00_0000_0000, number=0)
    kernel.slot(kvm, 0xFFFC0, 64, 0x7F10_0000_0000, READ_ONLY, number=128)
    kernel.slot(kvm, 0xFEE00, 1, 0x7F30_0000_0000, number=32766)
    kernel.slot(kvm, 0, 160, 0x7F00_0000_0000, number=0, space=1)
    (vm,) = kernel.vms()
    assert set(vm.slots) == {
        KvmSlot(0, 0x7F00_0000_0000, 160 * PAGE, False),
        KvmSlot(0xFFFC0 * PAGE, 0x7F10_0000_0000, 64 * PAGE, True),
    }
    assert len(vm.slots) == 2 and vm.intact and (vm.changed, vm.doubts) == (77, ())


def test_a_slot_that_was_taken_away_is_remembered_by_the_generation(kernel: Kernel) -> None:
    kvm = kernel.vm()
    kernel.slot(kvm, 0, 160, 0x7F00_0000_0000)
    (before,) = kernel.vms()
    assert before.intact and not kernel.changed(before)
    active = kernel.slots_of(kvm)
    kernel.memory.write(active, kernel.memory.get(active) + 4)
    (after,) = kernel.vms()
    assert not after.intact and kernel.changed(before) and not kernel.changed(after)
    kernel.memory.put(kvm, "kvm", "mmu_invalidate_seq", value=1)
    assert kernel.changed(after)


def test_what_does_not_add_up_is_no_answer(kernel: Kernel) -> None:
    kvm = kernel.vm()
    kernel.slot(kvm, 0, 160, 0x7F00_0000_0000)
    kernel.memory.put(kvm, "kvm", "nr_memslot_pages", value=159)
    with pytest.raises(Unknown, match="add up"):
        kernel.vms()
    kernel.memory.put(kvm, "kvm", "nr_memslot_pages", value=160)
    kernel.memory.write(kernel.slots_of(kvm), 1 << 63 | 2)
    with pytest.raises(Unknown, match="being changed"):
        kernel.vms()


def test_a_slot_that_is_being_deleted_and_a_ring_of_slots_are_no_answer(kernel: Kernel) -> None:
    kvm = kernel.vm()
    at = kernel.slot(kvm, 0x200, 1, 0x7F40_0000_0000, INVALID, number=9)
    with pytest.raises(Unknown, match="being changed"):
        kernel.vms()
    kernel.memory.put(at, "kvm_memory_slot", "flags", value=0, size=4)
    link = at + OFFSETS["kvm_memory_slot", "id_node"] + 16
    kernel.memory.write(link, link)
    with pytest.raises(Unknown, match="do not end"):
        kernel.vms()


def test_a_vm_that_cannot_be_read_spoils_only_its_own_process(kernel: Kernel) -> None:
    good, bad = kernel.vm(), kernel.vm(OTHER_MM)
    kernel.memory.put(bad, "kvm", "nr_memslot_pages", value=5)
    assert [vm.address for vm in kernel.of_memory(MM)] == [good]
    for ask in (kernel.vms, lambda: kernel.of_memory(OTHER_MM)):
        with pytest.raises(Unknown, match="add up"):
            ask()


def test_vms_that_end_while_the_list_is_read_spoil_nothing(kernel: Kernel) -> None:
    stays = kernel.vm()
    ends = [kernel.vm(OTHER_MM) for _ in range(3)]

    def one_ends(number: int) -> None:
        if number % 4 == 0 and ends:
            kvm = ends.pop(0)
            kernel.memory.list_del(kvm + OFFSETS["kvm", "vm_list"])
            kernel.memory.put(kvm, "kvm", "mm", value=0)

    kernel.at_read = one_ends  # type: ignore[method-assign]
    assert [vm.address for vm in kernel.vms()] == [stays]
    assert not ends


def test_a_cache_a_host_map_and_a_nested_guest_are_doubts(kernel: Kernel) -> None:
    kvm = kernel.vm()
    kernel.vcpu(kvm)
    assert kernel.vms()[0].vcpus == (VCpu(0, False, 0),) and not kernel.vms()[0].doubts
    for told, said in (
        ({"efer": SVME}, "EFER.SVME"),
        ({"cr4": VMXE}, "EFER.SVME"),
        ({"runs": 3}, r"3 times"),
        ({"mapped": 0x1000, "gfn": 1}, "has a page of its guest mapped in KVM (sev_es.ghcb_map)"),
        ({"gfn": 1}, "once had a page of its guest mapped in KVM (sev_es.ghcb_map)"),
        ({"once": 0x1000}, "once run guests"),
        ({"clock": 0x7F00_0000_1000}, "once had a kernel mapping of a page of the guest (arch.pv_time)"),
    ):
        kernel.vcpu(kvm, **told)
        (doubt,) = kernel.vms()[0].doubts
        assert said in doubt
    kernel.vcpu(kvm, clock=0xFFFF_8880_0000_0000)
    cache = kernel.memory.make()
    kernel.memory.list_add(cache + OFFSETS["gfn_to_pfn_cache", "list"], kvm + OFFSETS["kvm", "gpc_list"])
    assert not kernel.vms()[0].doubts
    kernel.memory.put(cache, "gfn_to_pfn_cache", "khva", value=0x1234)
    kernel.memory.put(cache, "gfn_to_pfn_cache", "gpa", value=0x5000)
    assert kernel.vms()[0].caches == (0x5000,) and "0x5000" in kernel.vms()[0].doubts[0]


def test_folders_in_debugfs_are_known_by_their_inodes(kernel: Kernel) -> None:
    def folder(kvm: int, number: int) -> None:
        entry, inode = kernel.memory.make(), kernel.memory.make()
        kernel.memory.put(kvm, "kvm", "debugfs_dentry", value=entry)
        kernel.memory.put(entry, "dentry", "d_inode", value=inode)
        kernel.memory.put(inode, "inode", "i_ino", value=number)

    folder(kernel.vm(), 7)
    ended = kernel.vm()
    folder(ended, 8)
    assert kernel.debugfs_folders() == {7, 8}
    kernel.memory.list_del(ended + OFFSETS["kvm", "vm_list"])
    assert kernel.debugfs_folders() == {7}


def test_when_a_vm_was_made_is_told_by_its_folder_and_else_by_its_last_change(kernel: Kernel) -> None:
    kvm = kernel.vm()
    before = time.monotonic_ns()
    (vm,) = kernel.vms()
    assert vm.made is None and vm.made_since(77) and not vm.made_since(78)
    entry, inode = kernel.memory.make(), kernel.memory.make()
    kernel.memory.put(kvm, "kvm", "debugfs_dentry", value=entry)
    kernel.memory.put(entry, "dentry", "d_inode", value=inode)
    now = time.monotonic_ns()
    seconds, rest = divmod(time.time_ns() - 5_000_000_000, 1_000_000_000)
    kernel.memory.put(inode, "inode", "i_ctime_sec", value=seconds)
    kernel.memory.put(inode, "inode", "i_ctime_nsec", value=rest, size=4)
    (vm,) = kernel.vms()
    assert vm.made is not None and abs(before - vm.made - 5_000_000_000) < 1_000_000_000
    assert vm.made_since(vm.made) and not vm.made_since(vm.made + 1)
    # The folder has the time of the last tick: a VM that is made just after the auditor's start seems older than that.
    assert vm.made_since(now - 5_000_000_000 + 9_000_000) and not vm.made_since(now - 4_000_000_000)
    kernel.memory.put(inode, "inode", "i_ctime_sec", value=seconds + 60)
    assert kernel.vms()[0].made is None  # the clock was put back


def test_whether_a_vm_ended_is_told_by_what_its_end_leaves(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.vm()
    using, at_load, srcu, usage = (kernel.memory.make() for _ in range(4))
    where = {"vm_list": HEAD, "kvm_usage_count": using, "enable_virt_at_load": at_load}
    monkeypatch.setattr("offmap.audit.kvm_list.module_symbol", lambda name, _: where[name])
    monkeypatch.setattr("offmap.audit.kvm_list.symbol", lambda name: {"srcu": srcu}[name])
    monkeypatch.setattr("offmap.audit.kvm_list.time.sleep", lambda seconds: None)
    kernel.memory.put(srcu, "srcu_struct", "srcu_sup", value=usage)
    kernel.memory.put(usage, "srcu_usage", "srcu_last_gp_end", value=50)
    kernel.memory.write(using, 1)
    assert kernel.ended_since(50) and not kernel.ended_since(51)
    kernel.memory.write(using, 2)  # one is on its way out
    assert kernel.ended_since(51)
    kernel.memory.write(at_load, 1)  # no, that is the module's own
    assert not kernel.ended_since(51)

    def untold(name: str, module: str) -> int:
        raise Unknown(name)

    monkeypatch.setattr("offmap.audit.kvm_list.module_symbol", untold)
    assert kernel.ended_since(51)


def test_a_vcpu_that_is_being_made_is_no_answer(kernel: Kernel) -> None:
    kvm = kernel.vm()
    kernel.memory.put(kvm, "kvm", "online_vcpus", value=1, size=4)
    with pytest.raises(Unknown, match="vCPU"):
        kernel.vms()


def test_pages_of_a_guest_memfd_come_from_its_file_whoever_holds_it(kernel: Kernel) -> None:
    memory, kvm = kernel.memory, kernel.vm()
    at = kernel.slot(kvm, 0x100, 16, 0x7F00_0000_0000, GUEST_MEMFD)
    assert kernel.vms()[0].doubts  # it is closed
    file, inode, block, mapping = (memory.make() for _ in range(4))
    memory.put(file, "file", "f_inode", value=inode)
    memory.put(inode, "inode", "i_mapping", value=mapping)
    memory.put(inode, "inode", "i_sb", value=block)
    memory.put(block, "super_block", "s_dev", value=0x10_0003, size=4)
    memory.put(inode, "inode", "i_ino", value=1234)
    memory.put(mapping, "address_space", "host", value=inode)
    memory.put(at, "kvm_memory_slot", "gmem", "file", value=file)
    memory.put(at, "kvm_memory_slot", "gmem", "pgoff", value=4)
    (slot,) = kernel.vms()[0].slots
    assert slot.guest_memfd == GuestMemfd(file, 1234, 4 * PAGE, "01:03")
    pages = {index: VMEMMAP + 64 * (0x500 + index) for index in (0, 4, 6, 19, 20)}
    memory.xarray(mapping + OFFSETS["address_space", "i_pages"], pages)
    first, pfn, count = kernel.guest_memfd_pages(slot.guest_memfd, slot.bytes)
    assert (first.tolist(), pfn.tolist()) == ([0, 2, 15], [0x504, 0x506, 0x513])
    assert np.array_equal(count, [1, 1, 1])
    memory.put(block, "super_block", "s_dev", value=4, size=4)
    with pytest.raises(Unknown, match="not where"):
        kernel.guest_memfd_pages(slot.guest_memfd, slot.bytes)
    memory.put(block, "super_block", "s_dev", value=0x10_0003, size=4)
    memory.put(inode, "inode", "i_ino", value=99)
    with pytest.raises(Unknown, match="not where"):
        kernel.guest_memfd_pages(slot.guest_memfd, slot.bytes)
