"""What a virtio device is to the transport, and what the machine makes it from.

A device is written for one thread: every method but the constructor is called on the device's own worker thread, one
at a time. It never sees the transport's registers, only queues.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from offmap.devices.virtio.dma import Dma
from offmap.devices.virtio.limit import Limit
from offmap.devices.virtio.queue import Queue
from offmap.devices.virtio.worker import Worker
from offmap.kvm import Vm
from offmap.memory.backend import Backend
from offmap.memory.guest import GuestMemory
from offmap.owned import Owned
from offmap.typed import ClassVar, NamedTuple, Protocol


class Bypass(NamedTuple):
    """What the host kernel needs to serve queues without us (vhost.py).

    Attributes:
        kicks: by queue, the eventfd that the driver's notifications arrive at.
        irq: an eventfd that interrupts the guest.
        take: call it with the queues that the host kernel serves from now on, until the device is reset. The transport
            then ignores their kicks, and InterruptStatus always says that there may be used buffers.
    """

    kicks: Sequence[int]
    irq: int
    take: Callable[[Collection[int]], None]


class Activation(NamedTuple):
    """What a device gets when the driver is ready (DRIVER_OK).

    Attributes:
        queues: by number; None for a queue that the driver left out.
        features: bit mask of the negotiated features.
        dma: the memory that the driver may name.
        worker: watches host fds. `reset` must unwatch each of them.
        config_changed: call it when `config()` has changed. It tells the driver.
        bypass: lets the host kernel serve queues; None where it cannot.
    """

    queues: Sequence[Queue | None]
    features: int
    dma: Dma
    worker: Worker
    config_changed: Callable[[], None]
    bypass: Bypass | None = None

    def has(self, feature: int) -> bool:
        """Whether bit number `feature` was negotiated."""
        return bool(self.features >> feature & 1)


class Child(Protocol):
    """A process of a device."""

    def hand_over(self) -> int:
        """Return a pidfd of it. Whoever has that sees to its end."""


class VirtioDevice(Owned, ABC):
    """A device, without its transport.

    Attributes:
        device_id: VIRTIO_ID_*.
        queue_sizes: the largest size of each queue, powers of two.
        features: bit mask of the device's own features; the transport adds those of queues and of virtio 1.
        kinds: what it does on the host, as rows of the table of system calls (offmap.sandbox.policy).
        child: a process of its own, or None.
        files: descriptors of files that it writes to, and never makes longer.
        limit: what the guest may have of each queue in a second; None: as much as there is.
    """

    device_id: ClassVar[int]
    queue_sizes: Sequence[int] = (256,)
    features: int = 0
    kinds: Sequence[str] = ()
    child: Child | None = None
    files: Sequence[int] = ()
    limit: Limit | None = None

    def config(self) -> bytes:
        """The device's configuration space as it is now."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver has written `data` at `offset`. A device with nothing writable ignores it."""

    @abstractmethod
    def activate(self, activation: Activation) -> None:
        """The driver is ready. Kicks may come from now on. `handle` is called once for each queue after this, because
        buffers may be there already.

        Raises:
            DriverError: the driver left out a queue that the device needs.
        """

    @abstractmethod
    def handle(self, queue: int) -> None:
        """The driver has made buffers available in queue number `queue`.

        Raises:
            DriverError: the driver broke the rules. The transport then sets DEVICE_NEEDS_RESET, and the device is idle
                until the driver resets it.
        """

    def failed(self) -> None:
        """The driver broke the rules. Nothing comes from it until it resets the device."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the queues and the driver. Let go of all guest memory."""

    def pause(self) -> None:
        """The worker thread is about to stand still: stop whoever else touches guest memory for the device."""

    def resume(self) -> None:
        """The worker thread goes on."""

    def close(self) -> None:
        """Free what the device owns on the host. The worker thread has ended."""


class Surroundings(NamedTuple):
    """What a device may need of its machine.

    Attributes:
        memory: the guest's RAM.
        backend: where that RAM comes from.
        vm: for devices that have memory slots of their own.
        say: takes a line for the user. A device reports a failure once, not with each request.
    """

    memory: GuestMemory
    backend: type[Backend]
    vm: Vm
    say: Callable[[str], None] = lambda _: None

    @property
    def hidden(self) -> bool:
        """Whether the RAM promises to be hidden. GUP then refuses it, and so does direct I/O."""
        return self.backend.hides


class DeviceSpec(Protocol):
    """What the user asked for: a frozen dataclass, checked as far as can be without the machine."""

    def build(self, surroundings: Surroundings) -> VirtioDevice:
        """Make the device; opens its host files.

        Raises:
            OffmapError: this host cannot give the device; with the reason and the remedy.
        """
