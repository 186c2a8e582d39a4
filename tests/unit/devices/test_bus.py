"""The buses: dispatch, refusal of overlaps, and what an empty slot answers."""

from collections.abc import Sequence

import pytest

from offmap.devices.bus import BusConflict, MmioBus, PioBus


class Latch:
    """Remembers its accesses; answers the low byte of the port."""

    def __init__(self, *ports: range, byte_wide: bool = True) -> None:
        self._ports = ports
        self.byte_wide = byte_wide
        self.seen: list[tuple[int, ...]] = []

    def ports(self) -> Sequence[range]:
        return self._ports

    def read(self, port: int, size: int) -> int:
        self.seen.append((port, size))
        return port & 0xFF

    def write(self, port: int, size: int, value: int) -> None:
        self.seen.append((port, size, value))


def test_a_port_reaches_its_device_and_no_other() -> None:
    bus, one, two = PioBus(), Latch(range(0x10, 0x12)), Latch(range(0x12, 0x13), range(0x20, 0x21))
    bus.attach(one)
    bus.attach(two)
    assert bus.read(0x11, 1) == 0x11
    bus.write(0x20, 1, 7)
    assert one.seen == [(0x11, 1)]
    assert two.seen == [(0x20, 1, 7)]


@pytest.mark.parametrize(("size", "value"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_an_unclaimed_port_reads_all_ones_and_swallows_writes(size: int, value: int) -> None:
    bus = PioBus()
    bus.write(0x80, size, 0)
    assert bus.read(0x80, size) == value


def test_wide_accesses_are_split_into_bytes_for_a_byte_wide_device() -> None:
    bus, latch = PioBus(), Latch(range(0x70, 0x72))
    bus.attach(latch)
    bus.write(0x70, 2, 0xABCD)
    assert latch.seen == [(0x70, 1, 0xCD), (0x71, 1, 0xAB)]
    assert bus.read(0x70, 4) == 0xFFFF7170


def test_wide_accesses_reach_a_wide_device_whole() -> None:
    bus, latch = PioBus(), Latch(range(0xCF8, 0xD00), byte_wide=False)
    bus.attach(latch)
    bus.write(0xCF8, 4, 0x80000000)
    bus.read(0xCFC, 2)
    assert latch.seen == [(0xCF8, 4, 0x80000000), (0xCFC, 2)]


def test_a_wide_access_beside_a_device_does_not_touch_it() -> None:
    bus, latch = PioBus(), Latch(range(0xCF9, 0xCFA))
    bus.attach(latch)
    bus.write(0xCF8, 4, 0xFFFFFFFF)
    assert bus.read(0xCF8, 4) == 0xFFFFFFFF
    assert latch.seen == []


@pytest.mark.parametrize("ports", [range(0x11, 0x12), range(0x0F, 0x11), range(0xFFFF, 0x10001)])
def test_a_taken_or_impossible_port_is_refused_and_nothing_is_attached(ports: range) -> None:
    bus, newcomer = PioBus(), Latch(range(0x40, 0x41), ports)
    bus.attach(Latch(range(0x10, 0x12)))
    with pytest.raises(BusConflict, match="Latch claims port"):
        bus.attach(newcomer)
    assert bus.read(0x40, 1) == 0xFF


def test_mmio_devices_see_offsets_and_never_a_straddling_access() -> None:
    bus, low, high = MmioBus(), Latch(), Latch()
    bus.attach(0xD0001000, 0x1000, high)
    bus.attach(0xD0000000, 0x1000, low)
    bus.write(0xD0000FFC, 4, 1)
    assert bus.read(0xD0001004, 4) == 4
    assert (low.seen, high.seen) == ([(0xFFC, 4, 1)], [(4, 4)])
    assert bus.read(0xD0000FFE, 4) == 0xFFFFFFFF
    assert bus.read(0xCFFFFFFF, 1) == 0xFF
    assert bus.read(0xD0002000, 8) == (1 << 64) - 1
    bus.write(0xD0001FFE, 4, 1)
    assert (len(low.seen), len(high.seen)) == (1, 1)


@pytest.mark.parametrize(("base", "length"), [(0x0, 0x1001), (0x1FFF, 1), (0x1000, 0x1000), (0x1800, 0x1000), (0, 0)])
def test_mmio_overlaps_are_refused(base: int, length: int) -> None:
    bus = MmioBus()
    bus.attach(0x1000, 0x1000, Latch())
    with pytest.raises(BusConflict):
        bus.attach(base, length, Latch())
