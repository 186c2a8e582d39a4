"""The devices whose host's side talks back: console, network card, socket device."""

import contextlib
import errno
import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from offmap.devices.virtio.console import Console
from offmap.devices.virtio.console_port import Port
from offmap.devices.virtio.device import VirtioDevice
from offmap.devices.virtio.iov import length
from offmap.devices.virtio.net import CTRL, RX, Net
from offmap.devices.virtio.passt import FrameStream
from offmap.devices.virtio.vsock import Vsock
from offmap.devices.virtio.vsock_host import Listener
from offmap.errors import KernelError
from offmap.uapi import if_tun
from offmap.uapi.virtio import console as uapi_console
from offmap.uapi.virtio.vsock import VIRTIO_VSOCK_HDR, virtio_vsock_hdr

from .choices import Choices
from .devices import cut
from .target import DeviceTarget

_SMALL = 4096  # bytes of a pipe: it is full soon
# What a peer reads into and sends: made once, or the C library's heap grows by the holes that such pieces leave.
_ROOM = bytearray(1 << 17)
_ZEROES = memoryview(bytes(1 << 16))


class ConsoleTarget(DeviceTarget):
    """A console, a port at sockets and one at files. Their readers stall, catch up, or have gone."""

    sources = ("devices/virtio/console.py", "devices/virtio/console_port.py")

    def build(self) -> VirtioDevice:
        def pipe() -> tuple[int, int]:
            reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._fds += [reads, writes]
            return reads, writes

        self._fds: list[int] = []
        first_in, self._types = pipe()
        self._reads, first_out = pipe()
        os.set_blocking(first_out, False)
        self._peer, ours = socket.socketpair()
        for end in (self._peer, ours):
            end.setblocking(False)
        self._ours = ours
        file = os.memfd_create("console", os.MFD_CLOEXEC)
        os.write(file, b"a file " * 100)
        blocking_in, blocking_out = os.pipe2(os.O_CLOEXEC)
        self._slow = blocking_in
        self._fds += [file, blocking_in, blocking_out]
        self._file = file
        ports = [
            Port("", first_in, first_out, console=True),
            Port("socket", ours.fileno(), ours.fileno()),
            Port("file", file, blocking_out),
            Port("last", None, None, last=True),
        ]
        self._console = Console(ports)
        return self._console

    def case(self, choices: Choices) -> bool:
        self._catch_up()
        os.lseek(self._file, 0, os.SEEK_SET)
        return super().case(choices)

    def begin(self) -> None:
        for _ in range(min(self.rings[2].size, 12)):
            self.add(2, room=[64])
        control, none = uapi_console.VIRTIO_CONSOLE_CONTROL, 0xFFFFFFFF
        self.add(3, control.pack(none, uapi_console.VIRTIO_CONSOLE_DEVICE_READY, 1))
        for port in range(4):
            self.add(3, control.pack(port, uapi_console.VIRTIO_CONSOLE_PORT_READY, 1))
            self.add(3, control.pack(port, uapi_console.VIRTIO_CONSOLE_PORT_OPEN, 1))

    def _catch_up(self) -> None:
        with contextlib.suppress(OSError):
            os.read(self._reads, 1 << 16)
        with contextlib.suppress(OSError):
            self._peer.recv(1 << 16)
        os.set_blocking(self._slow, False)
        with contextlib.suppress(OSError):
            os.read(self._slow, 1 << 16)

    @property
    def spent(self) -> bool:
        return any(stream.output_failed or stream.input_ended for stream in self._console._streams[:2])

    def host(self, choices: Choices) -> None:
        what = choices.byte() % 5
        data = bytes(choices.byte() * (1 + choices.byte()))
        with contextlib.suppress(OSError):
            if what == 0:
                os.write(self._types, data)
            elif what == 1:
                self._peer.send(data)
            elif what == 2:
                self._catch_up()
            elif what == 3:
                self._console.resize(choices.word(2), choices.word(2))
            elif choices.rarely(16):
                self._peer.shutdown(choices.below(3))

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        c = choices
        if queue == 3:
            port = c.byte() & 3 if not c.rarely(24) else c.word(4)
            event = c.of((uapi_console.VIRTIO_CONSOLE_PORT_READY, uapi_console.VIRTIO_CONSOLE_PORT_OPEN, 0, 1, 5, 77))
            data = uapi_console.VIRTIO_CONSOLE_CONTROL.pack(port, event, c.byte() & 3)
            return cut(c, data[:-1] if c.rarely(24) else data), []
        if queue == 2 or not queue % 2:
            rooms = [16 * c.byte() for _ in range(1 + c.byte() % 3)]
            return [], [64] if queue == 2 and not c.rarely(12) else rooms
        return [bytes(c.byte() * (1 + c.byte())) for _ in range(c.byte() & 3)], [8] if c.rarely(24) else []

    def close(self) -> None:
        super().close()
        self._peer.close()
        self._ours.close()
        for fd in self._fds:
            os.close(fd)


class _Wire:
    """A tap as `Net` sees it, whose host does what the input says."""

    kind = "tap"
    has_vnet_hdr = True

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.changes: int | None = os.eventfd(0, os.EFD_NONBLOCK)
        self.error = 0
        self.up = True
        self.frame = b""

    def set_offload(self, flags: int) -> None:
        segments = flags & (if_tun.TUN_F_TSO4 | if_tun.TUN_F_TSO6)
        if (segments and not flags & if_tun.TUN_F_CSUM) or (flags & if_tun.TUN_F_TSO_ECN and not segments):
            raise KernelError("TUNSETOFFLOAD", errno.EINVAL)  # set_offload in drivers/net/tun.c

    def receive(self, buffers: Sequence[memoryview]) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if not self.frame:
            raise BlockingIOError
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        frame, self.frame = self.frame, b""
        done = 0
        for buffer in buffers:
            piece = frame[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def send(self, buffers: Sequence[memoryview]) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if length(buffers) < 26:
            raise OSError(errno.EINVAL, "")

    def flush(self) -> bool:
        return True

    def forget(self) -> None:
        pass

    def is_up(self) -> bool:
        if self.changes is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.changes)
        return self.up

    def last_words(self) -> str:
        return "deleted"

    def close(self) -> None:
        os.close(self.fd)
        if self.changes is not None:
            os.close(self.changes)


class NetTarget(DeviceTarget):
    """A card at a tap whose host fails as taps do."""

    sources: Sequence[str] = ("devices/virtio/net.py",)

    def build(self) -> VirtioDevice:
        self._wire = _Wire()
        self._net = Net(self._wire, b"\2\0\0\0\0\1", 1500, lambda _: None)
        return self._net

    @property
    def spent(self) -> bool:
        return self._net._gone

    def case(self, choices: Choices) -> bool:
        self._wire.error, self._wire.up = 0, True
        return super().case(choices)

    def begin(self) -> None:
        for _ in range(min(self.rings[RX].size, 3)):
            self.add(RX, room=[2048])

    def host(self, choices: Choices) -> None:
        c, wire = choices, self._wire
        what = c.byte()
        if what < 160:
            wire.frame = bytes(12 + (c.word(2) if c.rarely(4) else c.byte()))
            os.eventfd_write(wire.fd, 1)
        elif what < 220:
            wire.error = c.of((0, errno.EAGAIN, errno.EINVAL, errno.EIO))
        elif what < 240:
            wire.up = not wire.up
            assert wire.changes is not None
            os.eventfd_write(wire.changes, 1)
        elif c.rarely(64):
            wire.error = errno.EBADFD

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        c = choices
        if queue == RX:
            return [b"x"] if c.rarely(48) else [], [2048] if c.byte() < 160 else [12, 64 * c.byte(), c.byte() << 9]
        if queue == CTRL:
            data = bytes((c.byte() % 5, c.byte() % 7)) + c.bytes(c.of((6, 1, 0, 4, 20)))
            return cut(c, data[:1] if c.rarely(24) else data), [] if c.rarely(24) else [1]
        return cut(c, bytes(12 + 14 + c.byte())) if c.byte() < 220 else [c.bytes(c.byte())], [4] if c.rarely(48) else []


class _Stream(FrameStream):
    changes = None

    def is_up(self) -> bool:
        return True

    def last_words(self) -> str:
        return "gone"


class StreamTarget(NetTarget):
    """A card at passt's stream, with a passt that has been taken over."""

    sources = ("devices/virtio/net.py", "devices/virtio/passt.py")

    def build(self) -> VirtioDevice:
        self._wire = _Wire()
        self._wire.close()
        self._peer, ours = socket.socketpair()
        for end in (self._peer, ours):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL)
        self._net = Net(_Stream(ours), b"\2\0\0\0\0\1", None, lambda _: None)
        return self._net

    def case(self, choices: Choices) -> bool:
        with contextlib.suppress(OSError):
            self._peer.recv_into(_ROOM)
        return super().case(choices)

    def host(self, choices: Choices) -> None:
        c = choices
        what = c.byte()
        with contextlib.suppress(OSError):
            if what < 150:
                size = c.word(2) if c.rarely(6) else 14 + c.byte()
                self._peer.sendmsg([struct.pack("!I", size), _ZEROES[: size if c.byte() < 200 else c.byte()]])
            elif what < 190:
                self._peer.recv_into(_ROOM)
            elif c.rarely(64):
                self._peer.send(c.bytes(c.byte()))
            elif c.rarely(128):
                self._peer.close()

    def close(self) -> None:
        super().close()
        self._peer.close()


_CID = 3
_PORTS = (1000, 1001, 1002, 70)
_REQUEST, _RESPONSE = 1, 2  # VIRTIO_VSOCK_OP_*
_OPS = (1, 5, 5, 5, 2, 3, 4, 6, 7, 0, 9)  # request, data, response, reset, shutdown, credit


class VsockTarget(DeviceTarget):
    """A socket device between programs of the host that connect, listen, stall and go away."""

    sources = (
        "devices/virtio/vsock.py",
        "devices/virtio/vsock_connection.py",
        "devices/virtio/vsock_host.py",
        "devices/virtio/vsock_folder.py",
    )

    def build(self) -> VirtioDevice:
        self._folder = tempfile.mkdtemp(prefix="fuzz", dir="/run" if os.access("/run", os.W_OK) else None)
        self._path = f"{self._folder}/s"
        self._clients: list[socket.socket] = []
        self._listeners: list[socket.socket] = []
        for port in _PORTS[:2]:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            listener.bind(f"{self._path}_{port}")
            listener.listen(4)
            self._listeners.append(listener)
        self._vsock = Vsock(_CID, Listener(Path(self._path)), lambda _: None)
        return self._vsock

    def case(self, choices: Choices) -> bool:
        try:
            return super().case(choices)
        finally:
            for client in self._clients:
                client.close()
            self._clients.clear()
            for listener in self._listeners:
                self._accept(listener)

    def begin(self) -> None:
        """Make a connection from the guest, and one from the host."""
        for _ in range(min(self.rings[0].size, 8) - 1):
            self.add(0, room=[4096])
        self.add(1, self._packet(_REQUEST, _PORTS[0], 1))
        self._accept(self._listeners[0])
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._clients.append(client)
        with contextlib.suppress(OSError):
            client.connect(self._path)
            client.send(b"CONNECT 52\n")
            self._turn_over()
            for host_port, guest_port in list(self._vsock._connections):
                if guest_port == 52:
                    self.add(1, self._packet(_RESPONSE, host_port, guest_port))

    @staticmethod
    def _packet(op: int, host_port: int, guest_port: int) -> bytes:
        hdr = virtio_vsock_hdr(_CID, 2, guest_port, host_port, 0, 1, op, 0, 1 << 18, 0)
        return VIRTIO_VSOCK_HDR.pack(*hdr)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.setblocking(False)
                if len(self._clients) < 8:
                    self._clients.append(client)
                else:
                    client.close()

    def host(self, choices: Choices) -> None:
        c = choices
        what = c.byte()
        with contextlib.suppress(OSError):
            if what < 100:
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                self._clients.append(client)
                client.connect(self._path)
                client.send(c.of((b"CONNECT 52\n", b"CONNECT 52\n", b"CONN", b"CONNECT 4294967295\n", b"nonsense\n")))
            elif what < 140:
                self._accept(c.of(self._listeners))
            elif self._clients:
                client = c.of(self._clients)
                if what < 190:
                    client.send(bytes(c.byte() * (1 + c.byte())))
                elif what < 230:
                    client.recv(c.word(2))
                elif what < 245:
                    client.shutdown(c.below(3))
                else:
                    client.close()
        self._turn_over()

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        c = choices
        if queue == 0:
            room = 4096 if c.byte() < 200 else 44 + c.byte()
            return [b"x"] if c.rarely(48) else [], [room] if not c.rarely(24) else [c.byte()]
        if queue == 2:
            return [], [8]
        op = c.of(_OPS)
        known = list(self._vsock._connections)  # what a driver would know of them
        if op == 1 and not c.rarely(8):
            host_port, guest_port = _PORTS[c.byte() & 3], c.byte() & 7
        else:
            host_port, guest_port = c.of(known) if known else (70, 1)
        payload = bytes(c.byte() * (1 + (c.byte() & 63))) if op == 5 else b""
        if op == 5 and c.rarely(12):
            payload = bytes((250 << 10, 100 << 10, 300 << 10)[c.below(3)])
        size = len(payload) if not c.rarely(24) else c.word(4)
        cid, kind = (_CID if not c.rarely(48) else c.byte()), (1 if not c.rarely(48) else c.byte())
        credit = (1 << 18 if c.byte() < 220 else c.word(4), c.word(1) if c.byte() < 220 else c.word(4))
        hdr = virtio_vsock_hdr(cid, 2, guest_port, host_port, size, kind, op, c.byte() & 3, *credit)
        data = VIRTIO_VSOCK_HDR.pack(*hdr)
        if c.rarely(48):
            return [data[: c.byte() % 44]], []
        return [*cut(c, data), payload] if payload else cut(c, data), [8] if c.rarely(48) else []

    def close(self) -> None:
        super().close()
        for listener in self._listeners:
            listener.close()
        for name in os.listdir(self._folder):  # noqa: PTH208
            os.unlink(f"{self._folder}/{name}")  # noqa: PTH108
        Path(self._folder).rmdir()
