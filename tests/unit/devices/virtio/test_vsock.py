"""The socket device: real Unix sockets on one side, and on the other a guest that the test plays, packet by packet."""

import contextlib
import os
import socket
import tracemalloc

import pytest

from offmap.devices.virtio.vsock import TX
from offmap.devices.virtio.vsock_connection import BUF_ALLOC
from offmap.uapi.virtio import vsock as uapi
from offmap.uapi.virtio.vsock import VIRTIO_VSOCK_HDR, virtio_vsock_hdr

from .vsock_guest import (
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    GUEST_PORT,
    HOST_PORT,
    NO_RECEIVE,
    NO_SEND,
    REQUEST,
    RESPONSE,
    ROOM,
    RST,
    RW,
    SHUTDOWN,
    Guest,
    iter_ops,
)

# Connections that the guest makes


def test_the_guest_talks_to_a_program_on_the_host(guest: Guest) -> None:
    with guest.connected() as host:
        guest.send(RW, b"hello")
        assert host.recv(100) == b"hello"
        host.sendall(b"and back")
        hdr, payload = guest.packet()
        assert (hdr.op, payload, hdr.src_port, hdr.dst_port) == (RW, b"and back", HOST_PORT, GUEST_PORT)
        assert (hdr.buf_alloc, hdr.fwd_cnt) == (BUF_ALLOC, 5)


def test_nobody_listens(guest: Guest) -> None:
    guest.give_buffers()
    guest.send(REQUEST)
    hdr, _ = guest.packet()
    assert (hdr.op, hdr.src_port, hdr.dst_port) == (RST, HOST_PORT, GUEST_PORT)


def test_a_listener_whose_backlog_is_full_refuses(guest: Guest) -> None:
    with guest.listen() as listener:
        listener.listen(0)
        guest.give_buffers(16)
        ops = []
        for port in range(1000, 1008):
            guest.send(REQUEST, guest_port=port)
            ops.append(guest.op())
        assert ops[0] == RESPONSE and ops[-1] == RST


def test_large_data_in_both_directions(guest: Guest) -> None:
    data = os.urandom(100_000)
    with guest.connected() as host:
        host.sendall(data)
        got = b""
        while len(got) < len(data):
            if guest.nothing():
                guest.give_buffers(8)
            got += guest.packet()[1]
        assert got == data
        for start in range(0, len(data), 5000):
            guest.send(RW, data[start : start + 5000], fwd_cnt=len(data))
        assert host.recv(len(data), socket.MSG_WAITALL) == data


def test_the_hosts_end_of_file_is_half_a_shutdown(guest: Guest) -> None:
    with guest.connected() as host:
        host.sendall(b"last words")
        host.shutdown(socket.SHUT_WR)
        assert guest.packet()[1] == b"last words"
        hdr, _ = guest.packet()
        assert (hdr.op, hdr.flags) == (SHUTDOWN, NO_SEND)
        guest.send(RW, b"answer", fwd_cnt=10)
        assert host.recv(100) == b"answer"
        guest.send(SHUTDOWN, flags=NO_SEND | NO_RECEIVE, fwd_cnt=10)
        assert host.recv(100) == b""
        assert guest.op() == RST
        assert guest.nothing()


def test_the_hosts_close_is_a_whole_shutdown(guest: Guest) -> None:
    with guest.connected() as host:
        host.sendall(b"last words")
    assert guest.packet()[1] == b"last words"
    hdr, _ = guest.packet()
    assert (hdr.op, hdr.flags) == (SHUTDOWN, NO_SEND | NO_RECEIVE)
    guest.send(RST)
    assert guest.nothing()
    guest.send(RW, b"late")
    assert guest.op() == RST


def test_the_guests_half_close(guest: Guest) -> None:
    with guest.connected() as host:
        guest.send(RW, b"question")
        guest.send(SHUTDOWN, flags=NO_SEND)
        assert host.recv(100) == b"question"
        assert host.recv(100) == b""
        host.sendall(b"answer")
        assert guest.packet()[1] == b"answer"
        guest.send(RW, b"more")  # after it said that there would be no more
        assert guest.op() == RST


def test_what_the_guest_sent_before_it_closed_arrives_however_slow_the_host_is(guest: Guest) -> None:
    data = os.urandom(BUF_ALLOC)
    with guest.connected() as host:
        sent = 0
        while sent < len(data):
            guest.send(RW, data[sent : sent + 50_000])
            sent += 50_000
        guest.send(SHUTDOWN, flags=NO_SEND | NO_RECEIVE)
        assert not [op for op in iter_ops(guest) if op == RST], "before it was passed on"
        guest.send(RST)  # its patience is at an end
        got = b""
        while len(got) < len(data):
            guest.bench.settle()
            got += host.recv(len(data))
        assert got == data
        guest.bench.settle()
        assert host.recv(1) == b""


# Credit


def test_a_stalled_host_holds_up_its_own_connection_only(guest: Guest) -> None:
    with guest.listen(6000) as listener, guest.connected() as stalled:
        for _ in range(BUF_ALLOC // 65536 + 1):
            guest.send(RW, bytes(65536))
        guest.send(REQUEST, host_port=6000)
        assert RESPONSE in list(iter_ops(guest))
        other, _ = listener.accept()
        with other:
            guest.send(RW, b"through", host_port=6000)
            assert other.recv(100) == b"through"
        assert stalled.recv(1) == b"\0"


def test_a_guest_that_sends_beyond_its_credit_is_cut_off(guest: Guest) -> None:
    with guest.connected():
        guest.give_buffers()
        ops: list[int] = []
        for _ in range(20):
            guest.send(RW, bytes(65536))
            ops += iter_ops(guest)
            if RST in ops:
                break
        assert RST in ops


def test_single_bytes_that_the_host_does_not_read_cost_no_more_than_bytes(guest: Guest) -> None:
    host = guest.connected()
    with contextlib.suppress(AssertionError):  # until the socket is full
        while True:
            guest.send(RW, b"x" * 32768)
            (connection,) = guest.vsock._connections.values()
            assert not connection._backlog
    tracemalloc.start()
    try:
        for number in range(2000):
            guest.send(RW, bytes([number & 0xFF]))
        assert len(guest.vsock._connections) == 1
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 64 << 10
    host.setblocking(False)
    received = b""
    while not received.endswith(bytes(n & 0xFF for n in range(1900, 2000))):
        with contextlib.suppress(BlockingIOError):
            received += host.recv(1 << 16)
        guest.bench.settle()
    host.close()


def test_the_guest_is_told_when_there_is_room_again(guest: Guest) -> None:
    with guest.connected() as host:
        guest.send(RW, bytes(65536))
        hdr, _ = guest.packet()
        assert (hdr.op, hdr.fwd_cnt) == (CREDIT_UPDATE, 65536)
        guest.send(CREDIT_REQUEST)
        hdr, _ = guest.packet()
        assert (hdr.op, hdr.buf_alloc, hdr.fwd_cnt) == (CREDIT_UPDATE, BUF_ALLOC, 65536)
        assert len(host.recv(65536, socket.MSG_WAITALL)) == 65536


def test_no_more_is_sent_than_the_guest_has_room_for(guest: Guest) -> None:
    with guest.connected() as host:
        guest.send(CREDIT_UPDATE, buf_alloc=1000)
        host.sendall(bytes(1500))
        assert guest.packet()[0].len == 1000
        assert guest.op() == CREDIT_REQUEST
        assert guest.nothing(), "it is asked once"
        guest.send(CREDIT_UPDATE, buf_alloc=1000, fwd_cnt=400)
        assert guest.packet()[0].len == 400
        assert guest.op() == CREDIT_REQUEST
        guest.send(CREDIT_UPDATE, buf_alloc=1000, fwd_cnt=1400)
        assert guest.packet()[0].len == 100


def test_a_host_that_leaves_data_behind_does_not_spin_while_the_guest_has_no_room(guest: Guest) -> None:
    host = guest.connected()
    guest.send(CREDIT_UPDATE, buf_alloc=0)
    host.sendall(b"left behind")
    host.close()
    guest.bench.settle()  # fails if it does not come to rest
    seen = []
    while not guest.nothing():
        seen.append(guest.op())
    assert SHUTDOWN not in seen, "the end comes behind the data"
    guest.give_buffers()
    guest.send(CREDIT_UPDATE, buf_alloc=1 << 18)
    while (packet := guest.packet())[0].op != RW:
        pass
    assert packet[1] == b"left behind"
    assert guest.op() == SHUTDOWN


def test_without_buffers_everything_waits(guest: Guest) -> None:
    with guest.connected() as host:
        while not guest.nothing():
            guest.packet()
        host.sendall(bytes(ROOM * 20))
        guest.bench.settle()
        got = 0
        for _ in range(20):
            while not guest.nothing():
                got += guest.packet()[0].len
            guest.give_buffers(2)
        assert got + sum(guest.packet()[0].len for _ in range(2) if not guest.nothing()) == ROOM * 20


def test_answers_that_the_guest_does_not_fetch_are_bounded(guest: Guest) -> None:
    for port in range(2000):
        guest.bench.drivers[TX].add(
            VIRTIO_VSOCK_HDR.pack(*virtio_vsock_hdr(CID, 2, port, 9, 0, uapi.VIRTIO_VSOCK_TYPE_STREAM, REQUEST))
        )
        guest.vsock.handle(TX)
        guest.bench.settle()
        if guest.bench.drivers[TX].used_idx() < port + 1:
            break
    assert 200 < port < 300, "its packets are not looked at any more"
    resets = 0
    for _ in range(100):
        guest.give_buffers(8)
        while not guest.nothing():
            assert guest.op() == RST
            resets += 1
    assert resets == port + 1, "and then they are"


def test_the_backlog_of_all_connections_is_bounded(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.devices.virtio.vsock_connection.MOST_BACKLOG", 4096)
    host = guest.connected()
    guest.give_buffers()
    cut_off = False
    for _ in range(1000):
        guest.send(RW, bytes(1024))
        if not guest.nothing():
            cut_off = guest.op() == RST
            if cut_off:
                break
    assert cut_off
    assert guest.vsock._backlog.size == 0
    host.close()
