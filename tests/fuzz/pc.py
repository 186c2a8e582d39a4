"""What is at the PC's ports, and the registers of a virtio device with every kind of driver."""

from collections.abc import Callable, Sequence

from offmap.devices.bus import MmioBus, PioBus
from offmap.devices.legacy import AbsentPit, SystemControlPortB
from offmap.devices.power import I8042, AcpiPm
from offmap.devices.rtc import Rtc
from offmap.devices.serial import Serial16550A
from offmap.devices.virtio.device import Activation, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.queue import Queue
from offmap.uapi.virtio import mmio as reg
from offmap.uapi.virtio.config import VIRTIO_ID_CONSOLE

from .choices import Choices
from .target import DeviceTarget, Target

_WIDTHS = (1, 1, 1, 2, 4)


class _Line:
    level = False

    def set(self, level: bool) -> None:
        assert level != self.level, "a change of level that is none"
        self.level = level


class PortsTarget(Target):
    """Serial port, clock, keyboard controller and power: any access at any port, and time that goes on or back."""

    sources = ("devices/serial.py", "devices/rtc.py", "devices/power.py", "devices/legacy.py", "devices/bus.py")

    def __init__(self) -> None:
        self._now = 1.8e9
        self._out = self._ends = 0

    def case(self, choices: Choices) -> bool:
        c = choices
        bus = PioBus()
        serial = Serial16550A(_Line(), self._take)
        rtc = Rtc(_Line(), clock=lambda: self._now)
        devices = (serial, rtc, I8042(self._end), AcpiPm(self._end, self._end), SystemControlPortB(), AbsentPit())
        ports = []
        for device in devices:
            bus.attach(device)
            ports.append([port for each in device.ports() for port in each])
        done = 0
        while c.left and done < 200:
            done += 1
            what, some = c.byte(), ports[c.byte() % len(ports)]
            port = some[c.byte() % len(some)]
            if what < 150:
                size = c.of(_WIDTHS)
                bus.write(port, size, c.word(size))
            elif what < 220:
                size = c.of(_WIDTHS)
                assert 0 <= bus.read(port, size) < 1 << 8 * size
            elif what < 230:
                bus.write(0x70, 1, c.byte() % 64)  # a register of the clock, and then its value
                bus.write(0x71, 1, c.byte())
            elif what < 240:
                serial.feed(c.bytes(c.byte() & 31))
            elif what < 250:
                self._now += c.byte() - 8
                rtc.tick()
                rtc.next_event()
            else:
                serial.flush()
        return done > 0

    def _take(self, data: bytes) -> None:
        self._out += len(data)

    def _end(self) -> None:
        self._ends += 1


class _Echo(VirtioDevice):
    """Two queues, and a configuration of 8 bytes."""

    device_id = VIRTIO_ID_CONSOLE
    queue_sizes = (64, 16)
    features = 5

    def __init__(self) -> None:
        self.content = bytearray(8)
        self._queues: Sequence[Queue | None] = ()
        self._changed: Callable[[], None] = lambda: None

    def config(self) -> bytes:
        return bytes(self.content)

    def write_config(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        assert len(self.content) == 8

    def activate(self, activation: Activation) -> None:
        self._queues = activation.queues
        self._changed = activation.config_changed

    def handle(self, queue: int) -> None:
        found = self._queues[queue] if self._queues else None
        if found is None:
            return
        for chain in found.chains():
            found.push(chain, 0)
            if chain.readable_bytes == 3:
                self.content[0] ^= 1
                self._changed()
            if chain.readable_bytes == 5:
                raise DriverError("sends five bytes")
        found.notify()

    def reset(self) -> None:
        self._queues = ()


class RegistersTarget(DeviceTarget):
    """Registers: a driver that sets its device up in any order, between one that does it right."""

    sources = ("devices/virtio/mmio.py", "devices/virtio/queue_setup.py", "devices/virtio/interrupts.py")

    def __init__(self) -> None:
        super().__init__()
        self._bus = MmioBus()
        self._bus.attach(0x1000, 0x1000, self.transport)

    def build(self) -> VirtioDevice:
        return _Echo()

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        return [bytes(choices.byte() & 7)], [choices.byte() & 7]

    def host(self, choices: Choices) -> None:
        """Another vCPU uses the registers."""
        c = choices
        for _ in range(c.byte() & 7):
            size = (4, 4, 4, 1, 2, 8)[c.byte() % 6]
            register = 0x1000 + (c.of(_REGISTERS) if c.byte() < 240 else c.word(2))
            if c.byte() & 1:
                value = c.of(_STATUS) if register == 0x1000 + reg.VIRTIO_MMIO_STATUS else c.word(min(size, 4))
                self._bus.write(register, size, value & (1 << 8 * size) - 1)
            else:
                assert 0 <= self._bus.read(register, size) < 1 << 8 * size


_REGISTERS = tuple(sorted(value for name, value in vars(reg).items() if name.startswith("VIRTIO_MMIO_")))
_STATUS = (0, 1, 3, 11, 15, 4, 8, 0x40, 0x80, 0xFF)
