"""The host's side of the socket device: programs that connect to the guest, and the socket file."""

import contextlib
import errno
import os
import socket
from pathlib import Path

import pytest

from offmap.devices.virtio.limit import Limit
from offmap.devices.virtio.vsock_host import Listener
from offmap.devices.virtio.vsock_spec import VsockSpec, parse_vsock
from offmap.errors import OffmapError
from offmap.patience import scaled

from .vsock_guest import (
    GUEST_PORT,
    HOST_PORT,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    Guest,
)

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
        client.settimeout(scaled(5))
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
        client.settimeout(scaled(5))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        client.close()
    guest.bench.activate()
    assert guest.bench.watched


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
