"""A device behind its registers, with a driver that writes them: what KVM and a guest are otherwise."""

import os
import threading
from collections.abc import Callable
from typing import Self

from offmap.devices.virtio.device import VirtioDevice
from offmap.devices.virtio.interrupts import Interrupts, InterruptStatus
from offmap.devices.virtio.mmio import MmioTransport
from offmap.owned import Owned
from offmap.patience import scaled
from offmap.uapi.virtio import mmio as reg
from offmap.uapi.virtio.config import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_VERSION_1,
)

from .driver import Driver

__all__ = ["Wired"]

VERSION_1 = 1 << VIRTIO_F_VERSION_1


class Wired(Owned):
    """`device` on a transport, and the registers as a driver uses them.

    Args:
        drivers: one for each queue that `set_up` sets up; they share their memory.
    """

    def __init__(self, device: VirtioDevice, *drivers: Driver) -> None:
        self.device = device
        self.drivers = drivers
        self.said: list[str] = []
        self.interrupts = 0
        self._interrupted = threading.Condition()
        self.page = memoryview(bytearray(4096))
        self.transport = MmioTransport("test0", device, self.page, drivers[0].dma, self._make_status, self.said.append)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in device.queue_sizes]
        for number, kick in enumerate(self.kicks):
            self.transport.watch_kicks(number, kick)

    def _make_status(self, show: Callable[[int], None]) -> InterruptStatus:
        return InterruptStatus(Interrupts(None), show, self._interrupt)

    def _interrupt(self) -> None:
        with self._interrupted:
            self.interrupts += 1
            self._interrupted.notify_all()

    def read(self, register: int) -> int:
        return int.from_bytes(self.page[register : register + 4], "little")

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.transport.write(register, size, value)

    @property
    def status(self) -> int:
        return self.read(reg.VIRTIO_MMIO_STATUS)

    def offered(self) -> int:
        """The features that the device offers."""
        words = []
        for word in range(2):
            self.write(reg.VIRTIO_MMIO_DEVICE_FEATURES_SEL, word)
            words.append(self.read(reg.VIRTIO_MMIO_DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def negotiate(self, features: int) -> bool:
        """Whether the device lives with them."""
        self.write(reg.VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE)
        self.write(reg.VIRTIO_MMIO_STATUS, self.status | VIRTIO_CONFIG_S_DRIVER)
        for word in range(2):
            self.write(reg.VIRTIO_MMIO_DRIVER_FEATURES_SEL, word)
            self.write(reg.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)
        self.write(reg.VIRTIO_MMIO_STATUS, self.status | VIRTIO_CONFIG_S_FEATURES_OK)
        return bool(self.status & VIRTIO_CONFIG_S_FEATURES_OK)

    def set_up_queue(self, number: int, driver: Driver) -> None:
        self.write(reg.VIRTIO_MMIO_QUEUE_SEL, number)
        self.write(reg.VIRTIO_MMIO_QUEUE_NUM, driver.size)
        for name, low in (
            ("desc", reg.VIRTIO_MMIO_QUEUE_DESC_LOW),
            ("avail", reg.VIRTIO_MMIO_QUEUE_AVAIL_LOW),
            ("used", reg.VIRTIO_MMIO_QUEUE_USED_LOW),
        ):
            self.write(low, getattr(driver, name) & 0xFFFFFFFF)
            self.write(low + 4, getattr(driver, name) >> 32)
        self.write(reg.VIRTIO_MMIO_QUEUE_READY, 1)

    def set_up(self, features: int = 0) -> Self:
        """All that a driver does until the device is live; of `features`, what is offered."""
        assert self.negotiate(features & self.offered() | VERSION_1)
        for number, driver in enumerate(self.drivers):
            self.set_up_queue(number, driver)
        self.write(reg.VIRTIO_MMIO_STATUS, self.status | VIRTIO_CONFIG_S_DRIVER_OK)
        return self

    def kick(self, number: int = 0) -> None:
        """Tell the device that there are buffers, and wait until it has looked at them."""
        os.eventfd_write(self.kicks[number], 1)
        self.settle()

    def settle(self) -> None:
        """Wait until the worker has seen all that was written before: it takes events in their order."""
        self.transport.worker.call(lambda: None)

    def await_interrupts(self, count: int, seconds: float = 10.0) -> None:
        """Wait until there have been so many in all."""
        with self._interrupted:
            assert self._interrupted.wait_for(lambda: self.interrupts >= count, scaled(seconds))

    def close(self) -> None:
        self.transport.quiesce()
        for kick in self.kicks:
            os.close(kick)
        self.device.close()
