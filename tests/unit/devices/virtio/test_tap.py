"""Real tap interfaces: made, attached to, taken over, set down and deleted under the device."""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from offmap.devices.virtio.net import RX, TX, Net
from offmap.devices.virtio.net_spec import NetSpec, make_mac, parse_mac, parse_net
from offmap.devices.virtio.tap import Tap, check_name, open_tap, tap_of_fd
from offmap.errors import OffmapError
from offmap.uapi import if_tun
from offmap.uapi.virtio import net as uapi

from .bench import Bench

NAME = f"oft{os.getpid()}"
HEADER = bytes(12)
CLONE_NEWNET = 0x40000000  # linux/sched.h
SELF = IPv4Interface("198.18.77.1/30")  # RFC 2544: benchmarks; on nobody's network


def interface_ioctl(request: int, argument: if_tun.ifreq) -> if_tun.ifreq:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket.fileno(), request, argument)
    return argument


def set_up(up: bool) -> None:
    argument = interface_ioctl(if_tun.SIOCGIFFLAGS, if_tun.ifreq(NAME.encode()))
    argument.ifru_flags = argument.ifru_flags | if_tun.IFF_UP if up else argument.ifru_flags & ~if_tun.IFF_UP
    interface_ioctl(if_tun.SIOCSIFFLAGS, argument)


def attach(flags: int, *, persist: bool = False) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, if_tun.TUNSETIFF, if_tun.ifreq(NAME.encode(), ifru_flags=flags))
    if persist:
        fcntl.ioctl(fd, if_tun.TUNSETPERSIST, 1)
    return fd


def exists() -> bool:
    return Path("/sys/class/net", NAME).exists()


@pytest.fixture
def tap() -> Iterator[Tap]:
    try:
        made = open_tap(NAME, address=SELF, mtu=2000)
    except OffmapError as error:
        pytest.skip(f"no real tap was tried: {error}")
    with made:
        yield made


def ping(tap: Tap) -> bytes:
    """A frame that makes the host answer: ARP for its own address."""
    us = bytes.fromhex("020000000001")
    asked = struct.pack("!6s6sHHHBBH", b"\xff" * 6, us, 0x806, 1, 0x800, 6, 4, 1)
    return asked + us + (SELF.ip + 1).packed + bytes(6) + SELF.ip.packed


def test_one_that_is_made_goes_again(tap: Tap) -> None:
    assert exists() and tap.is_up()
    assert Path("/sys/class/net", NAME, "mtu").read_text().strip() == "2000"
    tap.close()
    assert not exists()
    tap.close()


def test_what_is_refused(tap: Tap) -> None:
    with pytest.raises(OffmapError, match="another program uses it"):
        open_tap(NAME)
    with pytest.raises(OffmapError, match="it is not a tap"):
        open_tap("lo")
    with pytest.raises(OffmapError, match="it is not a tap"):
        open_tap("lo", address=SELF)
    for name in ("", ".", "..", "a/b", "a b", "x" * 16, "tap%d"):
        with pytest.raises(OffmapError, match="not the name"):
            check_name(name)


@pytest.mark.parametrize("flags", [0, if_tun.IFF_MULTI_QUEUE])
def test_a_persistent_one_stays(tap: Tap, flags: int) -> None:
    tap.close()
    fd = attach(if_tun.IFF_TAP | if_tun.IFF_NO_PI | flags, persist=True)
    os.close(fd)
    try:
        with pytest.raises(OffmapError, match="exists already"):
            open_tap(NAME, address=SELF)
        with open_tap(NAME) as attached:
            assert not attached.is_up(), "whose it is brings it up"
            assert attached.last_words() == f"somebody has set the interface {NAME} down"
            set_up(True)
            assert attached.is_up()
        assert exists()
    finally:
        fd = attach(if_tun.IFF_TAP | if_tun.IFF_NO_PI | flags)
        fcntl.ioctl(fd, if_tun.TUNSETPERSIST, 0)
        os.close(fd)


def test_one_of_a_parent_process(tap: Tap) -> None:
    tap.close()
    good = attach(if_tun.IFF_TAP | if_tun.IFF_NO_PI | if_tun.IFF_VNET_HDR)
    with tap_of_fd(good) as taken:
        assert (taken.fd, taken.name) == (good, NAME)
        assert not os.get_inheritable(good) and not os.get_blocking(good)
    bad = attach(if_tun.IFF_TAP | if_tun.IFF_NO_PI)
    with pytest.raises(OffmapError, match="IFF_VNET_HDR"):
        tap_of_fd(bad)
    os.close(bad)
    for fd in (bad, 1 << 20, 1 << 40):
        with pytest.raises(OffmapError, match="not an open tap"):
            tap_of_fd(fd)


def test_packets_go_both_ways_until_the_interface_goes(tap: Tap) -> None:
    said: list[str] = []
    with Bench(Net(tap, make_mac(), None, said.append), size=64) as bench:
        rx, tx, _ = bench.drivers
        for _ in range(64):
            rx.add(4500)
        bench.device.handle(RX)
        bench.settle()
        tx.add(HEADER + ping(tap))
        bench.device.handle(TX)
        answers: list[bytes] = []

        def answered() -> bool:
            while rx.used_idx() != rx.seen:
                answers.append(rx.result()[12:])  # the host has more to say, of IPv6
            return any(frame[12:14] == b"\x08\x06" and frame[28:32] == SELF.ip.packed for frame in answers)

        bench.wait(answered)

        set_up(False)
        bench.wait(lambda: bench.config_changes == 1)
        assert said == [f"net: the link is down: somebody has set the interface {NAME} down"]
        tx.add(HEADER + ping(tap))
        bench.device.handle(TX)
        assert tx.used_idx() == 2
        set_up(True)
        bench.wait(lambda: bench.config_changes == 2)

        # Deleted by somebody else: as at the end of its network namespace, or `ip link delete`.
        delete_link()
        bench.wait(lambda: bench.config_changes == 3)
        assert said[-1].endswith("is no more")
        assert uapi.virtio_net_config.from_buffer_copy(bench.device.config()).status == 0
        tx.add(HEADER + ping(tap))
        bench.device.handle(TX)
        bench.settle()
        assert tx.used_idx() == 3
        assert tap.fd not in bench.watched


def test_one_of_another_network_namespace_is_taken_to_be_up(tap: Tap) -> None:
    tap.close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            try:
                unshare(CLONE_NEWNET)
                fd = attach(if_tun.IFF_TAP | if_tun.IFF_NO_PI | if_tun.IFF_VNET_HDR)
                socket.send_fds(theirs, [b"x"], [fd])
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        ours.setblocking(False)
        try:
            _, (fd,), *_ = socket.recv_fds(ours, 1, 1)
        except (BlockingIOError, ValueError):
            pytest.skip("a tap of another network namespace was not tried: this user may not make one")
    with tap_of_fd(fd) as other, open_tap(NAME) as down:  # the same name, here
        set_up(False)
        assert not down.is_up()
        assert other.is_up()


def unshare(flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def delete_link() -> None:
    """RTM_DELLINK (rtnetlink(7)): struct nlmsghdr, struct ifinfomsg."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        index = socket.if_nametoindex(NAME)
        netlink.send(struct.pack("<IHHII", 32, 17, 1 | 4, 1, 0) + struct.pack("<BxHiII", 0, 0, index, 0, 0))
        netlink.recv(1000)


def test_options() -> None:
    assert parse_net("tap=tap0,mac=02:00:00:00:00:0a,mtu=9000,address=198.18.0.1/24") == NetSpec(
        tap="tap0", mac=bytes.fromhex("02000000000a"), mtu=9000, address=IPv4Interface("198.18.0.1/24")
    )
    assert parse_net("fd=3").fd == 3
    assert parse_net("user").passt
    wrong = (
        *("", "tap", "tap=", "tap=x,fd=3", "tap=x,tap=y", "fd=-1", "fd=x", "what=1", "mtu=1500", "tap=x,tcp=80"),
        *("tap=x,mtu=67", "tap=x,mtu=65536", "tap=x,mtu=1k", "passt,address=1.2.3.4/8", "tap=x,address=1.2.3.4"),
        *("tap=x,address=1.2.3/8", "tap=a/b"),
    )
    for text in wrong:
        with pytest.raises(OffmapError):
            parse_net(text)


@pytest.mark.parametrize(
    "text", ["", "02:00", "02-00-00-00-00-01", "02:00:00:00:00:0g", "01:00:00:00:00:01", "00:" * 5 + "00"]
)
def test_addresses_that_no_card_has(text: str) -> None:
    with pytest.raises(OffmapError):
        parse_mac(text)


def test_made_up_addresses_are_those_of_one_card() -> None:
    macs = {make_mac() for _ in range(50)}
    assert len(macs) == 50
    assert all(mac[0] & 3 == 2 for mac in macs)
