"""Interrupts whose acknowledgements KVM has noted down in a ring."""

import mmap
import struct

from hypothesis import given
from hypothesis import strategies as st

from offmap.devices.virtio.interrupts import Interrupts, InterruptStatus
from offmap.kvm.coalesced import CoalescedRing
from offmap.uapi.kvm import KVM_COALESCED_MMIO_MAX, KVM_COALESCED_MMIO_PAGE_OFFSET

ACK = 0xD000_0064
OTHER_ACK = 0xD000_1064


class Kernel:
    """KVM's side of the ring (virt/kvm/coalesced_mmio.c)."""

    def __init__(self) -> None:
        self.area = memoryview(bytearray(3 * mmap.PAGESIZE))
        self.page = self.area[KVM_COALESCED_MMIO_PAGE_OFFSET * mmap.PAGESIZE :]

    def note(self, address: int, value: int, length: int = 4) -> bool:
        """False where the ring is full, which is an exit."""
        first, last = struct.unpack_from("<II", self.page)
        if (first - last - 1) % KVM_COALESCED_MMIO_MAX == 0:
            return False
        struct.pack_into("<QIIQ", self.page, 8 + 24 * last, address, length, 0, value)
        struct.pack_into("<I", self.page, 4, (last + 1) % KVM_COALESCED_MMIO_MAX)
        return True


class Guest:
    """What one device's register shows, and how often it was interrupted."""

    def __init__(self, interrupts: Interrupts, address: int) -> None:
        self.shown = 0
        self.signals = 0
        self.status = InterruptStatus(interrupts, self._show, self._signal)
        interrupts.register(address, self.status)

    def _show(self, value: int) -> None:
        self.shown = value

    def _signal(self) -> None:
        self.signals += 1


def test_an_acknowledgement_takes_effect_before_the_next_interrupt() -> None:
    kernel = Kernel()
    guest = Guest(Interrupts(CoalescedRing(kernel.area)), ACK)
    guest.status.raise_(1)
    assert (guest.shown, guest.signals) == (1, 1)
    assert kernel.note(ACK, 1)
    assert guest.shown == 1  # nobody has looked
    guest.status.raise_(2)
    assert (guest.shown, guest.signals) == (2, 2)


def test_it_never_takes_a_later_interrupt_away() -> None:
    kernel = Kernel()
    guest = Guest(Interrupts(CoalescedRing(kernel.area)), ACK)
    guest.status.raise_(1)
    kernel.note(ACK, 1)
    guest.status.raise_(1)
    assert guest.shown == 1
    guest.status.raise_(2)
    assert guest.shown == 3


def test_devices_are_told_apart() -> None:
    kernel = Kernel()
    interrupts = Interrupts(CoalescedRing(kernel.area))
    first, second = Guest(interrupts, ACK), Guest(interrupts, OTHER_ACK)
    first.status.raise_(1)
    second.status.raise_(1)
    kernel.note(ACK, 1)
    kernel.note(0x1234, 1)
    kernel.note(OTHER_ACK, 1, length=2)  # not a write of the register
    second.status.raise_(2)
    assert second.shown == 3
    first.status.raise_(2)
    assert first.shown == 2


def test_a_full_ring_is_an_exit_and_is_emptied_by_it() -> None:
    kernel = Kernel()
    guest = Guest(Interrupts(CoalescedRing(kernel.area)), ACK)
    guest.status.raise_(3)
    while kernel.note(ACK, 1):
        pass
    guest.status.acknowledge(2)
    assert guest.shown == 0
    assert kernel.note(ACK, 1)


def test_without_a_ring_each_is_an_exit() -> None:
    guest = Guest(Interrupts(None), ACK)
    guest.status.raise_(3)
    guest.status.acknowledge(1)
    assert guest.shown == 2
    guest.status.reset()
    assert guest.shown == 0


@given(st.lists(st.integers(0, 400), max_size=20))
def test_the_ring_goes_round(counts: list[int]) -> None:
    kernel = Kernel()
    ring = CoalescedRing(kernel.area)
    expected = 0
    for count in counts:
        noted = [value for value in range(expected, expected + count) if kernel.note(ACK, value)]
        assert len(noted) == min(count, KVM_COALESCED_MMIO_MAX - 1)
        assert list(ring.take()) == [(ACK, value) for value in noted]
        expected += count
    assert list(ring.take()) == []
