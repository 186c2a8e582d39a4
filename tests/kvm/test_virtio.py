"""Register pages, coalesced acknowledgements and notifications in a real KVM: which of them leave the guest."""

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from offmap.devices.bus import MmioBus
from offmap.devices.virtio.bus import VIRTIO_MMIO_BASE, VirtioBus
from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.rng import Rng
from offmap.kvm import Kvm, Vm
from offmap.memory.anon import Anon
from offmap.uapi import kvm as uapi
from offmap.uapi.virtio import mmio as reg

from .conftest import descriptors
from .real_mode import END_PORT, RAM, load

pytestmark = pytest.mark.kvm


@dataclass(frozen=True)
class Spec:
    """An rng, whatever the machine."""

    def build(self, surroundings: Surroundings) -> Rng:
        return Rng(os.open("/dev/urandom", os.O_RDONLY))


def load_register(register: int) -> bytes:
    """mov eax, [register]; mov dx, END_PORT; out dx, eax"""
    return b"\x66\xa1" + struct.pack("<H", register) + b"\xba" + struct.pack("<H", END_PORT) + b"\x66\xef"


def store_register(register: int, value: int) -> bytes:
    """mov dword [register], value"""
    return b"\x66\xc7\x06" + struct.pack("<HI", register, value)


def test_without_read_only_slots_and_coalescing_everything_is_an_exit(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.create_irqchip()
    monkeypatch.setattr(Vm, "check_extension", lambda *_: 0)
    code = (
        store_register(reg.VIRTIO_MMIO_INTERRUPT_ACK, 1)
        + load_register(reg.VIRTIO_MMIO_INTERRUPT_STATUS)
        + load_register(reg.VIRTIO_MMIO_MAGIC_VALUE)
    )
    with ExitStack() as stack:
        vcpu, memory = load(vm, code)
        stack.enter_context(memory)
        stack.enter_context(vcpu)
        mmio = MmioBus()
        surroundings = Surroundings(memory, Anon, vm)
        bus = stack.enter_context(VirtioBus([("rng0", Spec())], surroundings, (), mmio, vcpu.area))
        sregs = vcpu.get_sregs()
        sregs.ds.base = VIRTIO_MMIO_BASE
        vcpu.set_sregs(sregs)
        bus.transports[0].interrupt_status.raise_(3)
        values: list[int] = []
        exits: list[tuple[int, bool]] = []
        while len(values) < 2:
            if vcpu.run() == uapi.KVM_EXIT_IO:
                values += struct.unpack_from("<I", vcpu.area, uapi.KVM_PIO_PAGE_OFFSET * 4096)
                continue
            exit_ = vcpu.exit_state().mmio
            exits.append((exit_.phys_addr - VIRTIO_MMIO_BASE, bool(exit_.is_write)))
            if exit_.is_write:
                mmio.write(exit_.phys_addr, exit_.len, int.from_bytes(bytes(exit_.data)[: exit_.len], "little"))
            else:
                struct.pack_into("<I", vcpu.area, 40, mmio.read(exit_.phys_addr, exit_.len))  # kvm_run.mmio.data
        assert values == [2, int.from_bytes(b"virt", "little")]
        assert exits == [
            (reg.VIRTIO_MMIO_INTERRUPT_ACK, True),
            (reg.VIRTIO_MMIO_INTERRUPT_STATUS, False),
            (reg.VIRTIO_MMIO_MAGIC_VALUE, False),
        ]


@pytest.mark.parametrize("ram", [RAM, 1 << 20], ids=["ordinary-pages", "guest-pages"])
def test_what_leaves_the_guest(kvm: Kvm, vm: Vm, ram: int) -> None:
    for capability in (uapi.KVM_CAP_READONLY_MEM, uapi.KVM_CAP_COALESCED_MMIO):
        if not vm.check_extension(capability):
            pytest.skip(f"this KVM lacks capability {capability}: interrupts without exits were not tested")
    before = descriptors()
    vm.create_irqchip()
    said: list[str] = []
    code = (
        load_register(reg.VIRTIO_MMIO_MAGIC_VALUE)
        + load_register(reg.VIRTIO_MMIO_INTERRUPT_STATUS)
        + store_register(reg.VIRTIO_MMIO_INTERRUPT_ACK, 1)
        + store_register(reg.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
        + store_register(reg.VIRTIO_MMIO_STATUS, 1)
        + load_register(reg.VIRTIO_MMIO_STATUS)
        + store_register(reg.VIRTIO_MMIO_QUEUE_NOTIFY, 9)
        + load_register(reg.VIRTIO_MMIO_INTERRUPT_STATUS)
    )
    with ExitStack() as stack:
        vcpu, memory = load(vm, code, ram=ram)
        stack.enter_context(memory)
        stack.enter_context(vcpu)
        mmio = MmioBus()
        bus = VirtioBus([("rng0", Spec())], Surroundings(memory, Anon, vm, said.append), (), mmio, vcpu.area)
        stack.enter_context(bus)
        bus.start()
        sregs = vcpu.get_sregs()
        sregs.ds.base = VIRTIO_MMIO_BASE
        vcpu.set_sregs(sregs)
        transport = bus.transports[0]
        transport.interrupt_status.raise_(1)

        def out() -> int:
            assert vcpu.run() == uapi.KVM_EXIT_IO
            value: int
            (value,) = struct.unpack_from("<I", vcpu.area, uapi.KVM_PIO_PAGE_OFFSET * 4096)
            return value

        def written() -> tuple[int, int]:
            assert vcpu.run() == uapi.KVM_EXIT_MMIO
            exit_ = vcpu.exit_state().mmio
            assert exit_.is_write and exit_.len == 4
            value = int.from_bytes(bytes(exit_.data)[:4], "little")
            mmio.write(exit_.phys_addr, exit_.len, value)
            return exit_.phys_addr - VIRTIO_MMIO_BASE, value

        assert out() == int.from_bytes(b"virt", "little")
        assert out() == 1
        # The acknowledgement and the kick come before this exit, and are none.
        assert written() == (reg.VIRTIO_MMIO_STATUS, 1)
        transport.worker.call(lambda: None)
        assert len(said) == 1 and "before it has set the device up" in said[0]
        assert out() == 1  # the status, as written
        assert written() == (reg.VIRTIO_MMIO_QUEUE_NOTIFY, 9)  # no queue of ours
        transport.interrupt_status.raise_(2)  # and now the acknowledgement is seen
        assert out() == 2
    assert descriptors() - before == set()
