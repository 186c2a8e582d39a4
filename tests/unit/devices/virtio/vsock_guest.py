"""A guest with a vsock device, for tests: the test plays its driver, packet by packet."""

import socket
from collections.abc import Iterator
from pathlib import Path

from offmap.devices.virtio.vsock import RX, TX, Vsock
from offmap.devices.virtio.vsock_host import Listener
from offmap.patience import scaled
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
        host.settimeout(scaled(5))
        return host

    def call(self, port: int = 52) -> tuple[socket.socket, int]:
        """A program on the host connects to the guest, whose answer is outstanding: its end, and its port."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.path))
        client.sendall(b"CONNECT %d\n" % port)
        client.settimeout(scaled(5))
        self.bench.wait(lambda: not self.nothing())
        hdr, _ = self.packet()
        assert (hdr.op, hdr.dst_port) == (REQUEST, port)
        return client, hdr.src_port


def iter_ops(guest: Guest) -> Iterator[int]:
    while not guest.nothing():
        yield guest.op()
