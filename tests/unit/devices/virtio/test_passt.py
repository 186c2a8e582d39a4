"""Frames over a stream socket, and what is asked of a real passt where one is installed."""

import contextlib
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.net import Net
from offmap.devices.virtio.net_spec import NetSpec, parse_net
from offmap.devices.virtio.passt import FrameStream, Passt
from offmap.errors import OffmapError
from offmap.patience import scaled

NO_HEADER = bytes(10) + b"\1\0"  # num_buffers is 1


@pytest.fixture
def ends() -> Iterator[tuple[FrameStream, socket.socket]]:
    ours, theirs = socket.socketpair()
    with FrameStream(ours) as stream, theirs:
        yield stream, theirs


def framed(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


def room(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


def received(buffers: list[memoryview], size: int) -> bytes:
    return b"".join(buffers)[:size]


def test_frames_arrive_whole_after_an_empty_header(ends: tuple[FrameStream, socket.socket]) -> None:
    stream, theirs = ends
    theirs.sendall(framed(b"first") + framed(b"second one"))
    for frame in (b"first", b"second one"):
        buffers = room(5, 9, 100)
        size = stream.receive(buffers)
        assert received(buffers, size) == NO_HEADER + frame
    with pytest.raises(BlockingIOError):
        stream.receive(room(100))


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8), st.data())
@settings(max_examples=60)
def test_it_does_not_matter_in_which_pieces_they_come(frames: list[bytes], data: st.DataObject) -> None:
    ours, theirs = socket.socketpair()
    whole = b"".join(map(framed, frames))
    got: list[bytes] = []
    with FrameStream(ours) as stream, theirs:
        buffers = room(20, 20, 200)  # too little for some
        while whole or len(got) < len([f for f in frames if len(f) <= 228]):
            step = data.draw(st.integers(1, max(len(whole), 1)))
            theirs.sendall(whole[:step])
            whole = whole[step:]
            try:
                while True:
                    size = stream.receive(buffers)
                    got.append(received(buffers, size)[12:])
            except BlockingIOError:
                pass
    assert got == [frame for frame in frames if len(frame) <= 228]


def test_a_reset_in_the_middle_of_a_frame(ends: tuple[FrameStream, socket.socket]) -> None:
    stream, theirs = ends
    theirs.sendall(framed(b"x" * 100)[:50])
    with pytest.raises(BlockingIOError):
        stream.receive(room(200))
    stream.forget()
    gone = room(200)
    theirs.sendall(b"x" * 54 + framed(b"next"))
    assert received(gone, stream.receive(gone)) == NO_HEADER + b"next"


@pytest.mark.parametrize("size", [0, 65554, 0xFFFFFFFF])
def test_a_length_that_no_frame_has(ends: tuple[FrameStream, socket.socket], size: int) -> None:
    stream, theirs = ends
    theirs.sendall(struct.pack("!I", size))
    with pytest.raises(ConnectionResetError):
        stream.receive(room(100))


def test_the_other_end_goes(ends: tuple[FrameStream, socket.socket]) -> None:
    stream, theirs = ends
    theirs.close()
    with pytest.raises(ConnectionResetError):
        stream.receive(room(100))
    with pytest.raises(BrokenPipeError):
        stream.send(room(12, 60))


def test_frames_are_sent_whole_however_slow_the_other_end_is(ends: tuple[FrameStream, socket.socket]) -> None:
    stream, theirs = ends
    frames = []
    kept = 0
    while True:
        frame = os.urandom(65_000)  # which the socket takes in pieces
        try:
            stream.send([memoryview(bytes(12)), memoryview(frame)])
        except BlockingIOError:
            break
        frames.append(frame)
        kept += not stream.flush()
    assert kept, "no frame was sent in part"
    theirs.settimeout(scaled(5))
    expected = b"".join(map(framed, frames))
    got = b""
    while len(got) < len(expected):
        got += theirs.recv(1 << 16)
        stream.flush()
    assert got == expected


@pytest.mark.parametrize("size", [0, 12, 12 + 65554])
def test_what_is_no_frame(ends: tuple[FrameStream, socket.socket], size: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        ends[0].send(room(size))


# passt itself


def test_without_passt_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OffmapError, match="install the package passt"):
        Passt()


def fake_passt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "passt"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_passt_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_passt(
        tmp_path, monkeypatch, 'echo "Failed to send 3 bytes to syslog"; echo "No routable interface" >&2; exit 1'
    )
    with Passt() as passt:
        with pytest.raises(ConnectionResetError):
            while True:
                with contextlib.suppress(BlockingIOError):
                    passt.receive(room(100))
        while passt.is_up():
            pass
        assert passt.last_words() == "No routable interface"


def test_what_it_says_does_not_fill_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_passt(tmp_path, monkeypatch, "head -c 10000000 /dev/zero | tr '\\0' x; exit 0")
    with Passt() as passt:
        while passt.is_up():
            pass
        assert os.fstat(passt._log.fileno()).st_size == 256 << 10
        assert passt.last_words() == "x" * 300


def test_one_that_does_not_go_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.devices.virtio.passt._END_SECONDS", 0.1)
    fake_passt(tmp_path, monkeypatch, "exec sleep 100")
    passt = Passt()
    passt.close()
    assert not passt.is_up()
    passt.close()


def test_its_ports_and_mtu_are_its_own_business() -> None:
    spec = parse_net("passt,mtu=1280,tcp=8080:80,udp=53")
    assert spec.forwards == ("--tcp-ports", "8080:80", "--udp-ports", "53")
    assert spec == NetSpec(passt=True, mtu=1280, forwards=spec.forwards)


def test_a_real_passt_answers_arp() -> None:
    if shutil.which("passt") is None:
        pytest.skip("no passt: only its protocol was tested, against a fake (install passt)")
    ours = bytes.fromhex("020000000001")
    guest, gateway = socket.inet_aton("10.0.2.15"), socket.inet_aton("10.0.2.2")
    request = (
        struct.pack("!6s6sHHHBBH", b"\xff" * 6, ours, 0x806, 1, 0x800, 6, 4, 1) + ours + guest + bytes(6) + gateway
    )
    addresses = ["-4", "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "-i", _interface()]
    with Passt(addresses) as passt:
        passt.send([memoryview(bytes(12)), memoryview(request)])
        buffers = room(2000)
        os.set_blocking(passt.fd, True)
        size = passt.receive(buffers)
        reply = received(buffers, size)[12:]
        assert reply[12:14] == b"\x08\x06" and reply[28:32] == gateway
        assert Net(passt, ours, 1500, lambda _: None).features
    assert not passt.is_up()


def _interface() -> str:
    """Of the default route; passt wants one to copy."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        name, destination, *_ = line.split()
        if destination == "00000000":
            return name
    pytest.skip("no default route: passt itself was not tried")
