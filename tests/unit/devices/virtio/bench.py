"""A device on a test's own thread: its queues with a driver each, and a worker that works when the test says so."""

import os
import select
from collections import deque
from collections.abc import Callable
from typing import Self, cast

from offmap.devices.virtio.device import Activation, Bypass, VirtioDevice
from offmap.devices.virtio.worker import Worker
from offmap.memory.guest import GuestMemory
from offmap.owned import Owned

from .driver import Driver, guest_memory

__all__ = ["Bench"]

_QUEUE_SPAN = 4 << 20  # bytes of guest memory for each queue and its buffers


class _Inline:
    """What a device sees of a Worker."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.posted: deque[Callable[[], None]] = deque()

    def watch(self, fd: int, handler: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        (self.epoll.modify if fd in self.handlers else self.epoll.register)(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def post(self, function: Callable[[], None]) -> None:
        self.posted.append(function)


class Bench(Owned):
    """`device`, activated, with `drivers` at its queues.

    Args:
        features: what the driver takes of the device's; None: all.
        size: of each queue.
        memory: the guest's, 4 MiB a queue; None: the bench makes its own.
        bypass: the device may leave queues to somebody else.

    Attributes:
        kicks, irq: eventfds, for whoever that is.
        bypassed: the queues that were left.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        features: int | None = None,
        size: int = 16,
        memory: GuestMemory | None = None,
        bypass: bool = False,
    ) -> None:
        self._may_bypass = bypass
        self.kicks = [os.eventfd(0) for _ in device.queue_sizes]
        self.irq = os.eventfd(0)
        self.bypassed: set[int] = set()
        self.device = device
        self.memory: GuestMemory = memory or guest_memory(_QUEUE_SPAN * len(device.queue_sizes))
        self.features = device.features if features is None else features
        self.size = size
        self._inline = _Inline()
        self.config_changes = 0
        self.activate()

    def activate(self) -> None:
        """Set up fresh queues, as after a reset."""
        spans = range(len(self.device.queue_sizes))
        self.drivers = [Driver(self.memory, self.size, base=n * _QUEUE_SPAN, event_idx=True) for n in spans]
        for n in spans:
            self.memory.write(n * _QUEUE_SPAN, bytes(_QUEUE_SPAN))
        queues = [driver.queue() for driver in self.drivers]
        worker = cast(Worker, self._inline)
        bypass = self.bypass() if self._may_bypass else None
        self.device.activate(
            Activation(queues, self.features, self.drivers[0].dma, worker, self._config_changed, bypass)
        )

    def bypass(self) -> Bypass:
        return Bypass(self.kicks, self.irq, self.bypassed.update)

    def _config_changed(self) -> None:
        self.config_changes += 1

    @property
    def watched(self) -> set[int]:
        """The fds that the device watches."""
        return set(self._inline.handlers)

    @property
    def posted(self) -> int:
        """How many calls the device has put off."""
        return len(self._inline.posted)

    def run(self, seconds: float = 0.0) -> bool:
        """Handle what is due, and what comes up within so many seconds; whether there was something."""
        busy = False
        for _ in range(len(self._inline.posted)):
            busy = True
            self._inline.posted.popleft()()
        for fd, events in self._inline.epoll.poll(0 if busy else seconds):
            if (handler := self._inline.handlers.get(fd)) is not None:
                busy = True
                handler(events)
        return busy

    def settle(self, rounds: int = 1000) -> None:
        """Run until there is nothing to do."""
        for _ in range(rounds):
            if not self.run():
                return
        raise AssertionError("the device does not come to rest")

    def wait(self, condition: Callable[[], bool], rounds: int = 100) -> None:
        """Run until `condition` holds."""
        for _ in range(rounds):
            if condition():
                return
            self.run(0.1)
        raise AssertionError("it did not happen")

    def close(self) -> None:
        self._inline.posted.clear()
        self.device.reset()
        assert not self._inline.handlers, "something is still watched after a reset"
        self.device.close()
        for driver in self.drivers:
            driver.dma.release()
        self.memory.close()
        self._inline.epoll.close()
        for fd in (*self.kicks, self.irq):
            os.close(fd)

    def __enter__(self) -> Self:
        return self
