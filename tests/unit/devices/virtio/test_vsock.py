"""The socket device: real Unix sockets on one side, and on the other a guest that the test plays, packet by packet."""

import contextlib
import errno
import os
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.limit import Limit
from offmap.devices.virtio.queue import Chain
from offmap.devices.virtio.vsock import RX, TX, Vsock
from offmap.devices.virtio.vsock_connection import BUF_ALLOC
from offmap.devices.virtio.vsock_host import Listener
from offmap.devices.virtio.vsock_spec import VsockSpec, parse_vsock
from offmap.errors import OffmapError
from offmap.uapi.virtio import vsock as uapi
from offmap.uapi.virtio.vsock import VIRTIO_VSOCK_HDR, virtio_vsock_hdr

from .bench import Bench

CID = 3
GUEST_PORT, HOST_PORT = 1234, 5000
PACKET = 4096  # a receive buffer of Linux
ROOM = PACKET - VIRTIO_VSOCK_HDR.size

REQUEST, RESPONSE, RST = uapi.VIRTIO_VSOCK_OP_REQUEST, uapi.VIRTIO_VSOCK_OP_RESPONSE, uapi.VIRTIO_VSOCK_OP_RST
SHUTDOWN, RW = uapi.VIRTIO_VSOCK_OP_SHUTDOWN, uapi.VIRTIO_VSOCK_OP_RW
CREDIT_UPDATE, CREDIT_REQUEST = uapi.VIRTIO_VSOCK_OP_CREDIT_UPDATE, uapi.VIRTIO_VSOCK_OP_CREDIT_REQUEST
NO_RECEIVE, NO_SEND = uapi.VIRTIO_VSOCK_SHUTDOWN_RCV, uapi.VIRTIO_VSOCK_SHUTDOWN_SEND


class Guest:
    """A driver with a socket layer in its head."""

    def __init__(self, folder: Path, size: int = 16) -> None:
        self.path = folder / "vsock"
        self.said: list[str] = []
        self.vsock = Vsock(CID, Listener(self.path), self.said.append)
        self.bench = Bench(self.vsock, size=size)
        self.buffers = 0

    def give_buffers(self, number: int = 8) -> None:
        for _ in range(number):
            self.bench.drivers[RX].add(PACKET)
        self.vsock.handle(RX)
        self.bench.settle()

    def send(
        self,
        op: int,
        payload: bytes = b"",
        *,
        host_port: int = HOST_PORT,
        guest_port: int = GUEST_PORT,
        flags: int = 0,
        buf_alloc: int = 1 << 18,
        fwd_cnt: int = 0,
        type_: int = uapi.VIRTIO_VSOCK_TYPE_STREAM,
        src_cid: int = CID,
    ) -> None:
        hdr = virtio_vsock_hdr(src_cid, 2, guest_port, host_port, len(payload), type_, op, flags, buf_alloc, fwd_cnt)
        self.bench.drivers[TX].add(VIRTIO_VSOCK_HDR.pack(*hdr), *([payload] if payload else []))
        self.vsock.handle(TX)
        self.bench.settle()

    def packet(self) -> tuple[virtio_vsock_hdr, bytes]:
        """The next packet for the guest."""
        self.bench.settle()
        used = self.bench.drivers[RX].result()
        hdr = virtio_vsock_hdr(*VIRTIO_VSOCK_HDR.unpack_from(used))
        assert (hdr.src_cid, hdr.dst_cid, hdr.type) == (2, CID, uapi.VIRTIO_VSOCK_TYPE_STREAM)
        assert len(used) == VIRTIO_VSOCK_HDR.size + hdr.len
        return hdr, used[VIRTIO_VSOCK_HDR.size :]

    def op(self) -> int:
        return self.packet()[0].op

    def nothing(self) -> bool:
        self.bench.settle()
        return self.bench.drivers[RX].used_idx() == self.bench.drivers[RX].seen

    def listen(self, port: int = HOST_PORT) -> socket.socket:
        """A program on the host that waits for the guest."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen(1)
        return listener

    def connected(self) -> socket.socket:
        """A connection that the guest has made: its end on the host."""
        with self.listen() as listener:
            self.give_buffers()
            self.send(REQUEST)
            assert self.op() == RESPONSE
            host, _ = listener.accept()
        host.settimeout(5)
        return host

    def call(self, port: int = 52) -> tuple[socket.socket, int]:
        """A program on the host connects to the guest, whose answer is outstanding: its end, and its port."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.path))
        client.sendall(b"CONNECT %d\n" % port)
        client.settimeout(5)
        self.bench.wait(lambda: not self.nothing())
        hdr, _ = self.packet()
        assert (hdr.op, hdr.dst_port) == (REQUEST, port)
        return client, hdr.src_port


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    with guest.bench:
        yield guest


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


def iter_ops(guest: Guest) -> Iterator[int]:
    while not guest.nothing():
        yield guest.op()


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


# Connections that the host makes


def test_a_program_on_the_host_talks_to_the_guest(guest: Guest) -> None:
    guest.give_buffers()
    client, port = guest.call(52)
    with client:
        guest.send(RESPONSE, guest_port=52, host_port=port)
        assert client.recv(100) == b"OK %d\n" % port
        client.sendall(b"hello")
        assert guest.packet()[1] == b"hello"
        guest.send(RW, b"back", guest_port=52, host_port=port, fwd_cnt=5)
        assert client.recv(100) == b"back"


def test_what_is_said_too_early_is_for_the_guest(guest: Guest) -> None:
    guest.give_buffers()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(guest.path))
        client.sendall(b"CONN")
        guest.bench.settle()
        client.sendall(b"ECT 52\nfirst words")
        guest.bench.wait(lambda: not guest.nothing())
        hdr, _ = guest.packet()
        guest.send(RESPONSE, guest_port=52, host_port=hdr.src_port)
        assert guest.packet()[1] == b"first words"


def test_a_guest_that_does_not_listen(guest: Guest) -> None:
    guest.give_buffers()
    client, port = guest.call(53)
    with client:
        guest.send(RST, guest_port=53, host_port=port)
        assert client.recv(100) == b""


def test_two_callers_have_different_ports(guest: Guest) -> None:
    guest.give_buffers()
    (one, first), (two, second) = guest.call(52), guest.call(52)
    with one, two:
        assert first != second
        assert min(first, second) >= 1 << 30


@pytest.mark.parametrize(
    "words", [b"HELLO\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967295\n", b"CONNECT " + b"1" * 30, b"\n", b""]
)
def test_who_asks_for_no_port_is_turned_away(guest: Guest, words: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(guest.path))
        client.settimeout(5)
        client.sendall(words)
        if not words:
            client.shutdown(socket.SHUT_WR)
        for _ in range(3):
            guest.bench.settle()
        with pytest.raises((ConnectionResetError, AssertionError)):  # or an end of file
            assert client.recv(100) != b""


def test_a_caller_that_leaves_in_the_middle_of_its_line(guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(guest.path))
        client.sendall(b"CONNEC")
        guest.bench.settle()
    guest.bench.settle()
    assert len(guest.bench.watched) == 1, "only the listener is left"


def test_a_process_without_fds_says_so_once(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fds() -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    hosts = [guest.connected()]
    monkeypatch.setattr(guest.vsock._listener, "accept", no_fds)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(guest.path))
        for number in range(10):
            guest.bench.settle()
            guest.send(RST, guest_port=GUEST_PORT + number)  # one ends, so there may be room
            Path(f"{guest.path}_{HOST_PORT}").unlink()
            with guest.listen() as listener:
                guest.give_buffers(1)
                guest.send(REQUEST, guest_port=GUEST_PORT + number + 1)
                assert guest.op() == RESPONSE
                hosts.append(listener.accept()[0])
    assert len(guest.said) == 1
    for host in hosts:
        host.close()


def test_many_connections_and_a_reset(guest: Guest) -> None:
    clients = [socket.socket(socket.AF_UNIX) for _ in range(50)]
    for client in clients:
        client.connect(str(guest.path))
        client.sendall(b"CONNECT 52\n")
        guest.bench.settle()
    guest.vsock.reset()
    assert not guest.bench.watched
    for client in clients:
        client.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        client.close()
    guest.bench.activate()
    assert guest.bench.watched


# Packets that make no sense


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


# The socket file


def test_the_socket_file_goes_with_the_device(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener(path):
        assert path.is_socket()
        with pytest.raises(OffmapError, match="remove the file"):
            Listener(path)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(OffmapError, match="there is a file"):
        Listener(path)
    assert path.read_text() == "mine"


def test_a_planted_link_leads_nowhere(guest: Guest, tmp_path: Path) -> None:
    elsewhere = tmp_path / "private"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(elsewhere))
        listener.listen()
        Path(f"{guest.path}_{HOST_PORT}").symlink_to(elsewhere)
        guest.give_buffers()
        guest.send(REQUEST)
        assert guest.op() == RST
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    (folder / "mine").mkdir(parents=True)
    folder.chmod(0o777)
    for path in (folder / "s", folder / "mine" / "s"):
        with pytest.raises(OffmapError, match="others may write to the folder"):
            Listener(path)
    folder.chmod(0o1777)
    with pytest.raises(OffmapError, match="others may write to the folder"):
        Listener(folder / "s")
    with Listener(folder / "mine" / "s"):
        assert (folder / "mine" / "s").is_socket()


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


def test_options(tmp_path: Path) -> None:
    assert parse_vsock("cid=7,path=/run/x,ops=5").limit == Limit(None, 5)
    assert parse_vsock("cid=7,path=/run/x") == VsockSpec(7, Path("/run/x"))
    assert parse_vsock("path=/run/x").cid == 3
    with pytest.raises(OffmapError, match="too long"):
        parse_vsock(f"path=/{'x' * 96}")
    for text in ("", "cid=3", "cid=2,path=/x", "cid=4294967295,path=/x", "cid=x,path=/x", "path=/x,path=/y", "port=3"):
        with pytest.raises(OffmapError):
            parse_vsock(text)
    with pytest.raises(OffmapError, match="make it first"):
        Listener(tmp_path / "absent" / "s")
