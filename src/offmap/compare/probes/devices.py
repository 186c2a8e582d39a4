"""Do the guest's devices work? Each probe moves data and compares them."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offmap.audit.guest_ram import RamRange
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.network import (
    VSOCK_PORT,
    Subnet,
    attempt,
    echo_peer,
    listen_tcp,
    listen_unix,
    listen_vsock,
)
from offmap.compare.probes.survey import no, undetermined, yes
from offmap.compare.probes.vmm_memory import resident_kib
from offmap.compare.questions import Answer
from offmap.compare.vmm_command import card_mac
from offmap.patience import scaled

MIB = 1 << 20
DISK_SIZE = 16 * MIB
BALLOON = 16 * MIB
"""Bytes that the guest must give back."""

_TOUCHED = 32 * MIB  # the guest touches and frees these bytes first: an untouched page has no memory to give back
_ENOUGH = 0.75  # of a balloon: some of its pages may never have been touched
_INFLATED_BY = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Disk:
    """An image whose first MiB is random."""

    path: Path
    first: bytes


def make_disk(path: Path) -> Disk:
    """Make the image, and fill its first MiB."""
    first = os.urandom(MIB)
    path.write_bytes(first)
    os.truncate(path, DISK_SIZE)
    return Disk(path, first)


def virtio_blk(guest: LiveGuest, disk: Disk) -> Answer:
    """Let the guest copy the first MiB of its disk to the second by O_DIRECT. Compare them on the host."""
    id = "works.virtio_blk"
    guest.command(f"disk /dev/vda {MIB}")
    with disk.path.open("rb") as file:
        file.seek(MIB)
        copied = file.read(MIB)
    if copied != disk.first:
        return no(id, "what the guest read from its disk and wrote to it again is not the same in the host")
    return yes(id, f"{MIB >> 10} KiB read and written by the guest with O_DIRECT, flushed, and compared in the host")


def virtio_net(guest: LiveGuest, card: int, subnet: Subnet, id: str) -> Answer:
    """Send random bytes to the guest by TCP, and let it send them back."""
    configure(guest, card, subnet)
    listener, port = listen_tcp(subnet)
    with listener, attempt(echo_peer, listener, MIB) as echoed:
        guest.command(f"echo tcp {subnet.host.ip} {port}")
        if not echoed.result():
            return no(id, "what came back from the guest is not what was sent to it")
    return yes(id, f"{MIB >> 10} KiB by TCP to the guest and back, compared")


def configure(guest: LiveGuest, card: int, subnet: Subnet) -> None:
    """Give a guest's n-th card its address. Raises ProbeError: there is no such interface."""
    address = subnet.guest
    name = f"$(cd /sys/class/net; grep -l {card_mac(card)} */address | cut -d/ -f1)"
    guest.shell(f"ifconfig {name} {address.ip} netmask {address.netmask} up")


@contextlib.contextmanager
def _vsock_listener(guest: LiveGuest) -> Iterator[socket.socket]:
    if guest.setup.vsock is None:
        return
    listener = listen_vsock() if guest.setup.kind.vmm.is_qemu else listen_unix(guest.setup.vsock)
    with listener:
        yield listener


def vsock(guest: LiveGuest) -> Answer:
    """Send random bytes to the guest over vsock, and let it send them back."""
    id = "works.vsock"
    with _vsock_listener(guest) as listener, attempt(echo_peer, listener, MIB) as echoed:
        guest.command(f"echo vsock {VSOCK_PORT}")
        if not echoed.result():
            return no(id, "what came back from the guest is not what was sent to it")
    how = "the host kernel's vhost-vsock" if guest.setup.kind.vmm.is_qemu else "the VMM's device"
    return yes(id, f"{MIB >> 10} KiB to the guest and back through {how}, compared")


def balloon(guest: LiveGuest, ranges: Sequence[RamRange]) -> Answer:
    """Let the guest use memory and free it, insert the balloon's driver, and watch the VMM's memory shrink.

    Args:
        ranges: of the guest's RAM in the VMM.
    """
    id = "works.balloon"
    if "virtio_balloon" not in guest.shell("ls /modules"):
        return undetermined(
            id, "not measured: this guest's kernel has the driver built in, so it cannot be loaded late"
        )
    guest.shell(f"head -c {_TOUCHED} /dev/zero >/tmp/touched; rm /tmp/touched")
    before = resident_kib(guest.pid, ranges)
    if before < BALLOON >> 10:
        return undetermined(id, f"only {before} KiB of the guest's RAM show in the VMM's memory: a loss would not show")
    guest.command("load virtio_balloon")
    given, deadline = 0, time.monotonic() + scaled(_INFLATED_BY)
    while given < _ENOUGH * (BALLOON >> 10) and time.monotonic() < deadline:
        time.sleep(0.2)  # nothing tells that the driver is done
        given = before - resident_kib(guest.pid, ranges)
    said = f"a balloon of {BALLOON >> 10} KiB made the VMM's share of guest RAM go from {before} KiB down by {given}"
    if given >= _ENOUGH * (BALLOON >> 10):
        return yes(id, said)
    return no(id, said)


def smp(guest: LiveGuest) -> Answer:
    """Run on each CPU of a guest."""
    id = "works.smp"
    ran_on = [int(cpu) for cpu in guest.command("cpus")[0]]
    wanted = list(range(guest.setup.vcpus))
    if ran_on != wanted:
        return no(id, f"the guest runs on CPUs {ran_on}, not {wanted}")
    return yes(id, f"online, and a thread ran on each: {ran_on}")
