"""vhost-net: the host kernel moves packets between the guest's rings and a tap by itself (drivers/vhost/net.c).

A kernel thread with the VMM's address space reaches guest memory through this process's page tables (copy_to_user), so
it works on hidden RAM too. Its zero-copy transmission would not, because it pins the guest's pages with GUP. Linux has
that off since 5.2 (098eadce3c62).

Notifications and interrupts do not pass through this process: both are eventfds that KVM and vhost share.
"""

import os
from collections.abc import Sequence
from ctypes import c_uint64
from pathlib import Path

from offmap.devices.virtio.device import Bypass
from offmap.devices.virtio.dma import Dma
from offmap.devices.virtio.iov import address_of
from offmap.devices.virtio.queue import Queue
from offmap.errors import OffmapError
from offmap.kvm.handle import Handle
from offmap.uapi import vhost as uapi
from offmap.uapi.virtio.config import VIRTIO_F_VERSION_1
from offmap.uapi.virtio.net import VIRTIO_NET_F_MRG_RXBUF
from offmap.uapi.virtio.ring import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC

DEVICE = "/dev/vhost-net"
_ZERO_COPY = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")

# Of a driver's features those that change the rings or what is in them; the others are the tap's business.
_FEATURES = sum(
    1 << bit
    for bit in (VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_VERSION_1)
)


class VhostNet(Handle):
    """Owns an fd of /dev/vhost-net; closing it ends whatever it does.

    Attributes:
        errors: once it was started, an fd that becomes readable when the driver has broken the rules of a queue; or -1.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.errors = -1
        self._served: list[tuple[int, int, int]] = []  # queue, its kicks, the tap: while it serves

    def start(self, tap: int, queues: Sequence[tuple[int, Queue]], features: int, dma: Dma, bypass: Bypass) -> None:
        """Let the kernel serve `queues` (device's number, queue): the receive queue, then the transmit queue.

        Raises:
            KernelError: it will not, E2BIG where memory is in more pieces than it can have.
        """
        self.call("VHOST_SET_FEATURES", uapi.VHOST_SET_FEATURES, c_uint64(features & _FEATURES))
        # Each page that is kept from the guest cuts its memory in two.
        remedy = f"load the module vhost with max_mem_regions={len(dma.pieces())}, if that is what it does not take"
        self.call("VHOST_SET_MEM_TABLE", uapi.VHOST_SET_MEM_TABLE, _memory_table(dma), remedy)
        self.errors = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for index, (number, queue) in enumerate(queues):
            self._set_up(index, queue, dma, bypass.kicks[number], bypass.irq)
        self._served = [(index, bypass.kicks[number], tap) for index, (number, _) in enumerate(queues)]
        self.resume()

    def _set_up(self, index: int, queue: Queue, dma: Dma, kick: int, irq: int) -> None:
        state = uapi.vhost_vring_state(index, queue.size)
        self.call("VHOST_SET_VRING_NUM", uapi.VHOST_SET_VRING_NUM, state)
        self.call("VHOST_SET_VRING_BASE", uapi.VHOST_SET_VRING_BASE, uapi.vhost_vring_state(index, 0))
        parts = (
            address_of(dma.view(queue.desc, 16 * queue.size)),
            address_of(dma.view(queue.used, 6 + 8 * queue.size)),
            address_of(dma.view(queue.avail, 6 + 2 * queue.size)),
        )
        self.call("VHOST_SET_VRING_ADDR", uapi.VHOST_SET_VRING_ADDR, uapi.vhost_vring_addr(index, 0, *parts, 0))
        self._set_file("VHOST_SET_VRING_ERR", uapi.VHOST_SET_VRING_ERR, index, self.errors)
        self._set_file("VHOST_SET_VRING_CALL", uapi.VHOST_SET_VRING_CALL, index, irq)
        self._set_file("VHOST_SET_VRING_KICK", uapi.VHOST_SET_VRING_KICK, index, kick)

    def _set_file(self, name: str, request: int, index: int, fd: int) -> None:
        self.call(name, request, uapi.vhost_vring_file(index, fd))

    def pause(self) -> None:
        """Leave the queues alone until `resume`: when this returns, nothing of the guest's memory is touched."""
        for index, _, _ in self._served:
            self._set_file("VHOST_NET_SET_BACKEND", uapi.VHOST_NET_SET_BACKEND, index, uapi.VHOST_FILE_UNBIND)

    def resume(self) -> None:
        """Serve the queues, from where they were."""
        for index, kick, tap in self._served:
            self._set_file("VHOST_NET_SET_BACKEND", uapi.VHOST_NET_SET_BACKEND, index, tap)
            os.eventfd_write(kick, 1)  # the driver's last one may have found nobody

    def stop(self) -> None:
        """Take the queues back. After this the kernel touches no guest memory."""
        if self.errors < 0:
            return
        self.pause()
        self._served = []
        for index in range(2):
            for name, request in (
                ("VHOST_SET_VRING_KICK", uapi.VHOST_SET_VRING_KICK),
                ("VHOST_SET_VRING_CALL", uapi.VHOST_SET_VRING_CALL),
                ("VHOST_SET_VRING_ERR", uapi.VHOST_SET_VRING_ERR),
            ):
                self._set_file(name, request, index, uapi.VHOST_FILE_UNBIND)
        os.close(self.errors)
        self.errors = -1

    def close(self) -> None:
        super().close()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1


def open_vhost_net(hidden: bool) -> VhostNet:
    """The host's vhost-net, owned by this process.

    Args:
        hidden: guest RAM is hidden, so its pages cannot be pinned.

    Raises:
        OffmapError: this host has none, or none that would work.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedy = "load the module vhost_net, or leave vhost=on out"
        raise OffmapError(f"cannot open {DEVICE}: {error.strerror}", remedy) from None
    vhost = VhostNet(fd)
    try:
        if hidden and _zero_copy():
            raise OffmapError(
                "vhost-net sends without a copy on this host (experimental_zcopytx), for which it must pin the guest's "
                "pages; hidden RAM cannot be pinned",
                "load vhost_net with experimental_zcopytx=0, or leave vhost=on out",
            )
        vhost.call("VHOST_SET_OWNER", uapi.VHOST_SET_OWNER)
        offered = c_uint64()
        vhost.call("VHOST_GET_FEATURES", uapi.VHOST_GET_FEATURES, offered)
        if _FEATURES & ~offered.value:
            raise OffmapError("this host's vhost-net lacks features that a modern guest uses", "leave vhost=on out")
    except BaseException:
        vhost.close()
        raise
    return vhost


def _zero_copy() -> bool:
    try:
        return _ZERO_COPY.read_text().strip() != "0"
    except OSError:
        return False  # a kernel so new that it has no such parameter


def _memory_table(dma: Dma) -> bytearray:
    """struct vhost_memory, with its regions."""
    regions = [uapi.vhost_memory_region(start, end - start, address_of(view), 0) for start, end, view in dma.pieces()]
    return bytearray(bytes(uapi.vhost_memory(len(regions), 0)) + b"".join(map(bytes, regions)))
