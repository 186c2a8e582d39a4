"""The host's half of the network and vsock probes: interfaces, and one connection at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_int, c_ulong
from ipaddress import IPv4Interface
from pathlib import Path

from offmap.compare.probes.live_guest import PATIENCE
from offmap.devices.virtio.tap import open_tap
from offmap.patience import scaled
from offmap.uapi.if_tun import TUNSETPERSIST

VSOCK_PORT = 5000


class Subnet:
    """The n-th pair of addresses of the block that RFC 2544 sets aside for benchmarks."""

    def __init__(self, number: int) -> None:
        self.host = IPv4Interface(f"198.18.{number}.1/24")
        self.guest = IPv4Interface(f"198.18.{number}.2/24")


@contextlib.contextmanager
def tap(name: str, subnet: Subnet) -> Iterator[None]:
    """A tap interface that outlives its VMMs. It is removed at the end. Raises OffmapError: it cannot be made."""
    with open_tap(name, address=subnet.host) as made:
        fcntl.ioctl(made.fd, TUNSETPERSIST, c_ulong(1).value)
    try:
        yield
    finally:
        with contextlib.suppress(Exception), open_tap(name) as made:
            fcntl.ioctl(made.fd, TUNSETPERSIST, c_int(0).value)


def listen_tcp(subnet: Subnet) -> tuple[socket.socket, int]:
    """A listening socket at the host's address, and its port."""
    listener = socket.create_server((str(subnet.host.ip), 0))
    return listener, listener.getsockname()[1]


def listen_unix(path: Path) -> socket.socket:
    """A socket that ``offmap run --vsock`` connects to when the guest connects to VSOCK_PORT."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}_{VSOCK_PORT}")
    listener.listen()
    return listener


def listen_vsock() -> socket.socket:
    """A vsock socket at VSOCK_PORT, for VMMs that use the host kernel's vsock (QEMU)."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, VSOCK_PORT))
    listener.listen()
    return listener


def _accept(listener: socket.socket) -> socket.socket:
    listener.settimeout(scaled(PATIENCE))
    peer, _ = listener.accept()
    peer.settimeout(scaled(PATIENCE))
    return peer


def echo_peer(listener: socket.socket, size: int) -> bool:
    """Send random bytes to the first caller. Return whether the same bytes came back."""
    data = os.urandom(size)
    with _accept(listener) as peer, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(peer.sendall, data)
        got = bytearray()
        while len(got) < size and (piece := peer.recv(1 << 16)):
            got += piece
        sending.result()
        peer.shutdown(socket.SHUT_WR)  # not before: Firecracker's vsock ends both directions with it
        got += peer.recv(1)  # nothing more may come
    return bytes(got) == data


def sink_peer(listener: socket.socket, size: int) -> bool:
    """Read `size` bytes from the first caller, and send one byte back. Return whether all came."""
    left = size
    buffer = bytearray(1 << 18)
    with _accept(listener) as peer:
        while left > 0 and (got := peer.recv_into(buffer)):
            left -= got
        peer.sendall(b".")
    return left == 0


@contextlib.contextmanager
def attempt(peer: Callable[[socket.socket, int], bool], listener: socket.socket, size: int) -> Iterator[Future[bool]]:
    """Run the host's half on its own thread, while the caller tells the guest to do the other half."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(peer, listener, size)
        try:
            yield future
        except BaseException:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # nobody will call any more, and close(2) does not end accept(2)
            raise
