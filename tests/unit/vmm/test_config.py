"""Machines that cannot be, memslots as they are published, exits as the kernel lays them out."""

import json
import mmap
import os
from pathlib import Path

import pytest

from offmap.boot.linux import BootSource
from offmap.errors import OffmapError
from offmap.hide import Vet
from offmap.memory.anon import Anon
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.memory.memslots import publish_memslots
from offmap.memory.reserved import Reserved
from offmap.uapi import kvm as uapi
from offmap.uapi.mman import MAP_NORESERVE
from offmap.vmm import vcpu_loop
from offmap.vmm.config import MachineConfig

SOURCE = BootSource(Path("kernel"), None, "")
GIB = 1 << 30


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, (1 << 40) + 4096, 1 << 64])
def test_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(OffmapError, match=r"a guest cannot have .* of RAM; give --memory-size"):
        MachineConfig(SOURCE, Anon(), size, vetting=Vet())


@pytest.mark.parametrize("vcpus", [-1, 0, 17])
def test_vcpus_that_cannot_be(vcpus: int) -> None:
    with pytest.raises(OffmapError, match=r"a guest cannot have -?\d+ vCPUs; ask for 1 to 16"):
        MachineConfig(SOURCE, Anon(), GIB, vcpus, vetting=Vet())


def test_kvm_clock_is_for_memory_that_the_kernel_maps() -> None:
    assert MachineConfig(SOURCE, Anon(), GIB, vetting=Vet()).offers_kvm_clock
    assert not MachineConfig(SOURCE, Anon(), GIB, kvm_clock=False, vetting=Vet()).offers_kvm_clock
    assert not MachineConfig(SOURCE, Reserved(), GIB, vetting=Vet()).offers_kvm_clock
    with pytest.raises(OffmapError, match="kvm-clock cannot be offered on reserved memory"):
        MachineConfig(SOURCE, Reserved(), GIB, kvm_clock=True, vetting=Vet())


def test_memslots_are_published_as_they_are() -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    with GuestMemory([Backing("test", -1, 4 * GIB, flags=flags)]) as memory:
        fd = publish_memslots(memory, "reserved", [PhysicalRange(GIB, GIB + 8192)])
        try:
            assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "/memfd:offmap-memslots (deleted)"
            assert not os.get_inheritable(fd)
            statement = json.loads(os.pread(fd, 1 << 16, 0))
        finally:
            os.close(fd)
        address = memory.backings[0].address
        assert statement == {
            "schema": "offmap-memslots/1",
            "slots": [
                {"guest_phys_addr": 0, "memory_size": 3 * GIB, "userspace_addr": address, "backend": "reserved"},
                {
                    "guest_phys_addr": 4 * GIB,
                    "memory_size": GIB,
                    "userspace_addr": address + 3 * GIB,
                    "backend": "reserved",
                },
            ],
            "excluded": [[GIB, 8192]],
        }


def test_exits_are_read_where_the_kernel_puts_them() -> None:
    """The loop reads struct kvm_run by offsets of its own, for speed; tests/kvm reads real exits with them."""
    assert uapi.kvm_run.exit_reason.offset == vcpu_loop._EXIT_REASON_OFFSET
    assert uapi.kvm_run.exit.offset == vcpu_loop._EXIT_UNION_OFFSET
    assert uapi.kvm_run.immediate_exit.offset == vcpu_loop._IMMEDIATE_EXIT_OFFSET
    assert uapi.kvm_run.exit.offset + uapi.kvm_run_mmio.data.offset == vcpu_loop._MMIO_DATA_OFFSET
    run = uapi.kvm_run(exit_reason=uapi.KVM_EXIT_MMIO)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xFEC00000, 4, 1
    run.mmio.data[:] = range(8)
    fields = vcpu_loop._EXIT_MMIO.unpack_from(bytes(run), vcpu_loop._EXIT_UNION_OFFSET)
    assert fields == (0xFEC00000, bytes(range(8)), 4, 1)
