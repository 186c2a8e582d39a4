"""The virtio-mmio transport, version 2: virtio 1.2, section 4.2.2.

Reading a register has no side effects in this transport. So the registers are a page that the guest reads as memory,
without an exit: a KVM memory slot with KVM_MEM_READONLY (bus.py). A write exits, and `write` takes it. KVM itself takes
the two registers that are written often: QueueNotify (ioeventfd) and InterruptACK (interrupts.py). So an interrupt and
its request cost no exit to user space.

The page must be up to date at all times: `_show` is called wherever a register changes. A driver may read the
configuration while it changes, and see half of it. So the generation changes before and after, and the interrupt comes
last: the driver then reads it again.
"""

import os
import select
import threading
from collections.abc import Callable, Collection
from functools import partial

from offmap.devices.virtio.device import Activation, Bypass, VirtioDevice
from offmap.devices.virtio.dma import Dma, DriverError
from offmap.devices.virtio.interrupts import InterruptStatus
from offmap.devices.virtio.limit import Limiter
from offmap.devices.virtio.queue import Queue
from offmap.devices.virtio.queue_setup import LOW, QUEUE_REGISTERS, QueueSetup
from offmap.devices.virtio.worker import Worker
from offmap.uapi.virtio import config
from offmap.uapi.virtio import mmio as reg
from offmap.uapi.virtio.ring import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from offmap.units import printable

MAGIC_VALUE = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR_ID = int.from_bytes(b"OFFM", "little")

TRANSPORT_FEATURES = 1 << config.VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX

_MOST_COMPLAINTS = 3  # per device: a driver that breaks it again and again must not fill the log

_DRIVER_BITS = (
    config.VIRTIO_CONFIG_S_ACKNOWLEDGE | config.VIRTIO_CONFIG_S_DRIVER | config.VIRTIO_CONFIG_S_FAILED
)  # the device does nothing for them


class MmioTransport:
    """The registers of one device. An MmioDevice: `write` is called on vCPU threads.

    Args:
        name: of the device, for people.
        page: 4 KiB that the guest reads. What the guest may write there itself counts for nothing.
        make_status: makes InterruptStatus; its argument shows a value to the guest.
        say: takes a line for the user.
        start: whether to start the device's thread now; otherwise `worker.start` does.
    """

    def __init__(
        self,
        name: str,
        device: VirtioDevice,
        page: memoryview,
        dma: Dma,
        make_status: Callable[[Callable[[int], None]], InterruptStatus],
        say: Callable[[str], None] = lambda _: None,
        *,
        start: bool = True,
    ) -> None:
        self.name = name
        # First, as it may fail: nothing holds the page yet.
        self.worker = Worker(f"virtio {name}", self._failed, start=start)
        self._limiters: dict[int, Limiter] = {}  # by queue; a reset keeps them, or it would refill them
        self._device = device
        self._page = page
        self._registers = page.cast("I")
        self._dma = dma
        self._say = say
        self._complaints = 0
        self._features = device.features | TRANSPORT_FEATURES
        self._lock = threading.Lock()  # between vCPU threads: what the driver sets up
        self._status_lock = threading.Lock()  # between vCPU threads and the worker: the status register
        self._config = b""
        self._generation = 0
        self._queues: list[Queue | None] = []  # while the driver is ready; the worker thread's
        self._was_ready = False
        self._kicks: list[int] = []  # eventfds, by queue
        self._bypassed: Collection[int] = ()  # queues that the host kernel serves
        self.interrupt_status = make_status(lambda value: self._show(reg.VIRTIO_MMIO_INTERRUPT_STATUS, value))
        for register, value in (
            (reg.VIRTIO_MMIO_MAGIC_VALUE, MAGIC_VALUE),
            (reg.VIRTIO_MMIO_VERSION, VERSION),
            (reg.VIRTIO_MMIO_DEVICE_ID, device.device_id),
            (reg.VIRTIO_MMIO_VENDOR_ID, VENDOR_ID),
        ):
            self._show(register, value)
        self._forget_driver()
        for register in range(reg.VIRTIO_MMIO_SHM_LEN_LOW, reg.VIRTIO_MMIO_SHM_BASE_HIGH + 4, 4):
            self._show(register, LOW)  # there is no shared memory region, whichever is selected (4.2.2.1)
        self.worker.call(self._refresh_config)

    # --- registers, on vCPU threads ---

    def _show(self, register: int, value: int) -> None:
        self._registers[register >> 2] = value

    def _forget_driver(self) -> None:
        """Set the registers to their state after a reset (4.2.2.1, 2.1.2)."""
        self._status = 0
        self._driver_features = 0
        self._driver_features_sel = 0
        self._setups = [QueueSetup(size) for size in self._device.queue_sizes]
        self._queue_sel = 0
        self._show(reg.VIRTIO_MMIO_STATUS, 0)
        self._show(reg.VIRTIO_MMIO_DEVICE_FEATURES, self._features & LOW)
        self._select_queue(0)

    def read(self, offset: int, size: int) -> int:
        """Return what a load reads, if the guest cannot read the page itself."""
        return int.from_bytes(self._page[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a store. One that hits no register, or is not 4 bytes wide, is lost."""
        if offset >= reg.VIRTIO_MMIO_CONFIG:
            self._write_config(offset - reg.VIRTIO_MMIO_CONFIG, value.to_bytes(size, "little"))
            return
        if size != 4:
            return
        if offset == reg.VIRTIO_MMIO_INTERRUPT_ACK:
            self.interrupt_status.acknowledge(value)
            return
        with self._lock:
            self._write_register(offset, value)

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case reg.VIRTIO_MMIO_DEVICE_FEATURES_SEL:
                word = self._features >> 32 * value & LOW if value < 2 else 0
                self._show(reg.VIRTIO_MMIO_DEVICE_FEATURES, word)
            case reg.VIRTIO_MMIO_DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case reg.VIRTIO_MMIO_DRIVER_FEATURES:
                if not self._status & config.VIRTIO_CONFIG_S_FEATURES_OK:
                    self._set_driver_features(value)
            case reg.VIRTIO_MMIO_QUEUE_SEL:
                self._select_queue(value)
            case reg.VIRTIO_MMIO_STATUS:
                self._set_status(value)
            case _ if offset in QUEUE_REGISTERS:
                self._set_up_queue(offset, value)
            case _:
                pass

    def _set_driver_features(self, value: int) -> None:
        shift = 32 * self._driver_features_sel
        if shift < 64:
            self._driver_features = self._driver_features & ~(LOW << shift) | value << shift
        elif value:
            self._driver_features |= 1 << 64  # a feature that was not offered, so FEATURES_OK is refused

    def _select_queue(self, number: int) -> None:
        self._queue_sel = number
        setup = self._setups[number] if number < len(self._setups) else None
        self._show(reg.VIRTIO_MMIO_QUEUE_NUM_MAX, setup.size_max if setup else 0)
        self._show(reg.VIRTIO_MMIO_QUEUE_READY, int(setup.ready) if setup else 0)

    def _set_up_queue(self, register: int, value: int) -> None:
        if self._queue_sel >= len(self._setups):
            return
        number, setup = self._queue_sel, self._setups[self._queue_sel]
        if register != reg.VIRTIO_MMIO_QUEUE_READY:
            setup.write(register, value)
            return
        if setup.ready and not value and self._status & config.VIRTIO_CONFIG_S_DRIVER_OK:
            self._on_worker(lambda: self._stop_queue(number))
        # A queue made ready after DRIVER_OK stays unused until the next reset: no driver may do that (3.1.1).
        setup.ready = bool(value & 1)
        self._show(reg.VIRTIO_MMIO_QUEUE_READY, int(setup.ready))

    # --- the status register ---

    def _add_status(self, bits: int) -> None:
        with self._status_lock:
            self._status |= bits
            self._show(reg.VIRTIO_MMIO_STATUS, self._status)

    def _set_status(self, value: int) -> None:
        """Add status bits in order (3.1.1). Only a reset, a write of 0, takes bits away."""
        if value == 0:
            self._on_worker(self._reset)
            return
        new = value & ~self._status
        self._add_status(new & _DRIVER_BITS)
        if new & config.VIRTIO_CONFIG_S_FEATURES_OK and self._status & config.VIRTIO_CONFIG_S_DRIVER:
            # The driver reads the bit back; it is set only if its choice of features works.
            wanted = self._driver_features
            if wanted >> config.VIRTIO_F_VERSION_1 & 1 and not wanted & ~self._features:
                self._add_status(config.VIRTIO_CONFIG_S_FEATURES_OK)
        if new & config.VIRTIO_CONFIG_S_DRIVER_OK and self._status & config.VIRTIO_CONFIG_S_FEATURES_OK:
            self._add_status(config.VIRTIO_CONFIG_S_DRIVER_OK)
            self._on_worker(self._activate)

    # --- on the worker thread ---

    def _on_worker(self, function: Callable[[], None]) -> None:
        """Run `function` on the worker and wait for it. An exception fails the device, not the vCPU."""

        def run() -> None:
            try:
                function()
            except Exception as error:
                self._failed(error)

        self.worker.call(run)

    def _activate(self) -> None:
        self._was_ready = True
        self._queues = [self._queue(n, setup) if setup.ready else None for n, setup in enumerate(self._setups)]
        self._device.activate(
            Activation(
                self._queues,
                self._driver_features,
                self._dma,
                self.worker,
                self._config_changed,
                Bypass(self._kicks, self.interrupt_status.irq, self._bypass),
            )
        )
        for number, queue in enumerate(self._queues):
            if queue is not None:
                self._device.handle(number)

    def _again(self, number: int) -> None:
        os.eventfd_write(self._kicks[number], 1)

    def _limiter(self, number: int) -> Limiter | None:
        limit = self._device.limit
        if limit is None or number >= len(self._kicks):
            return None
        if number not in self._limiters:
            self._limiters[number] = Limiter(limit, self.worker.later, partial(self._again, number))
        return self._limiters[number]

    def _queue(self, number: int, setup: QueueSetup) -> Queue:
        if setup.size > setup.size_max:
            raise DriverError(f"sets up a queue of size {setup.size}, where {setup.size_max} is the most")
        return Queue(
            self._dma,
            setup.size,
            setup.desc,
            setup.avail,
            setup.used,
            interrupt=partial(self.interrupt_status.raise_, reg.VIRTIO_MMIO_INT_VRING),
            event_idx=bool(self._driver_features >> VIRTIO_RING_F_EVENT_IDX & 1),
            indirect=bool(self._driver_features >> VIRTIO_RING_F_INDIRECT_DESC & 1),
            again=partial(self._again, number) if number < len(self._kicks) else None,
            limiter=self._limiter(number),
        )

    def watch_kicks(self, number: int, fd: int) -> None:
        """Each write to the eventfd `fd` is a write of `number` to QueueNotify."""
        self._kicks.append(fd)
        # Edge-triggered: the eventfd need not be read, which saves a system call for each kick.
        self.worker.call(lambda: self._watch_kicks(number))

    def _watch_kicks(self, number: int) -> None:
        self.worker.watch(self._kicks[number], partial(self._kicked, number), select.EPOLLIN | select.EPOLLET)

    def _bypass(self, queues: Collection[int]) -> None:
        """Leave these queues to the host kernel until the next reset."""
        self._bypassed = queues
        for number in queues:
            self.worker.unwatch(self._kicks[number])
        self.interrupt_status.hold(reg.VIRTIO_MMIO_INT_VRING)

    def _kicked(self, number: int, _events: int) -> None:
        if number < len(self._queues) and (queue := self._queues[number]) is not None:
            # A request that goes on later must not do so for a queue that the driver has taken away: no other part of
            # it would let go of the thread in between.
            if not queue.stopped:
                self._device.handle(number)
        elif number < len(self._setups) and self._setups[number].ready:
            pass  # Linux's balloon driver kicks too early; DRIVER_OK looks at every queue
        elif not self._was_ready:
            self._was_ready = True  # said once: a driver that resets its device may kick late
            self._complain("kicks a queue before it has set the device up")

    def _stop_queue(self, number: int) -> None:
        if number < len(self._queues) and (queue := self._queues[number]) is not None:
            queue.stop()
            if number in self._bypassed:
                self._device.reset()  # this stops the host kernel's side of the queue

    def _reset(self) -> None:
        for queue in self._queues:
            if queue is not None:
                queue.stop()
        self._queues = []
        self._device.reset()
        if self._bypassed:
            self.interrupt_status.hold(0)
            for number in self._bypassed:
                self._watch_kicks(number)
            self._bypassed = ()
        self.interrupt_status.reset()
        with self._status_lock:
            self._forget_driver()

    def _failed(self, error: Exception) -> None:
        """Stop the device until the driver resets it: the driver broke a rule, or we have a bug."""
        if isinstance(error, DriverError):
            self._complain(f"the guest's driver {error}")
        else:
            self._complain(printable(f"failed unexpectedly, {_where(error)}"))
        for queue in self._queues:
            if queue is not None:
                queue.stop()
        self._device.failed()
        if self._bypassed:
            self._device.reset()  # or the host kernel would go on serving them
        self._add_status(config.VIRTIO_CONFIG_S_NEEDS_RESET)
        if self._status & config.VIRTIO_CONFIG_S_DRIVER_OK:
            self.interrupt_status.raise_(reg.VIRTIO_MMIO_INT_CONFIG)  # 2.1.2

    def _complain(self, what: str) -> None:
        self._complaints += 1
        if self._complaints <= _MOST_COMPLAINTS:
            more = "" if self._complaints < _MOST_COMPLAINTS else " (no more of this device will be reported)"
            self._say(f"{self.name}: {what}; the device stops until the driver resets it{more}")

    # --- the configuration space ---

    def _refresh_config(self) -> bool:
        """Put the device's configuration into the page; return whether it has changed."""
        new = self._device.config()
        if new == self._config:
            return False
        self._bump_generation()
        self._page[reg.VIRTIO_MMIO_CONFIG : reg.VIRTIO_MMIO_CONFIG + len(new)] = new
        self._config = new
        self._bump_generation()
        return True

    def _bump_generation(self) -> None:
        self._generation = self._generation + 1 & LOW
        self._show(reg.VIRTIO_MMIO_CONFIG_GENERATION, self._generation)

    def _config_changed(self) -> None:
        """The device's configuration has changed. Called on the worker thread."""
        if self._refresh_config() and self._status & config.VIRTIO_CONFIG_S_DRIVER_OK:
            self.interrupt_status.raise_(reg.VIRTIO_MMIO_INT_CONFIG)

    def _write_config(self, offset: int, data: bytes) -> None:
        def write() -> None:
            if offset + len(data) <= len(self._config):
                self._device.write_config(offset, data)
                self._refresh_config()

        self._on_worker(write)

    def pause(self) -> None:
        """Leave guest memory alone from the return of this call until `resume`. No vCPU may be running."""
        self._on_worker(self._device.pause)
        self.worker.pause()

    def resume(self) -> None:
        """End the pause."""
        self.worker.resume()
        self._on_worker(self._device.resume)

    def quiesce(self) -> None:
        """End the worker thread and let go of guest memory."""
        self._on_worker(self._reset)
        self.worker.close()
        self._registers.release()


def _where(error: Exception) -> str:
    """One line about a bug: the exception, and its innermost frame."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" ({frame.tb_frame.f_code.co_name}, line {frame.tb_lineno})" if frame else ""
    return f"{type(error).__name__}: {error}{place}"
