"""What is fuzzed: a device behind its registers, or anything else that makes a case of an input."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from offmap.devices.virtio.device import VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.interrupts import Interrupts, InterruptStatus
from offmap.devices.virtio.mmio import MmioTransport
from offmap.owned import Owned
from offmap.uapi.virtio import config
from offmap.uapi.virtio import mmio as reg

from .choices import Choices
from .rings import GuestRam, Ring

MOST_STEPS = 24  # of a driver in one case
_FEATURES_OK = config.VIRTIO_CONFIG_S_ACKNOWLEDGE | config.VIRTIO_CONFIG_S_DRIVER | config.VIRTIO_CONFIG_S_FEATURES_OK
_DRIVER_OK = _FEATURES_OK | config.VIRTIO_CONFIG_S_DRIVER_OK
_VERSION_1 = 1 << config.VIRTIO_F_VERSION_1
_SIZES = (0, 1, 3, 0x8000, 0x10000, 0xFFFFFFFF)
_REGISTERS = tuple(range(0, 0x110, 4))
_VALUES = (0, 1, 2, 4, 8, 0xF, 0x40, 0x80, 0x1000, 0x80000, 0xFFFFFFFF)


class Target(Owned, ABC):
    """Something that reads what a guest wrote.

    Attributes:
        sources: the modules of offmap that it is about, for their coverage.
    """

    sources: Sequence[str] = ()

    @abstractmethod
    def case(self, choices: Choices) -> bool:
        """Have it read one case. Return whether it got further than the first check: something was done for the guest.

        Raises:
            Exception: a bug.
        """

    @property
    def spent(self) -> bool:
        """Whether its host has gone for good, so that nothing new comes of it."""
        return False

    def close(self) -> None:
        """Free what it has."""


class _Transport(MmioTransport):
    """Keeps what is no fault of the driver."""

    bug: Exception | None = None

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, DriverError):
            self.bug = error
        super()._failed(error)


class DeviceTarget(Target):
    """A virtio device. Each case is a driver: it resets the device, sets it up, and uses it."""

    def __init__(self) -> None:
        self.ram = GuestRam()
        self.device = self.build()
        self.page = memoryview(bytearray(4096))
        self.said: list[str] = []
        interrupts = Interrupts(None)
        self.transport = _Transport(
            "fuzzed",
            self.device,
            self.page,
            self.ram.dma,
            lambda show: InterruptStatus(interrupts, show, lambda: None),
            self._say,
            start=False,
        )
        self.worker = self.transport.worker
        self._kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.device.queue_sizes]
        for number, kick in enumerate(self._kicks):
            self.transport.watch_kicks(number, kick)
        self._offered = self.device.features | 3 << 28 | _VERSION_1
        self._turn_over()
        self._idle = self.worker.watched
        self.rings: list[Ring] = []
        self._before: list[int] = []  # of each ring, what the device had given back when the case began
        self._served = self._indirect = False

    @abstractmethod
    def build(self) -> VirtioDevice:
        """Make the device."""

    @abstractmethod
    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        """What a driver puts into a queue: the pieces that the device reads, and the sizes of those that it writes."""

    def begin(self) -> None:
        """Do what a driver and its host do first, so that a case need not make that up."""

    def add(self, queue: int, *reads: bytes, room: Sequence[int] = ()) -> None:
        """Put an ordinary buffer into a queue, and have it looked at."""
        self.rings[queue].add(Choices(b""), reads, room, indirect=False)
        os.eventfd_write(self._kicks[queue], 1)
        self._turn_over()

    def host(self, choices: Choices) -> None:
        """Something happens on the host's side of the device."""

    def _say(self, line: str) -> None:
        assert line.isprintable(), repr(line)
        if len(self.said) < 8:
            self.said.append(line)

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.transport.write(register, size, value)

    def case(self, choices: Choices) -> bool:
        c = choices
        self._served = False
        self._set_up(c)
        if c.byte() & 3:
            self.begin()
        self._before = [ring.used_idx() for ring in self.rings]
        for _ in range(MOST_STEPS):
            if not c.left:
                break
            # Most drivers see that the device has given them up, and begin again.
            if self.transport.read(reg.VIRTIO_MMIO_STATUS, 4) != _DRIVER_OK and c.byte() & 7:
                self._set_up_again(c)
            self._step(c)
        for kick in self._kicks:
            os.eventfd_write(kick, 1)
        self._turn_over()
        self._look_for_served()
        self.write(reg.VIRTIO_MMIO_STATUS, 0)
        self._turn_over()
        if self.transport.bug is not None:
            raise self.transport.bug
        assert self.worker.watched <= self._idle, "something is still watched after a reset"
        self.ram.check()
        return self._served

    def _look_for_served(self) -> None:
        self._served |= any(ring.used_idx() != idx for ring, idx in zip(self.rings, self._before, strict=True))

    def _set_up_again(self, c: Choices) -> None:
        self._look_for_served()
        self.write(reg.VIRTIO_MMIO_STATUS, 0)
        self._set_up(c)
        self._before = [0] * len(self.rings)

    def _set_up(self, c: Choices) -> None:
        """Do what a driver does until the device is live."""
        write = self.write
        features = self._offered
        if (kind := c.byte()) & 3 == 1:
            features &= c.word(4) << 28 | c.word(4) | _VERSION_1
        if kind > 250:
            features = c.word(8)
        write(reg.VIRTIO_MMIO_STATUS, config.VIRTIO_CONFIG_S_ACKNOWLEDGE | config.VIRTIO_CONFIG_S_DRIVER)
        for word in range(2):
            write(reg.VIRTIO_MMIO_DRIVER_FEATURES_SEL, word)
            write(reg.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)
        write(reg.VIRTIO_MMIO_STATUS, _FEATURES_OK)
        wrong = c.below(6) if c.rarely(12) else -1
        chosen = c.byte() % len(self._kicks)
        small = (16, 8, 4, 64)[c.byte() & 3]
        self.rings = []
        for number, most in enumerate(self.device.queue_sizes):
            ring = Ring(self.ram, number, min(small, most))
            self.rings.append(ring)
            odd = wrong if number == chosen else -1
            write(reg.VIRTIO_MMIO_QUEUE_SEL, number)
            write(reg.VIRTIO_MMIO_QUEUE_NUM, c.of(_SIZES) if odd == 0 else ring.size)
            addresses = [ring.desc, ring.avail, ring.used]
            if 1 <= odd <= 3:
                addresses[odd - 1] = c.word(8) if c.byte() & 1 else c.word(3)
            for at, address in enumerate(addresses):
                write(reg.VIRTIO_MMIO_QUEUE_DESC_LOW + 16 * at, address & 0xFFFFFFFF)
                if odd >= 0:
                    write(reg.VIRTIO_MMIO_QUEUE_DESC_LOW + 16 * at + 4, address >> 32)
            if odd != 4:
                write(reg.VIRTIO_MMIO_QUEUE_READY, 1)
        write(reg.VIRTIO_MMIO_STATUS, _DRIVER_OK)
        self._indirect = bool(features >> 28 & 1)

    def _step(self, c: Choices) -> None:
        what = c.byte()
        if what < 200:
            queue = c.below(len(self.rings))
            ring = self.rings[queue]
            for _ in range(1 + (what & 3)):
                ring.add(c, *self.buffer(c, queue), indirect=self._indirect)
            if what & 4:
                os.eventfd_write(self._kicks[queue], 1)
                self.worker.turn()
        elif what < 216:
            self.host(c)
        elif what < 232:
            self._turn_over()
        elif what < 240:
            self.rings[c.below(len(self.rings))].set_flags(c.byte() & 1, c.word(2))
        elif what < 246:
            size = (4, 1, 2, 8)[c.byte() & 3]
            self.write(reg.VIRTIO_MMIO_CONFIG + c.below(24), c.word(size), size)
        elif what < 252:
            size = 4 if c.byte() < 240 else 2
            self.write(c.of(_REGISTERS), c.of(_VALUES) & (1 << 8 * size) - 1, size)
        else:
            self._set_up_again(c)

    def _turn_over(self) -> None:
        """Let the device do what there is to do; it may have no end, as a driver can feed it for ever."""
        for _ in range(64):
            if not self.worker.turn():
                return

    def close(self) -> None:
        self.transport.quiesce()
        for kick in self._kicks:
            os.close(kick)
        self.device.close()
        self.ram.close()


class Once(Owned):
    """Makes a target again after so many cases, so that what only an end reaches is reached too."""

    def __init__(self, make: Callable[[], Target], cases: int) -> None:
        self._make = make
        self._cases = cases
        self._left = 0
        self._target: Target | None = None

    def __call__(self, data: bytes) -> bool:
        if self._target is None or not self._left or self._target.spent:
            self.close()
            self._target, self._left = self._make(), self._cases
        self._left -= 1
        return self._target.case(Choices(data))

    def close(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None
