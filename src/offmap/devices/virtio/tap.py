"""A tap device: Ethernet frames between a guest and a network interface of the host.

Each read and write is a virtio_net_hdr_v1 and one frame (IFF_VNET_HDR). The header lets one side leave checksums and
segmentation to the other. TUNSETOFFLOAD says which of them the reader accepts.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Sequence
from ctypes import c_int, sizeof
from ipaddress import IPv4Interface
from pathlib import Path

from offmap.errors import KernelError, OffmapError
from offmap.kvm.handle import Handle
from offmap.uapi import if_tun as uapi
from offmap.uapi.virtio.net import virtio_net_hdr_v1
from offmap.units import printable

_DEVICE = "/dev/net/tun"
_FLAGS = uapi.IFF_TAP | uapi.IFF_NO_PI | uapi.IFF_VNET_HDR
_NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")
_RTMGRP_LINK = 1  # linux/rtnetlink.h
_SOCKADDR_IN = struct.Struct("<HH4s8x")  # family, port (0), address: linux/in.h


class Tap(Handle):
    """Owns the fd of a tap device. An interface that `open_tap` made is deleted with it.

    Attributes:
        fd: readable when a frame is there. Each read or write is one frame.
        name: the interface's name when it was opened.
        changes: an fd that becomes readable when any interface of the host changes; `is_up` may differ then.
    """

    has_vnet_hdr = True
    kind = "tap"

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._netlink.bind((0, _RTMGRP_LINK))
        self.changes = self._netlink.fileno()
        self._in_sight = _is_in_our_namespace(fd)

    def set_offload(self, flags: int) -> None:
        """Say what frames that are read may leave undone (TUN_F_*).

        Raises:
            KernelError: EINVAL if this kernel's tap does not know one of the flags, EBADFD if the interface is gone.
        """
        self.call("TUNSETOFFLOAD", uapi.TUNSETOFFLOAD, flags)

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Read one frame, its header first. The part that does not fit is lost.

        Returns:
            Its length in bytes, with the header.

        Raises:
            BlockingIOError: there is no frame.
            OSError: the interface is gone (EBADFD and others).
        """
        return os.readv(self.fd, buffers)

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Write one frame, its header first.

        Raises:
            BlockingIOError: the interface's queue is full; `fd` becomes writable.
            OSError: EINVAL if it is no frame, EIO if the interface is down, EBADFD if it is gone.
        """
        os.writev(self.fd, buffers)

    def flush(self) -> bool:
        """Whether all sent frames have left. Always true: a tap keeps none."""
        return True

    def forget(self) -> None:
        """Drop a frame that was read in part. A tap has none: it reads whole frames."""

    def is_up(self) -> bool:
        """Whether the interface is there and up. Drains `changes`.

        The state of an interface in another network namespace cannot be read. It counts as up.
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._netlink.recv(1 << 16)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # more changes than the socket could hold
                        raise
        request = uapi.ifreq()
        try:
            self.call("TUNGETIFF", uapi.TUNGETIFF, request)  # it may have been renamed
        except KernelError:
            return False  # EBADFD: it was deleted
        if not self._in_sight:
            return True
        try:
            Handle(self.changes).call("SIOCGIFFLAGS", uapi.SIOCGIFFLAGS, request)
        except KernelError:
            return True
        return bool(request.ifru_flags & uapi.IFF_UP)

    def last_words(self) -> str:
        """Why the interface is not up, for people."""
        request = uapi.ifreq()
        try:
            self.call("TUNGETIFF", uapi.TUNGETIFF, request)
        except KernelError:
            return f"the interface {self.name} is no more"
        return f"somebody has set the interface {printable(request.ifr_name.decode(errors='replace'))} down"

    def close(self) -> None:
        self._netlink.close()
        super().close()


def check_name(name: str) -> None:
    """Check the name of a network interface. Raises OffmapError: no interface can have this name."""
    if not _NAME.fullmatch(name) or name in {".", ".."}:
        raise OffmapError(f"{name!r} is not the name of a network interface", "use up to 15 letters, digits, . _ -")


def open_tap(name: str, *, address: IPv4Interface | None = None, mtu: int | None = None) -> Tap:
    """Attach to the tap interface `name`, or make it. An interface that this makes is deleted with its Tap.

    Args:
        address: the host's address on a new interface.
        mtu: of a new interface.

    Raises:
        OffmapError: the interface cannot be had; the message says why.
    """
    existed = Path("/sys/class/net", name).exists()
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        remedy = "load the tun module" if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO} else "run as root"
        raise OffmapError(f"cannot open {_DEVICE}: {error.strerror}", remedy) from None
    try:
        _attach(fd, name)
        _use_header(fd)
        if not existed:
            _configure(name, address, mtu)
        elif address is not None:
            raise OffmapError(
                f"the interface {name} exists already: its addresses are not ours to set",
                f"leave address= out, and run: ip address add {address} dev {name}",
            )
        return Tap(fd, name)
    except BaseException:
        os.close(fd)
        raise


def tap_of_fd(fd: int) -> Tap:
    """Take over an open tap (from a parent process, or systemd).

    Raises:
        OffmapError: it is no tap, or was not opened as virtio-net needs it.
    """
    request = uapi.ifreq()
    try:
        Handle(fd).call("TUNGETIFF", uapi.TUNGETIFF, request)
    except (KernelError, OverflowError, ValueError):
        raise OffmapError(f"fd {fd} is not an open tap device", "hand one over, or use tap=NAME") from None
    flags = request.ifru_flags
    if flags & _FLAGS != _FLAGS:
        raise OffmapError(
            f"the tap device of fd {fd} was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
            "open it with these three, or use tap=NAME",
        )
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    _use_header(fd)
    return Tap(fd, request.ifr_name.decode())


def _attach(fd: int, name: str) -> None:
    flags = _FLAGS
    for attempt in (flags, flags | uapi.IFF_MULTI_QUEUE):  # a persistent tap may have several queues
        try:
            Handle(fd).call("TUNSETIFF", uapi.TUNSETIFF, uapi.ifreq(name.encode(), ifru_flags=attempt))
        except KernelError as failed:
            error = failed
            if failed.errno != errno.EINVAL:
                break
        else:
            return
    reason, remedy = {
        errno.EPERM: (
            "this user may not",
            f"run as root, or let root make it first: ip tuntap add {name} mode tap user $(id -un)",
        ),
        errno.EBUSY: ("another program uses it", "give each guest a tap of its own"),
        errno.EINVAL: ("it is not a tap", "give the name of a tap, or one that is not taken"),
    }.get(error.errno, (error.reason, ""))
    raise OffmapError(f"cannot attach to the tap interface {name}: {reason}", remedy)


def _use_header(fd: int) -> None:
    Handle(fd).call("TUNSETVNETHDRSZ", uapi.TUNSETVNETHDRSZ, c_int(sizeof(virtio_net_hdr_v1)))


def _configure(name: str, interface: IPv4Interface | None, mtu: int | None) -> None:
    """Bring a new interface up, with an address (netdevice(7)). Raises KernelError: the kernel refuses them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fd = any_socket.fileno()
        if mtu is not None:
            Handle(fd).call(f"setting the MTU of {name}", uapi.SIOCSIFMTU, uapi.ifreq(name.encode(), ifru_mtu=mtu))
        if interface is not None:
            for what, request, address in (
                ("address", uapi.SIOCSIFADDR, interface.ip),
                ("netmask", uapi.SIOCSIFNETMASK, interface.netmask),
            ):
                argument = uapi.ifreq(name.encode())
                argument.ifru_addr[:] = _SOCKADDR_IN.pack(socket.AF_INET, 0, address.packed)
                Handle(fd).call(f"setting the {what} of {name}", request, argument)
        argument = uapi.ifreq(name.encode())
        Handle(fd).call(f"SIOCGIFFLAGS of {name}", uapi.SIOCGIFFLAGS, argument)
        argument.ifru_flags |= uapi.IFF_UP
        Handle(fd).call(f"bringing {name} up", uapi.SIOCSIFFLAGS, argument)


def _is_in_our_namespace(fd: int) -> bool:
    try:
        namespace = fcntl.ioctl(fd, uapi.TUNGETDEVNETNS)
    except OSError:
        return True  # this user may not ask; it usually is
    try:
        return os.path.samestat(os.fstat(namespace), Path("/proc/self/ns/net").stat())
    finally:
        os.close(namespace)
