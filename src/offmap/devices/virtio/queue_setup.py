"""What a driver writes about a queue before it makes the queue ready: size and addresses (virtio 1.2, 4.2.2)."""

from collections.abc import Mapping

from offmap.uapi.virtio import mmio as reg

LOW, HIGH = 0xFFFFFFFF, 0xFFFFFFFF << 32

_ADDRESSES: Mapping[int, tuple[str, int]] = {
    reg.VIRTIO_MMIO_QUEUE_DESC_LOW: ("desc", 0),
    reg.VIRTIO_MMIO_QUEUE_DESC_HIGH: ("desc", 32),
    reg.VIRTIO_MMIO_QUEUE_AVAIL_LOW: ("avail", 0),
    reg.VIRTIO_MMIO_QUEUE_AVAIL_HIGH: ("avail", 32),
    reg.VIRTIO_MMIO_QUEUE_USED_LOW: ("used", 0),
    reg.VIRTIO_MMIO_QUEUE_USED_HIGH: ("used", 32),
}
"""The field that each register is half of, and the half's first bit."""

QUEUE_REGISTERS = frozenset({reg.VIRTIO_MMIO_QUEUE_NUM, reg.VIRTIO_MMIO_QUEUE_READY, *_ADDRESSES})
"""Those that concern the selected queue."""


class QueueSetup:
    """One queue as its driver set it up. Addresses are guest-physical."""

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.size = size_max
        self.ready = False
        self.desc = self.avail = self.used = 0

    def write(self, register: int, value: int) -> None:
        """Set the size or half of an address. A write to a ready queue is lost: a driver may not do that (4.2.2.2)."""
        if self.ready:
            return
        if register == reg.VIRTIO_MMIO_QUEUE_NUM:
            self.size = value
        else:
            name, shift = _ADDRESSES[register]
            kept = getattr(self, name) & (LOW if shift else HIGH)
            setattr(self, name, kept | value << shift)
