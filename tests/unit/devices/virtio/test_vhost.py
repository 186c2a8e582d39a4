"""vhost-net: what the kernel is told, and that the device leaves the queues alone meanwhile."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.devices.virtio.dma import Dma, DriverError
from offmap.devices.virtio.net import CTRL, RX, TX, Net
from offmap.devices.virtio.vhost import VhostNet, open_vhost_net
from offmap.errors import KernelError, OffmapError
from offmap.memory.iomem import PhysicalRange
from offmap.uapi import vhost as uapi

from .bench import Bench
from .driver import guest_memory
from .test_net import HEADER, MAC, Wire


class Kernel(VhostNet):
    """Writes down the ioctls, instead of making them."""

    def __init__(self) -> None:
        super().__init__(os.eventfd(0))
        self.calls: list[tuple[str, bytes]] = []
        self.refuses = ""

    def call(self, name: str, request: int, argument: object = 0, remedy: str = "") -> int:
        if name == self.refuses:
            raise KernelError(name, 7)
        self.calls.append((name, bytes(argument)))  # type: ignore[call-overload]
        return 0

    def files(self, name: str) -> list[tuple[int, int]]:
        return [struct.unpack("<Ii", argument) for called, argument in self.calls if called == name]


class Card:
    def __init__(self, refuses: str = "") -> None:
        self.wire, self.kernel = Wire(), Kernel()
        self.kernel.refuses = refuses
        self.said: list[str] = []
        self.net = Net(self.wire, MAC, None, self.said.append, self.kernel)
        self.bench = Bench(self.net, bypass=True)


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    with card.bench:
        yield card


def test_the_kernel_gets_the_queues_and_their_eventfds(card: Card) -> None:
    bench, kernel = card.bench, card.kernel
    assert kernel.files("VHOST_SET_VRING_KICK") == [(0, bench.kicks[RX]), (1, bench.kicks[TX])]
    assert kernel.files("VHOST_SET_VRING_CALL") == [(0, bench.irq), (1, bench.irq)]
    assert kernel.files("VHOST_NET_SET_BACKEND") == [(0, card.wire.fd), (1, card.wire.fd)]
    assert bench.bypassed == {RX, TX}
    table = dict(kernel.calls)["VHOST_SET_MEM_TABLE"]
    backing = bench.memory.backings[0]
    assert table == struct.pack("<IIQQQQ", 1, 0, 0, bench.memory.size, backing.address, 0)
    addresses = [argument for name, argument in kernel.calls if name == "VHOST_SET_VRING_ADDR"]
    index, _, desc, used, avail, _ = struct.unpack("<IIQQQQ", addresses[1])
    driver = bench.drivers[TX]
    assert (index, desc, used, avail) == (
        1,
        *(backing.address + where for where in (driver.desc, driver.used, driver.avail)),
    )


def test_the_packets_are_not_ours(card: Card) -> None:
    card.bench.drivers[RX].add(1600)
    card.bench.drivers[TX].add(HEADER + b"x" * 60)
    card.net.handle(RX)
    card.net.handle(TX)
    assert card.wire.sent == [] and card.wire.receives == 0
    assert card.wire.fd not in card.bench.watched
    card.wire.link(False)
    card.bench.settle()
    assert card.bench.config_changes == 1


def test_a_reset_takes_everything_back(card: Card) -> None:
    card.kernel.calls.clear()
    card.net.reset()
    assert card.kernel.files("VHOST_NET_SET_BACKEND") == [(0, -1), (1, -1)]
    assert card.kernel.files("VHOST_SET_VRING_KICK") == [(0, -1), (1, -1)]
    assert not card.bench.watched
    card.kernel.calls.clear()
    card.bench.activate()
    assert card.kernel.files("VHOST_NET_SET_BACKEND") == [(0, card.wire.fd), (1, card.wire.fd)]


def test_a_pause_takes_the_queues_away_and_no_kick_is_lost(card: Card) -> None:
    unbound, bound = [(0, -1), (1, -1)], [(0, card.wire.fd), (1, card.wire.fd)]
    for number in (RX, TX):
        os.eventfd_read(card.bench.kicks[number])  # of the start
    card.kernel.calls.clear()
    card.net.pause()
    assert card.kernel.files("VHOST_NET_SET_BACKEND") == unbound
    card.net.resume()
    assert card.kernel.files("VHOST_NET_SET_BACKEND") == unbound + bound
    assert [os.eventfd_read(card.bench.kicks[number]) for number in (RX, TX)] == [1, 1]
    card.net.reset()
    card.kernel.calls.clear()
    card.net.pause()
    card.net.resume()
    assert card.kernel.calls == []


def test_a_broken_ring_is_the_drivers_error(card: Card) -> None:
    os.eventfd_write(card.kernel.errors, 1)
    card.kernel.calls.clear()
    with pytest.raises(DriverError, match="host kernel"):
        card.bench.settle()
    assert card.kernel.files("VHOST_NET_SET_BACKEND") == [(0, -1), (1, -1)]


def test_a_broken_control_queue_ends_it_too(card: Card) -> None:
    card.kernel.calls.clear()
    card.bench.drivers[CTRL].add(b"x", 1)
    with pytest.raises(DriverError):
        card.net.handle(CTRL)
    assert card.kernel.files("VHOST_NET_SET_BACKEND") == [(0, -1), (1, -1)]


@pytest.mark.parametrize("call", ["VHOST_SET_MEM_TABLE", "VHOST_SET_VRING_ADDR"])
def test_what_the_kernel_does_not_take_goes_through_us(call: str) -> None:
    card = Card(refuses=call)
    with card.bench:
        assert len(card.said) == 1 and call in card.said[0] and "through this process" in card.said[0]
        assert card.bench.bypassed == set()
        card.bench.drivers[TX].add(HEADER + b"x" * 60)
        card.net.handle(TX)
        assert card.wire.sent == [HEADER + b"x" * 60]


def test_a_driver_that_resets_its_card_over_and_over_does_not_fill_the_log() -> None:
    card = Card(refuses="VHOST_SET_MEM_TABLE")
    with card.bench:
        for _ in range(20):
            card.net.reset()
            card.bench.activate()
        assert len(card.said) == 1


def test_pages_kept_from_the_guest_are_kept_from_the_kernel_too() -> None:
    kernel = Kernel()
    with guest_memory() as memory:
        dma = Dma(memory.regions, [PhysicalRange(0x5000, 0x6000)])
        try:
            with kernel, Bench(Net(Wire(), MAC, None, lambda _: None), bypass=True) as bench:
                kernel.start(0, [], 0, dma, bench.bypass())
            table = dict(kernel.calls)["VHOST_SET_MEM_TABLE"]
            regions = [table[start : start + 32] for start in range(8, len(table), 32)]
            assert [struct.unpack_from("<QQ", region) for region in regions] == [
                (0, 0x5000),
                (0x6000, memory.size - 0x6000),
            ]
        finally:
            dma.release()
    assert uapi.vhost_memory.nregions.size == 4


def test_a_host_without_it() -> None:
    if Path("/dev/vhost-net").exists():
        pytest.skip("this host has vhost-net: that one without it says so was not tried")
    with pytest.raises(OffmapError, match="load the module vhost_net"):
        open_vhost_net(hidden=False)
