"""The transport's registers (virtio 1.2, 4.2.2), one rule after another."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.device import Activation, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.memory.guest import GuestMemory
from offmap.uapi.virtio import mmio as reg
from offmap.uapi.virtio.config import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_ID_CONSOLE,
)
from offmap.uapi.virtio.ring import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC

from .driver import WRITE, Driver, guest_memory
from .transport import VERSION_1, Wired

FEATURE = 1 << 3


class Echo(VirtioDevice):
    """Writes what it reads to what it may write; has a configuration of 8 bytes, of which 4 can be written."""

    device_id: ClassVar[int] = VIRTIO_ID_CONSOLE
    queue_sizes = (8, 16)
    features = FEATURE

    def __init__(self) -> None:
        self.content = bytearray(b"\1\2\3\4\5\6\7\x08")
        self.activation: Activation | None = None
        self.resets = 0
        self.closed = False
        self.on_handle: Callable[[], None] = lambda: None

    def config(self) -> bytes:
        return bytes(self.content)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset >= 4:
            self.content[offset : offset + len(data)] = data

    def activate(self, activation: Activation) -> None:
        self.activation = activation

    def handle(self, queue: int) -> None:
        self.on_handle()
        assert self.activation is not None
        requests = self.activation.queues[queue]
        assert requests is not None
        for chain in requests.chains():
            data = b"".join(chain.readable)
            chain.writable[0][: len(data)] = data
            requests.push(chain, len(data))
        requests.notify()

    def reset(self) -> None:
        self.activation = None
        self.resets += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory() as memory:
        yield memory


@pytest.fixture
def wired(memory: GuestMemory) -> Iterator[Wired]:
    with Wired(Echo(), Driver(memory), Driver(memory, 16, base=0x80000)) as wired:
        yield wired


def echo(wired: Wired) -> Echo:
    assert isinstance(wired.device, Echo)
    return wired.device


def test_identity(wired: Wired) -> None:
    assert bytes(wired.page[:4]) == b"virt"
    assert wired.read(reg.VIRTIO_MMIO_VERSION) == 2
    assert wired.read(reg.VIRTIO_MMIO_DEVICE_ID) == VIRTIO_ID_CONSOLE
    assert wired.status == 0
    assert wired.offered() == FEATURE | VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    wired.write(reg.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2)
    assert wired.read(reg.VIRTIO_MMIO_DEVICE_FEATURES) == 0


def test_from_set_up_to_an_answer(wired: Wired) -> None:
    wired.set_up(FEATURE)
    activation = echo(wired).activation
    assert activation is not None and activation.features == FEATURE | VERSION_1 and activation.has(3)
    first, second = wired.drivers
    first.add(b"first", 10)
    wired.kick(0)
    assert first.result() == b"first"
    second.add(b"second", 10)
    wired.kick(1)
    assert second.result() == b"second"
    assert wired.interrupts == 2
    assert wired.read(reg.VIRTIO_MMIO_INTERRUPT_STATUS) == reg.VIRTIO_MMIO_INT_VRING
    wired.write(reg.VIRTIO_MMIO_INTERRUPT_ACK, reg.VIRTIO_MMIO_INT_VRING)
    assert wired.read(reg.VIRTIO_MMIO_INTERRUPT_STATUS) == 0
    assert wired.said == []


def test_buffers_that_were_there_before_the_driver_was_ready(wired: Wired) -> None:
    wired.drivers[0].add(b"early", 8)
    wired.set_up()
    wired.settle()
    assert wired.drivers[0].result() == b"early"


def test_queues_are_told_apart(wired: Wired) -> None:
    for number, size in ((0, 8), (1, 16), (2, 0), (0xFFFFFFFF, 0)):
        wired.write(reg.VIRTIO_MMIO_QUEUE_SEL, number)
        assert wired.read(reg.VIRTIO_MMIO_QUEUE_NUM_MAX) == size
    wired.set_up_queue(1, wired.drivers[1])
    assert wired.read(reg.VIRTIO_MMIO_QUEUE_READY) == 1
    wired.write(reg.VIRTIO_MMIO_QUEUE_SEL, 0)
    assert wired.read(reg.VIRTIO_MMIO_QUEUE_READY) == 0
    wired.write(reg.VIRTIO_MMIO_QUEUE_SEL, 7)
    wired.write(reg.VIRTIO_MMIO_QUEUE_READY, 1)
    assert wired.read(reg.VIRTIO_MMIO_QUEUE_READY) == 0


@pytest.mark.parametrize("features", [0, FEATURE, VERSION_1 | 1 << 5, VERSION_1 | 1 << 40, VERSION_1 | 1 << 63])
def test_features_that_are_not_granted(wired: Wired, features: int) -> None:
    """Without VIRTIO_F_VERSION_1, or with what was not offered."""
    assert not wired.negotiate(features)
    wired.write(reg.VIRTIO_MMIO_STATUS, wired.status | VIRTIO_CONFIG_S_DRIVER_OK)
    assert not wired.status & VIRTIO_CONFIG_S_DRIVER_OK
    assert echo(wired).activation is None


def test_features_in_words_that_there_are_not(wired: Wired) -> None:
    wired.write(reg.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2)
    wired.write(reg.VIRTIO_MMIO_DRIVER_FEATURES, 0)
    wired.write(reg.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0xFFFFFFFF)
    wired.write(reg.VIRTIO_MMIO_DRIVER_FEATURES, 1)
    assert not wired.negotiate(VERSION_1)


def test_features_stand_once_they_are_granted(wired: Wired) -> None:
    assert wired.negotiate(VERSION_1)
    wired.write(reg.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0)
    wired.write(reg.VIRTIO_MMIO_DRIVER_FEATURES, FEATURE)
    wired.write(reg.VIRTIO_MMIO_STATUS, wired.status | VIRTIO_CONFIG_S_DRIVER_OK)
    activation = echo(wired).activation
    assert activation is not None and activation.features == VERSION_1


def test_steps_that_are_skipped(wired: Wired) -> None:
    wired.write(reg.VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_FEATURES_OK)
    assert wired.status == 0
    wired.write(reg.VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER_OK)
    assert wired.status == VIRTIO_CONFIG_S_ACKNOWLEDGE
    # Bits go only by a reset, and NEEDS_RESET is not the driver's to set.
    wired.write(reg.VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_NEEDS_RESET)
    assert wired.status == VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER


def test_reset_forgets_everything(wired: Wired) -> None:
    wired.set_up(FEATURE)
    wired.drivers[0].add(b"x", 1)
    wired.kick()
    wired.write(reg.VIRTIO_MMIO_STATUS, 0)
    assert wired.status == 0
    assert wired.read(reg.VIRTIO_MMIO_QUEUE_READY) == 0
    assert wired.read(reg.VIRTIO_MMIO_INTERRUPT_STATUS) == 0
    assert (echo(wired).activation, echo(wired).resets) == (None, 1)
    wired.drivers[0].add(b"x", 1)
    wired.kick()  # late, and nobody's business
    assert wired.drivers[0].used_idx() == 1
    assert wired.said == []
    wired.drivers = (Driver(wired.drivers[0].memory), wired.drivers[1])
    wired.drivers[0].memory.write(0x9000, bytes(0x2000))
    wired.set_up()
    wired.drivers[0].add(b"again", 5)
    wired.kick()
    assert wired.drivers[0].result() == b"again"


def test_a_kick_for_a_device_that_was_never_set_up_is_one_line(wired: Wired) -> None:
    wired.kick(0)
    wired.kick(1)
    assert len(wired.said) == 1 and "before it has set the device up" in wired.said[0]
    assert not wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
    wired.set_up()
    wired.drivers[0].add(b"fine", 4)
    wired.kick()
    assert wired.drivers[0].result() == b"fine"


@pytest.mark.parametrize("size", [0, 3, 16, 65535, 1 << 31])
def test_a_queue_of_a_size_that_cannot_be(wired: Wired, size: int) -> None:
    assert wired.negotiate(VERSION_1)
    wired.set_up_queue(1, wired.drivers[1])
    wired.write(reg.VIRTIO_MMIO_QUEUE_SEL, 0)
    wired.write(reg.VIRTIO_MMIO_QUEUE_NUM, size)
    wired.write(reg.VIRTIO_MMIO_QUEUE_READY, 1)
    wired.write(reg.VIRTIO_MMIO_STATUS, wired.status | VIRTIO_CONFIG_S_DRIVER_OK)
    assert wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
    assert wired.read(reg.VIRTIO_MMIO_INTERRUPT_STATUS) == reg.VIRTIO_MMIO_INT_CONFIG
    assert wired.interrupts == 1
    assert len(wired.said) == 1 and f"size {size}" in wired.said[0]


def test_a_driver_that_breaks_the_rules_needs_a_reset_and_can_go_on_after_it(wired: Wired) -> None:
    wired.set_up()
    broken = wired.drivers[0]
    for number in range(5):
        broken.descriptor(0, 1 << 40, 16, WRITE)
        broken.make_available(0)
        wired.kick()
        assert wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
        assert wired.read(reg.VIRTIO_MMIO_INTERRUPT_STATUS) & reg.VIRTIO_MMIO_INT_CONFIG
        wired.drivers[1].add(b"dead", 4)
        wired.kick(1)
        assert wired.drivers[1].used_idx() == 0  # all of the device is
        wired.write(reg.VIRTIO_MMIO_STATUS, 0)
        for driver in wired.drivers:
            broken.memory.write(driver.avail, bytes(0x2000))
            driver.avail_idx = driver.seen = 0
        wired.set_up()
        assert not wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
        assert len(wired.said) == min(number + 1, 3)
    assert "no more of this device" in wired.said[-1]
    broken.add(b"alive", 5)
    wired.kick()
    assert broken.result() == b"alive"


def test_a_fault_of_ours_is_the_devices_own(wired: Wired) -> None:
    wired.set_up()

    def fail() -> None:
        raise ZeroDivisionError("division by zero")

    echo(wired).on_handle = fail
    wired.kick()
    assert wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
    assert "failed unexpectedly, ZeroDivisionError: division by zero (fail" in wired.said[0]


def test_a_fault_while_it_is_set_up_does_not_end_the_vcpu(wired: Wired) -> None:
    def refuse() -> None:
        raise DriverError("cannot be")

    echo(wired).on_handle = refuse
    wired.set_up()
    assert wired.status & VIRTIO_CONFIG_S_NEEDS_RESET


def test_a_queue_that_the_driver_stops(wired: Wired) -> None:
    wired.set_up()
    wired.write(reg.VIRTIO_MMIO_QUEUE_SEL, 0)
    wired.write(reg.VIRTIO_MMIO_QUEUE_READY, 0)
    assert wired.read(reg.VIRTIO_MMIO_QUEUE_READY) == 0
    wired.drivers[0].add(b"x", 1)
    wired.kick(0)
    assert wired.drivers[0].used_idx() == 0
    wired.drivers[1].add(b"other", 5)
    wired.kick(1)
    assert wired.drivers[1].result() == b"other"


def test_a_ready_queue_keeps_its_addresses(wired: Wired) -> None:
    assert wired.negotiate(VERSION_1)
    wired.set_up_queue(0, wired.drivers[0])
    wired.write(reg.VIRTIO_MMIO_QUEUE_DESC_LOW, 0xFFFFFFF0)
    wired.write(reg.VIRTIO_MMIO_QUEUE_NUM, 3)
    wired.write(reg.VIRTIO_MMIO_STATUS, wired.status | VIRTIO_CONFIG_S_DRIVER_OK)
    assert not wired.status & VIRTIO_CONFIG_S_NEEDS_RESET


def test_configuration(wired: Wired) -> None:
    generation = wired.read(reg.VIRTIO_MMIO_CONFIG_GENERATION)
    assert bytes(wired.page[0x100:0x108]) == b"\1\2\3\4\5\6\7\x08"
    wired.write(reg.VIRTIO_MMIO_CONFIG + 4, 0x0A0B, size=2)
    assert bytes(wired.page[0x100:0x108]) == b"\1\2\3\4\x0b\x0a\7\x08"
    assert wired.read(reg.VIRTIO_MMIO_CONFIG_GENERATION) != generation
    generation = wired.read(reg.VIRTIO_MMIO_CONFIG_GENERATION)
    wired.write(reg.VIRTIO_MMIO_CONFIG, 0xFF, size=1)  # not writable
    wired.write(reg.VIRTIO_MMIO_CONFIG + 6, 0xFFFFFFFF)  # over its end
    wired.write(reg.VIRTIO_MMIO_CONFIG + 0xE00, 0xFFFFFFFF)
    assert bytes(wired.page[0x100:0x108]) == b"\1\2\3\4\x0b\x0a\7\x08"
    assert wired.read(reg.VIRTIO_MMIO_CONFIG_GENERATION) == generation
    assert wired.interrupts == 0


def test_a_configuration_that_changes(wired: Wired) -> None:
    wired.set_up()
    device = echo(wired)

    def change() -> None:
        device.content[0] = 0x7F
        assert device.activation is not None
        device.activation.config_changed()

    wired.transport.worker.call(change)
    assert wired.page[0x100] == 0x7F
    assert wired.interrupts == 1
    assert wired.read(reg.VIRTIO_MMIO_INTERRUPT_STATUS) == reg.VIRTIO_MMIO_INT_CONFIG


def test_there_is_no_shared_memory(wired: Wired) -> None:
    def region() -> tuple[int, int]:
        words = [wired.read(register) for register in range(reg.VIRTIO_MMIO_SHM_LEN_LOW, 0xC0, 4)]
        return words[0] | words[1] << 32, words[2] | words[3] << 32

    assert region() == ((1 << 64) - 1, (1 << 64) - 1)
    wired.write(reg.VIRTIO_MMIO_SHM_SEL, 1)
    assert region() == ((1 << 64) - 1, (1 << 64) - 1)


def test_what_is_no_register_is_lost(wired: Wired) -> None:
    before = bytes(wired.page)
    for offset in range(0, 0x100, 4):
        if offset not in (reg.VIRTIO_MMIO_STATUS, reg.VIRTIO_MMIO_QUEUE_SEL):
            for size in (1, 2, 8):
                wired.write(offset, 1, size=size)
    wired.write(reg.VIRTIO_MMIO_MAGIC_VALUE, 7)
    wired.write(reg.VIRTIO_MMIO_QUEUE_NUM_MAX, 7)
    wired.write(reg.VIRTIO_MMIO_STATUS, 1, size=1)
    assert bytes(wired.page) == before


def test_the_page_is_what_an_exit_reads(wired: Wired) -> None:
    assert wired.transport.read(reg.VIRTIO_MMIO_MAGIC_VALUE, 4) == int.from_bytes(b"virt", "little")
    assert wired.transport.read(reg.VIRTIO_MMIO_CONFIG + 1, 2) == 0x0302
    assert wired.transport.read(reg.VIRTIO_MMIO_CONFIG, 8) == 0x0807060504030201


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*range(0, 0x108, 4), 0xFFC]),
            st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 0x40, 0xFF, 0x1000, 0x9000, 0xA000, 0xFFFFFFFF]),
            st.sampled_from([4, 4, 4, 1, 8]),
        ),
        max_size=60,
    )
)
def test_random_writes_raise_nothing(writes: list[tuple[int, int, int]]) -> None:
    with ExitStack() as stack:
        memory = stack.enter_context(guest_memory())
        wired = stack.enter_context(Wired(Echo(), Driver(memory), Driver(memory, 16, base=0x80000)))
        for offset, value, size in writes:
            wired.write(offset, value & (1 << 8 * size) - 1, size=size)
        wired.write(reg.VIRTIO_MMIO_STATUS, 0)
        assert wired.status == 0
        wired.set_up()
        assert wired.status & VIRTIO_CONFIG_S_DRIVER_OK
