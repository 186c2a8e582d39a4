"""The network card against a host's side that the test plays."""

import contextlib
import errno
import os
import select
import struct
from collections import deque
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import length
from offmap.devices.virtio.net import CTRL, RX, TX, Net
from offmap.errors import KernelError
from offmap.uapi import if_tun
from offmap.uapi.virtio import net as uapi

from .bench import Bench

MAC = bytes.fromhex("020000000001")
HEADER = bytes(12)
MERGEABLE = 1 << uapi.VIRTIO_NET_F_MRG_RXBUF


class Wire:
    """A backend: `arrive` is what the guest receives, `sent` what it has sent."""

    kind = "tap"
    has_vnet_hdr = True

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.changes = os.eventfd(0, os.EFD_NONBLOCK)
        self.up = True
        self.offload = -1
        self.full = False
        self.error = 0
        self.arriving: deque[bytes] = deque()
        self.sent: list[bytes] = []
        self.receives = 0

    def set_offload(self, flags: int) -> None:
        self.offload = flags

    def arrive(self, frame: bytes) -> None:
        self.arriving.append(HEADER + frame)
        os.eventfd_write(self.fd, 1)

    def receive(self, buffers: Sequence[memoryview]) -> int:
        self.receives += 1
        self._fail()
        if not self.arriving:
            raise BlockingIOError
        os.eventfd_read(self.fd)
        frame = self.arriving.popleft()
        done = 0
        for buffer in buffers:
            piece = frame[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def send(self, buffers: Sequence[memoryview]) -> None:
        self._fail()
        if self.full:
            raise BlockingIOError
        if length(buffers) < 12 + 14:
            raise OSError(errno.EINVAL, "")
        self.sent.append(b"".join(buffers))

    def _fail(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def flush(self) -> bool:
        return True

    def forget(self) -> None:
        pass

    def is_up(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.changes)
        return self.up

    def last_words(self) -> str:
        return "the test says so"

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.changes)

    def link(self, up: bool) -> None:
        self.up = up
        os.eventfd_write(self.changes, 1)


class Card:
    def __init__(self, features: int | None = None, size: int = 16) -> None:
        self.wire = Wire()
        self.said: list[str] = []
        self.net = Net(self.wire, MAC, 1400, self.said.append)
        self.bench = Bench(self.net, features=features, size=size)
        self.rx, self.tx, self.ctrl = self.bench.drivers

    def kick(self, queue: int) -> None:
        self.net.handle(queue)
        self.bench.settle()

    def packet(self) -> bytes:
        """The next packet that the guest gets, without its header."""
        first = self.rx.result()
        (buffers,) = struct.unpack_from("<H", first, 10)
        assert self.rx.used_idx() - self.rx.seen >= buffers - 1, "not all of a packet's buffers were given back at once"
        return b"".join([first, *(self.rx.result() for _ in range(buffers - 1))])[12:]

    def command(self, class_: int, command: int, *argument: bytes) -> int:
        self.ctrl.add(bytes([class_, command]), *argument, 1)
        self.kick(CTRL)
        return self.ctrl.result()[0]


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    with card.bench:
        yield card


@pytest.fixture
def plain() -> Iterator[Card]:
    """Give a card whose driver has taken no merged buffers and no large packets."""
    card = Card(features=0)
    with card.bench:
        yield card


def test_features_and_configuration(card: Card) -> None:
    assert card.net.features & MERGEABLE
    assert card.net.features >> uapi.VIRTIO_NET_F_HOST_TSO4 & 1
    assert not card.net.features >> uapi.VIRTIO_NET_F_HOST_UFO & 1
    config = uapi.virtio_net_config.from_buffer_copy(card.net.config())
    assert (bytes(config.mac), config.status, config.mtu) == (MAC, uapi.VIRTIO_NET_S_LINK_UP, 1400)
    assert card.wire.offload == if_tun.TUN_F_CSUM | if_tun.TUN_F_TSO4 | if_tun.TUN_F_TSO6 | if_tun.TUN_F_TSO_ECN


def test_offloads_are_those_that_the_driver_took(plain: Card) -> None:
    assert plain.wire.offload == 0


def test_without_headers_nothing_is_offloaded() -> None:
    wire = Wire()
    wire.has_vnet_hdr = False
    net = Net(wire, MAC, None, lambda _: None)
    assert not net.features & (1 << uapi.VIRTIO_NET_F_CSUM | 1 << uapi.VIRTIO_NET_F_GUEST_TSO4)
    assert not net.features >> uapi.VIRTIO_NET_F_MTU & 1
    net.close()


# To the guest


def test_packets_are_received_in_order_with_one_interrupt(plain: Card) -> None:
    for _ in range(8):
        plain.rx.add(1600)
    frames = [bytes([n]) * (60 + n) for n in range(5)]
    for frame in frames:
        plain.wire.arrive(frame)
    plain.kick(RX)
    assert [plain.packet() for _ in frames] == frames
    assert plain.rx.take() is None
    assert plain.rx.interrupts == 1


def test_a_large_packet_is_merged_over_buffers_that_are_given_back_at_once(card: Card) -> None:
    for _ in range(16):
        card.rx.add(4500)
    frame = os.urandom(60000)
    card.wire.arrive(frame)
    card.wire.arrive(b"small" * 20)
    card.kick(RX)
    assert card.packet() == frame
    # The rest of the ring holds less than the largest packet, but is all there is.
    assert card.rx.take() is None
    for _ in range(14):
        card.rx.add(4500)
    card.kick(RX)
    assert card.packet() == b"small" * 20


def test_a_ring_smaller_than_the_largest_packet_still_gets_small_ones(card: Card) -> None:
    for _ in range(16):
        card.rx.add(100)
    card.wire.arrive(b"x" * 3000)  # lost
    card.wire.arrive(b"y" * 300)
    card.kick(RX)
    assert card.packet() == b"y" * 300


def test_without_buffers_the_host_is_not_watched(plain: Card) -> None:
    plain.wire.arrive(b"a" * 60)
    plain.kick(RX)
    assert plain.wire.fd not in plain.bench.watched
    assert plain.wire.receives == 0
    plain.rx.add(1600)
    plain.kick(RX)
    assert plain.packet() == b"a" * 60
    plain.rx.add(1600)
    plain.kick(RX)
    assert plain.wire.fd in plain.bench.watched
    plain.wire.arrive(b"b" * 60)
    plain.bench.settle()
    assert plain.packet() == b"b" * 60


def test_a_packet_larger_than_its_buffer_is_lost(plain: Card) -> None:
    plain.rx.add(100)
    plain.wire.arrive(b"x" * 89)
    plain.wire.arrive(b"y" * 88)
    plain.kick(RX)
    assert plain.packet() == b"y" * 88


def test_the_header_may_be_in_pieces(plain: Card) -> None:
    plain.rx.add(5, 6, 100)
    plain.wire.arrive(b"z" * 60)
    plain.kick(RX)
    assert plain.packet() == b"z" * 60


def test_many_packets_leave_the_other_direction_its_share(plain: Card) -> None:
    plain.wire.full = False
    for _ in range(16):
        plain.tx.add(HEADER + b"t" * 60)
    plain.kick(TX)
    assert len(plain.wire.sent) == 16


@pytest.mark.parametrize("buffers", [(11,), (), (HEADER, 1600)])
def test_receive_buffers_that_the_specification_forbids(plain: Card, buffers: tuple[int | bytes, ...]) -> None:
    plain.rx.add(*(buffers or (b"",)))
    with pytest.raises(DriverError, match="receive buffer"):
        plain.net.handle(RX)


def test_receive_buffers_in_too_many_pieces() -> None:
    card = Card(size=1024)
    with card.bench:
        card.rx.add(*[12] * 1024)
        with pytest.raises(DriverError, match="pieces"):
            card.net.handle(RX)


# From the guest


def test_packets_are_sent_as_they_are(card: Card) -> None:
    card.tx.add(HEADER, b"a" * 14, b"b" * 46)
    card.tx.add(HEADER + b"c" * 60)
    card.kick(TX)
    assert card.wire.sent == [HEADER + b"a" * 14 + b"b" * 46, HEADER + b"c" * 60]
    assert card.tx.take() is not None and card.tx.take() is not None and card.tx.take() is None


@pytest.mark.parametrize("packet", [b"", b"short", HEADER])
def test_what_is_no_packet_is_lost_and_given_back(card: Card, packet: bytes) -> None:
    card.tx.add(packet)
    card.tx.add(HEADER + b"c" * 60)
    card.kick(TX)
    assert card.wire.sent == [HEADER + b"c" * 60]
    assert card.tx.used_idx() == 2


def test_a_transmit_buffer_may_not_be_writable(card: Card) -> None:
    card.tx.add(HEADER, 100)
    with pytest.raises(DriverError, match="transmit"):
        card.net.handle(TX)


def test_a_full_host_holds_the_guest_back(card: Card) -> None:
    card.wire.full = True
    card.tx.add(HEADER + b"c" * 60)
    card.net.handle(TX)
    assert card.tx.used_idx() == 0
    assert card.wire.fd in card.bench.watched
    card.wire.full = False  # an eventfd is always writable
    card.bench.settle()
    assert card.wire.sent == [HEADER + b"c" * 60]
    assert card.tx.used_idx() == 1


# The link


def test_a_link_that_goes_down_is_told_to_the_driver(card: Card) -> None:
    card.wire.link(False)
    card.bench.settle()
    assert card.bench.config_changes == 1
    assert uapi.virtio_net_config.from_buffer_copy(card.net.config()).status == 0
    assert card.said == ["net: the link is down: the test says so"]
    card.tx.add(HEADER + b"c" * 60)
    card.kick(TX)
    assert card.wire.sent == [] and card.tx.used_idx() == 1
    card.wire.link(True)
    card.bench.settle()
    assert card.bench.config_changes == 2
    card.tx.add(HEADER + b"d" * 60)
    card.kick(TX)
    assert card.wire.sent == [HEADER + b"d" * 60]


@pytest.mark.parametrize("number", [errno.EBADFD, errno.ECONNRESET])
@pytest.mark.parametrize("queue", [RX, TX])
def test_a_host_side_that_goes_for_good(plain: Card, number: int, queue: int) -> None:
    plain.wire.error = number
    plain.rx.add(1600)
    plain.tx.add(HEADER + b"c" * 60)
    plain.kick(queue)
    assert uapi.virtio_net_config.from_buffer_copy(plain.net.config()).status == 0
    assert plain.wire.fd not in plain.bench.watched
    assert len(plain.said) == 1
    plain.kick(TX)
    assert plain.tx.used_idx() == 1
    plain.bench.settle()


def test_a_tap_that_is_deleted_before_the_driver_comes(plain: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(flags: int) -> None:
        raise KernelError("TUNSETOFFLOAD", errno.EBADFD)

    plain.net.reset()
    plain.wire.up = False
    monkeypatch.setattr(plain.wire, "set_offload", gone)
    plain.bench.activate()
    assert uapi.virtio_net_config.from_buffer_copy(plain.net.config()).status == 0
    assert plain.said == ["net: the link is down: the test says so"]


def test_an_interface_that_goes_while_a_packet_waits_for_it(card: Card) -> None:
    """Without a receive buffer, and with a tap that never becomes writable again."""
    card.wire.full = True
    card.tx.add(HEADER + b"c" * 60)
    card.net.handle(TX)
    card.wire.full, card.wire.error = False, errno.EBADFD
    card.net._ready(select.EPOLLERR)
    assert card.wire.fd not in card.bench.watched
    assert card.tx.used_idx() == 1
    assert len(card.said) == 1


def test_kicks_of_a_driver_that_never_stops_sending_do_not_pile_up(card: Card) -> None:
    class Endless(list[bytes]):
        """A wire on which each packet makes the driver add another."""

        def append(self, packet: bytes) -> None:
            card.tx.add(HEADER + bytes(60))

    card.wire.sent = Endless()
    card.tx.add(HEADER + bytes(60))
    for _ in range(20):
        card.net.handle(TX)
        assert card.bench.posted == 1
    card.wire.sent = []


def test_the_interface_is_down_during_traffic(card: Card) -> None:
    card.wire.error, card.wire.up = errno.EIO, False
    card.tx.add(HEADER + b"c" * 60)
    card.kick(TX)
    assert card.tx.used_idx() == 1
    assert card.bench.config_changes == 1


def test_a_reset_forgets_everything(card: Card) -> None:
    card.rx.add(*[4500] * 3)
    card.wire.full = True
    card.tx.add(HEADER + b"c" * 60)
    card.net.handle(RX)
    card.net.handle(TX)
    card.net.reset()
    assert not card.bench.watched
    card.bench.features = 0
    card.bench.activate()
    card.rx, card.tx, card.ctrl = card.bench.drivers
    card.wire.full = False
    card.rx.add(1600)
    card.wire.arrive(b"n" * 60)
    card.kick(RX)
    assert card.packet() == b"n" * 60
    card.kick(TX)
    assert card.wire.sent == []


# Commands


def test_commands(card: Card) -> None:
    assert card.command(uapi.VIRTIO_NET_CTRL_RX, uapi.VIRTIO_NET_CTRL_RX_PROMISC, b"\1") == uapi.VIRTIO_NET_OK
    tables = struct.pack("<I", 0), struct.pack("<I6s", 1, MAC)
    assert card.command(uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_TABLE_SET, *tables) == uapi.VIRTIO_NET_OK
    new = bytes.fromhex("020000000002")
    assert card.command(uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_ADDR_SET, new) == uapi.VIRTIO_NET_OK
    assert card.net.config()[:6] == new
    assert card.command(uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_ADDR_SET, b"x") == uapi.VIRTIO_NET_ERR
    assert card.command(4, 0, b"\2\0") == uapi.VIRTIO_NET_ERR


@pytest.mark.parametrize("buffers", [(b"\0", 1), (b"\0\0",), (1,)])
def test_commands_that_are_none(card: Card, buffers: tuple[int | bytes, ...]) -> None:
    card.ctrl.add(*buffers)
    with pytest.raises(DriverError, match="command"):
        card.net.handle(CTRL)


# Hostile drivers


@given(
    st.lists(
        st.tuples(
            st.sampled_from([RX, TX, CTRL]),
            st.lists(st.one_of(st.binary(max_size=80), st.integers(0, 3000)), min_size=1, max_size=6),
        ),
        max_size=20,
    ),
    st.booleans(),
)
@settings(max_examples=150)
def test_whatever_the_driver_does_the_device_answers_or_raises_driver_error(
    chains: list[tuple[int, list[bytes | int]]], mergeable: bool
) -> None:
    card = Card(features=MERGEABLE if mergeable else 0)
    with card.bench:
        for queue, buffers in chains:
            card.bench.drivers[queue].add(*buffers)
            card.wire.arrive(b"f" * 200)
            try:
                card.net.handle(queue)
                card.bench.settle()
            except DriverError:
                card.net.reset()
                card.bench.activate()


@pytest.mark.parametrize(
    ("features", "allowed"),
    [
        ((uapi.VIRTIO_NET_F_GUEST_TSO4,), False),
        ((uapi.VIRTIO_NET_F_GUEST_CSUM, uapi.VIRTIO_NET_F_GUEST_ECN), False),
        ((uapi.VIRTIO_NET_F_HOST_TSO6,), False),
        ((uapi.VIRTIO_NET_F_CSUM, uapi.VIRTIO_NET_F_HOST_TSO6), True),
        ((uapi.VIRTIO_NET_F_GUEST_CSUM, uapi.VIRTIO_NET_F_GUEST_TSO6, uapi.VIRTIO_NET_F_GUEST_ECN), True),
    ],
)
def test_an_offload_without_what_it_needs_is_an_error_of_the_driver(features: tuple[int, ...], allowed: bool) -> None:
    """A tap answers it with EINVAL, which would look like a bug."""
    mask = sum(1 << bit for bit in features)
    if allowed:
        with Bench(Net(Wire(), MAC, None, print), features=mask):
            pass
    else:
        with pytest.raises(DriverError, match="without the one that it needs"):
            Bench(Net(Wire(), MAC, None, print), features=mask)
