"""KVM's memory slots, out of kernel memory made here; a list that does not add up is not believed."""

import json
import os
import struct
from collections.abc import Mapping, Sequence

import pytest

from offmap.audit.btf import Unknown
from offmap.audit.guest_ram import _unseen_guest_memfd, find_guest_ram, slot_ranges
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.kvm_slots import KVM_VM_LINK, KvmSlot, KvmSlots, OthersVm
from offmap.audit.process import Process
from offmap.audit.regions import DIRECT_MAP, VMALLOC, VMEMMAP, Layout
from offmap.audit.result import Source
from offmap.errors import Undetermined

PAGE = 4096
PID, DESCRIPTOR = 42, 5
VM = {DESCRIPTOR: KVM_VM_LINK}
INIT, TASK, FILES, TABLE, ARRAY, FILE, KVM, MM = (0x1000 * n for n in range(1, 9))
SETS = (0x1_0000, 0x2_0000)  # struct kvm_memslots of each address space
SLOTS = 0x3_0000
READ_ONLY, GUEST_MEMFD, INVALID = 1 << 1, 1 << 2, 1 << 16

# Offsets of this kernel.
OFFSETS: dict[tuple[str, ...], int] = {
    ("task_struct", "tasks"): 0x10,
    ("task_struct", "pid"): 0x20,
    ("task_struct", "mm"): 0x28,
    ("task_struct", "files"): 0x30,
    ("files_struct", "fdt"): 0x8,
    ("fdtable", "fd"): 0x8,
    ("fdtable", "max_fds"): 0x0,
    ("file", "private_data"): 0x40,
    ("kvm_vcpu", "kvm"): 0x0,
    ("kvm", "mm"): 0x100,
    ("kvm", "memslots"): 0x200,
    ("kvm", "nr_memslot_pages"): 0x300,
    ("kvm_memslots", "node_idx"): 0x8,
    ("kvm_memslots", "id_hash"): 0x10,
    ("kvm_memory_slot", "id_node"): 0x20,
    ("kvm_memory_slot", "base_gfn"): 0x60,
    ("kvm_memory_slot", "npages"): 0x68,
    ("kvm_memory_slot", "userspace_addr"): 0x70,
    ("kvm_memory_slot", "flags"): 0x78,
    ("kvm_memory_slot", "id"): 0x7C,
}


class Types:
    """BTF, as far as it is asked for."""

    def offset(self, name: str, *members: str) -> int:
        return OFFSETS[(name, *members)]


class Kernel(KvmSlots):
    """Memory as a dictionary of bytes; what is not there reads as zero, as /proc/kcore has it."""

    def __init__(self) -> None:
        self._btf = Types()  # type: ignore[assignment]
        self.memory: dict[int, int] = {}
        self.number = 0

    def put(self, base: int, name: tuple[str, ...], value: int, size: int = 8) -> None:
        for index, byte in enumerate(value.to_bytes(size, "little")):
            self.memory[base + OFFSETS[name] + index] = byte

    def _read(self, va: int, size: int) -> bytes:
        return bytes(self.memory.get(va + index, 0) for index in range(size))

    def slot(self, space: int, gfn: int, pages: int, va: int, flags: int = 0, number: int = 0, node: int = 1) -> int:
        """One more slot of an address space, whose active set is number 1, first in its bucket."""
        at = SLOTS + 0x100 * self.number
        self.number += 1
        for member, value, size in (
            *(("base_gfn", gfn, 8), ("npages", pages, 8), ("userspace_addr", va, 8)),
            *(("flags", flags, 4), ("id", number, 2)),
        ):
            self.put(at, ("kvm_memory_slot", member), value, size)
        head = SETS[space] + OFFSETS["kvm_memslots", "id_hash"] + 8 * (number % 128)
        link = at + OFFSETS["kvm_memory_slot", "id_node"] + 16 * node
        after = struct.unpack("<Q", self._read(head, 8))[0]
        for place, value in ((head, link), (link, after)):
            for index, byte in enumerate(value.to_bytes(8, "little")):
                self.memory[place + index] = byte
        return at


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Give one with a process, whose descriptor is a VM with two slots, and SMM's view of one of them."""
    monkeypatch.setattr("offmap.audit.kernel_objects.symbol", lambda name: INIT)
    kernel = Kernel()
    kernel.put(INIT, ("task_struct", "tasks"), TASK + 0x10)
    kernel.put(TASK, ("task_struct", "tasks"), INIT + 0x10)
    kernel.put(TASK, ("task_struct", "pid"), PID, 4)
    kernel.put(TASK, ("task_struct", "mm"), MM)
    kernel.put(TASK, ("task_struct", "files"), FILES)
    kernel.put(FILES, ("files_struct", "fdt"), TABLE)
    kernel.put(TABLE, ("fdtable", "fd"), ARRAY)
    kernel.put(TABLE, ("fdtable", "max_fds"), 64, 4)
    kernel.memory |= {ARRAY + 8 * DESCRIPTOR + index: byte for index, byte in enumerate(struct.pack("<Q", FILE))}
    kernel.put(FILE, ("file", "private_data"), KVM)
    kernel.put(KVM, ("kvm", "mm"), MM)
    for space, active in enumerate(SETS):
        kernel.memory |= {KVM + 0x200 + 8 * space + i: byte for i, byte in enumerate(struct.pack("<Q", active))}
        kernel.put(active, ("kvm_memslots", "node_idx"), 1, 4)
    kernel.slot(0, 0, 160, 0x7F00_0000_0000, number=0)
    kernel.slot(0, 0xFFFC0, 64, 0x7F10_0000_0000, READ_ONLY, number=1)
    kernel.slot(1, 0, 160, 0x7F00_0000_0000, number=128)
    kernel.put(KVM, ("kvm", "nr_memslot_pages"), 160 + 64 + 160)
    return kernel


def test_slots_of_both_address_spaces_each_once(kernel: Kernel) -> None:
    assert set(kernel.of(PID, VM)) == {
        KvmSlot(0, 0x7F00_0000_0000, 160 * PAGE, False),
        KvmSlot(0xFFFC0 * PAGE, 0x7F10_0000_0000, 64 * PAGE, True),
    }


def test_slots_of_one_bucket_are_all_found_and_kvms_own_are_no_ram(kernel: Kernel) -> None:
    kernel.slot(0, 0x100, 256, 0x7F20_0000_0000, number=256)
    kernel.slot(0, 0xFEE00, 1, 0x7F30_0000_0000, number=32766)
    kernel.put(KVM, ("kvm", "nr_memslot_pages"), 160 + 64 + 160 + 256 + 1)
    found = kernel.of(PID, VM)
    assert len(found) == 3 and KvmSlot(0x10_0000, 0x7F20_0000_0000, 256 * PAGE, False) in found


def test_a_list_that_does_not_add_up_is_not_believed(kernel: Kernel) -> None:
    kernel.put(KVM, ("kvm", "nr_memslot_pages"), 160 + 64)
    with pytest.raises(Unknown, match="add up"):
        kernel.of(PID, VM)


def test_a_slot_that_is_being_deleted_is_no_answer(kernel: Kernel) -> None:
    kernel.slot(0, 0x200, 1, 0x7F40_0000_0000, INVALID, number=9)
    with pytest.raises(Unknown, match="being changed"):
        kernel.of(PID, VM)


def test_a_ringslot_ranges_ends(kernel: Kernel) -> None:
    at = kernel.slot(0, 0x200, 1, 0x7F40_0000_0000, number=9)
    link = at + OFFSETS["kvm_memory_slot", "id_node"] + 16
    kernel.memory |= {link + index: byte for index, byte in enumerate(struct.pack("<Q", link))}
    with pytest.raises(Unknown, match="do not end"):
        kernel.of(PID, VM)


def test_what_was_not_read_is_no_answer(kernel: Kernel) -> None:
    with pytest.raises(Unknown, match="no process"):
        kernel.of(PID + 1, VM)
    with pytest.raises(Unknown, match="descriptor"):
        kernel.of(PID, {64: KVM_VM_LINK})
    with pytest.raises(Unknown, match="no VM's"):
        kernel.of(PID, {DESCRIPTOR + 1: KVM_VM_LINK})
    kernel.put(KVM, ("kvm", "mm"), MM + 8)
    with pytest.raises(OthersVm, match="by another"):
        kernel.of(PID, VM)
    kernel.put(TASK, ("task_struct", "mm"), 0)
    with pytest.raises(Unknown, match="address space"):
        kernel.of(PID, VM)


def test_a_vm_of_which_only_a_vcpu_is_held(kernel: Kernel) -> None:
    vcpu, file, number = 0x9000, 0xA000, DESCRIPTOR + 1
    for at, value in ((ARRAY + 8 * number, file), (file + 0x40, vcpu), (vcpu, KVM)):
        kernel.memory |= {at + index: byte for index, byte in enumerate(struct.pack("<Q", value))}
    only = {number: "anon_inode:kvm-vcpu:0"}
    assert kernel.of(PID, only) == kernel.of(PID, VM) == kernel.of(PID, VM | only) and kernel.of(PID, VM)


def test_slot_whose_private_pages_are_in_a_guest_memfd(kernel: Kernel) -> None:
    kernel.slot(0, 0x300, 1, 0x7F50_0000_0000, GUEST_MEMFD, number=3)
    kernel.put(KVM, ("kvm", "nr_memslot_pages"), 160 + 64 + 160 + 1)
    slots = kernel.of(PID, VM)
    assert [slot.guest_phys_addr for slot in slots if slot.guest_memfd] == [0x300 * PAGE]
    # Another process holds it: nothing here shows its pages.
    assert _unseen_guest_memfd({}, slot_ranges(slots, []), [], slots)
    assert not _unseen_guest_memfd({}, slot_ranges(slots, []), [], [slot for slot in slots if not slot.guest_memfd])


def test_a_claim_that_a_child_has_of_its_parent_is_not_believed() -> None:
    def refuse(pid: int, descriptors: Mapping[int, str]) -> Sequence[KvmSlot]:
        raise OthersVm("the VM of process 7 was made by another")

    slot = {"guest_phys_addr": 0, "memory_size": PAGE, "userspace_addr": 0x7F00_0000_0000}
    fd = os.memfd_create("offmap-memslots")
    try:
        os.write(fd, json.dumps({"schema": "offmap-memslots/1", "slots": [slot]}).encode())
        with HoldsVm(os.getpid()) as process, pytest.raises(Undetermined, match="its claim says nothing"):
            find_guest_ram(process, refuse)
    finally:
        os.close(fd)


class Zeroes:
    """A kcore that has everything."""

    def read_virtual(self, va: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))


def test_structures_are_read_where_the_kernel_keeps_them_and_only_kvms_in_the_vmalloc_space() -> None:
    direct, vmalloc, vmemmap = (0xFFFF_8880_0000_0000 + 0x10_0000 * n for n in range(3))
    layout = Layout(
        [(direct, vmalloc, DIRECT_MAP), (vmalloc, vmemmap, VMALLOC), (vmemmap, vmemmap + 0x10_0000, VMEMMAP)]
    )
    everything, slots = KernelObjects.__new__(KernelObjects), KvmSlots.__new__(KvmSlots)
    for objects in (everything, slots):
        objects._kcore, objects._layout = Zeroes(), layout  # type: ignore[assignment]
        assert objects._read(direct, 16) == objects._read(vmemmap + 8, 16) == bytes(16)
        for va in (vmalloc - 8, vmemmap - 8, vmemmap + 0x10_0000 - 8, 0x7F00_0000_0000):
            with pytest.raises(Unknown, match="not where"):
                objects._read(va, 16)
    assert slots._read(vmalloc, 16) == bytes(16)
    with pytest.raises(Unknown, match="not where"):
        everything._read(vmalloc, 16)


class HoldsVm(Process):
    """This process, with a VM among its descriptors."""

    def descriptors(self, thread: int | None = None) -> dict[int, str]:
        return super().descriptors(thread) | {DESCRIPTOR: "anon_inode:kvm-vm"}


def test_kvms_list_comes_before_guesses_and_after_it_they_are_guesses() -> None:
    slots = [
        KvmSlot(0, 0x7F00_0000_0000, 160 * PAGE, False),
        KvmSlot(1 << 30, 0x7F10_0000_0000, PAGE, True),
        KvmSlot(1 << 31, 0x7F00_0000_0000 + PAGE, 16 * PAGE, False),  # a part of the first, at another address
    ]
    asked: list[tuple[int, Mapping[int, str]]] = []

    def ask(pid: int, descriptors: Mapping[int, str]) -> Sequence[KvmSlot]:
        asked.append((pid, descriptors))
        return slots

    def refuse(pid: int, descriptors: Mapping[int, str]) -> Sequence[KvmSlot]:
        raise Unknown("no BTF")

    held = bytearray(64 << 20)  # at least one mapping large enough to be a guess
    with HoldsVm(os.getpid()) as process:
        ram = find_guest_ram(process, ask)
        assert asked == [(os.getpid(), {DESCRIPTOR: KVM_VM_LINK})]
        assert [(part.source, part.va, part.guest_phys_addr) for part in ram.ranges] == [
            (Source.KVM, 0x7F00_0000_0000, 0)
        ]
        assert (ram.guessed, ram.read_only_bytes) == (False, PAGE)
        guessed = find_guest_ram(process, refuse)
        assert guessed.guessed and guessed.why_guessed == "no BTF"
    assert held


def test_what_a_claim_leaves_out_is_judged_too() -> None:
    claimed, left_out = (KvmSlot(n << 20, 0x7F00_0000_0000 + (n << 20), 1 << 20, False) for n in range(2))
    slot = {"guest_phys_addr": 0, "memory_size": claimed.bytes, "userspace_addr": claimed.userspace_addr}
    fd = os.memfd_create("offmap-memslots")
    try:
        os.write(fd, json.dumps({"schema": "offmap-memslots/1", "slots": [slot]}).encode())
        with HoldsVm(os.getpid()) as process:
            whole = find_guest_ram(process, lambda pid, fds: [claimed])
            assert [part.source for part in whole.ranges] == [Source.MEMSLOT]
            assert (whole.omitted_bytes, whole.why_guessed) == (0, "")
            part = find_guest_ram(process, lambda pid, fds: [left_out, claimed])
            assert [(part.source, part.va) for part in part.ranges] == [
                (Source.MEMSLOT, claimed.userspace_addr),
                (Source.KVM, left_out.userspace_addr),
            ]
            assert part.omitted_bytes == left_out.bytes and not part.guessed

            def refuse(pid: int, descriptors: Mapping[int, str]) -> Sequence[KvmSlot]:
                raise Unknown("no BTF")

            assert find_guest_ram(process, refuse).why_guessed == "no BTF"
    finally:
        os.close(fd)
