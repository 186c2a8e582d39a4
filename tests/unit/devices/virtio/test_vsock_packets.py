"""Packets that make no sense: the socket device refuses or drops them, and lives on."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.queue import Chain
from offmap.devices.virtio.vsock import RX, TX
from offmap.uapi.virtio.vsock import VIRTIO_VSOCK_HDR

from .vsock_guest import CID, CREDIT_REQUEST, CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, SHUTDOWN, Guest


@pytest.mark.parametrize("op", [0, RESPONSE, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, 77])
def test_packets_of_no_connection_are_reset(guest: Guest, op: int) -> None:
    guest.give_buffers()
    guest.send(op, b"x")
    assert guest.op() == RST


def test_kicks_of_a_driver_that_never_stops_sending_do_not_pile_up(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, take = guest.bench.drivers[TX], guest.vsock._take_packet

    def endless(chain: Chain) -> None:
        take(chain)
        driver.add(bytes(VIRTIO_VSOCK_HDR.size))

    monkeypatch.setattr(guest.vsock, "_take_packet", endless)
    driver.add(bytes(VIRTIO_VSOCK_HDR.size))
    for _ in range(20):
        guest.vsock.handle(TX)
        assert guest.bench.posted == 1
    guest.vsock.reset()
    guest.bench.settle()
    guest.bench.activate()
    monkeypatch.undo()
    guest.give_buffers()
    guest.send(CREDIT_REQUEST)
    assert guest.op() == RST


def test_a_reset_of_no_connection_is_not_answered(guest: Guest) -> None:
    guest.give_buffers()
    guest.send(RST)
    assert guest.nothing()


def test_other_types_are_reset(guest: Guest) -> None:
    guest.give_buffers()
    guest.send(REQUEST, type_=2)
    assert guest.op() == RST


def test_packets_in_somebody_elses_name_are_dropped(guest: Guest) -> None:
    guest.give_buffers()
    guest.send(REQUEST, src_cid=7)
    assert guest.nothing()


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, 0, 77])
def test_what_no_connection_may_send_ends_it(guest: Guest, op: int) -> None:
    with guest.connected() as host:
        guest.send(op)
        assert guest.op() == RST
        assert host.recv(1) == b""


def test_packets_that_are_none(guest: Guest) -> None:
    for buffers in (
        [b"short"],
        [bytes(43)],
        [struct.pack("<QQIIIHHIII", CID, 2, 1, 2, 100, 1, RW, 0, 0, 0), b"x" * 99],
    ):
        guest.bench.drivers[TX].add(*buffers)
        with pytest.raises(DriverError):
            guest.vsock.handle(TX)
    guest.send(REQUEST)
    guest.bench.drivers[RX].add(44)
    with pytest.raises(DriverError, match="receive buffer"):
        guest.vsock.handle(RX)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 8),
            st.binary(max_size=60),
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from([0, 1, 1000, (1 << 32) - 1]),
            st.sampled_from([0, 1, 5, (1 << 32) - 1]),
        ),
        max_size=30,
    )
)
@settings(max_examples=80)
def test_whatever_the_guest_sends_the_device_lives(
    tmp_path_factory: pytest.TempPathFactory, packets: list[tuple[int, bytes, int, int, int, int]]
) -> None:
    guest = Guest(tmp_path_factory.mktemp("v"))
    with guest.bench, guest.listen(1) as listener:
        listener.listen(64)
        for op, payload, port, flags, buf_alloc, fwd_cnt in packets:
            guest.give_buffers(1)
            guest.send(op, payload, host_port=1, guest_port=port, flags=flags, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt)
