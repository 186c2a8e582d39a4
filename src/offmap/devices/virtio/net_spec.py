"""``--net``: a network card as the user asks for it."""

import os
import re
from ipaddress import IPv4Interface

from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.limit import Limit
from offmap.devices.virtio.net import Backend, Net
from offmap.devices.virtio.passt import Passt
from offmap.devices.virtio.tap import check_name, open_tap, tap_of_fd
from offmap.devices.virtio.vhost import open_vhost_net
from offmap.errors import OffmapError
from offmap.options import Options
from offmap.typed import NamedTuple
from offmap.uapi.virtio.net import ETH_ALEN

MIN_MTU, MAX_MTU = 68, 65535  # virtio 1.2, 5.1.4.1; 68 is RFC 791's
PASST_MTU = 65520  # what passt tells the guest by itself: without segmentation offload, large packets are what helps
_MULTICAST = 0x01  # of a MAC address's first byte
_LOCAL = 0x02
_REMEDY = "see offmap run --help: tap=NAME, fd=N or passt, then mac=, mtu=, vhost=, address=, tcp=, udp=, rate=, ops="


class NetSpec(NamedTuple):
    """One card: exactly one of `tap`, `fd`, and `passt`.

    Attributes:
        tap: the name of a tap interface, made where there is none.
        fd: of an open tap.
        passt: user-mode networking.
        mac: the guest's address; one is made up where it is empty.
        mtu: to tell the guest.
        address: of the host's side of a tap that is made.
        forwards: passt's own options for its ports.
        vhost: let the host kernel move the packets of a tap.
        limit: how much may go each way in a second.
    """

    tap: str = ""
    fd: int | None = None
    passt: bool = False
    mac: bytes = b""
    mtu: int | None = None
    address: IPv4Interface | None = None
    forwards: tuple[str, ...] = ()
    vhost: bool = False
    limit: Limit | None = None

    def build(self, surroundings: Surroundings) -> Net:
        """Open the host's side."""
        mtu = self.mtu
        backend: Backend
        if self.passt:
            mtu = mtu or PASST_MTU
            backend = Passt(["--mtu", str(mtu), *self.forwards])
        elif self.fd is not None:
            backend = tap_of_fd(self.fd)
        else:
            backend = open_tap(self.tap, address=self.address, mtu=mtu)
        try:
            vhost = open_vhost_net(surroundings.hidden) if self.vhost else None
            net = Net(backend, self.mac or make_mac(), mtu, surroundings.say, vhost)
        except BaseException:
            backend.close()
            raise
        net.limit = self.limit
        net.child = backend if isinstance(backend, Passt) else None
        return net


def make_mac() -> bytes:
    """A random unicast address of those that anybody may use (IEEE 802, "locally administered")."""
    first, *rest = os.urandom(ETH_ALEN)
    return bytes([first & ~_MULTICAST | _LOCAL, *rest])


def parse_mac(text: str) -> bytes:
    """Six bytes of ``02:00:5e:00:53:01``. Raises OffmapError: it is none that a card may have."""
    if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise OffmapError(f"{text!r} is not a MAC address", "write it like 02:00:5e:00:53:01")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & _MULTICAST or not any(mac):
        raise OffmapError(f"{text} is not the address of one card", "give one with an even first byte, like 02:…")
    return mac


def parse_mtu(text: str) -> int:
    """A number of bytes. Raises OffmapError: it is none that Ethernet or the device can have."""
    mtu = int(text) if text.isdecimal() and len(text) < 6 else 0
    if not MIN_MTU <= mtu <= MAX_MTU:
        raise OffmapError(f"an MTU cannot be {text!r}", f"give a number from {MIN_MTU} to {MAX_MTU}, like 1500")
    return mtu


def parse_net(text: str) -> NetSpec:
    """``tap=NAME``, ``fd=N`` or ``passt`` (or ``user``, which is the same), and options.

    Raises:
        OffmapError: what cannot be.
    """
    with Options(text, "--net", _REMEDY, flags=("passt", "user")) as options:
        tap = options.text("tap", "", str)
        fd = options.number("fd", None, 0, 9_999_999)
        passt = options.flag("passt", "user")
        if [bool(tap), fd is not None, passt].count(True) != 1:
            options.refuse("it says of none, or of several, what to connect to")
        forwards: list[str] = []
        for key in ("tcp", "udp"):
            for value in options.every(key):
                forwards += [f"--{key}-ports", value]
        if forwards and not passt:
            options.refuse("tcp= and udp= are passt's")
        address = options.text("address", None, _parse_address)
        if address is not None and not tap:
            options.refuse("address= is for a tap that offmap makes", "use it with tap=NAME")
        vhost = options.switch("vhost")
        if vhost and passt:
            options.refuse("vhost= is for a tap")
        limit = Limit.from_options(options)
        if vhost and limit is not None:
            options.refuse("with vhost=on, no packet passes through offmap, which could count it", "limit the tap (tc)")
        if tap:
            check_name(tap)
        return NetSpec(
            tap=tap,
            fd=fd,
            passt=passt,
            mac=options.text("mac", b"", parse_mac),
            mtu=options.text("mtu", None, parse_mtu),
            address=address,
            forwards=tuple(forwards),
            vhost=vhost,
            limit=limit,
        )


def _parse_address(text: str) -> IPv4Interface:
    try:
        if "/" in text:
            return IPv4Interface(text)
    except ValueError:
        pass
    raise OffmapError(f"address={text} is not an IPv4 address with its prefix length", "write it like 192.0.2.1/24")
