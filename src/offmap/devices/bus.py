"""The guest's I/O ports and device memory: which device answers at which address.

A port access costs one dictionary look-up, because an exit's price is what a guest pays for every character on its
console. What nobody claims reads as all-ones and swallows writes, as an ISA bus with no card in the slot does.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from offmap.errors import OffmapError
from offmap.typed import Protocol


class BusConflict(OffmapError):
    """Two devices claim the same port or address."""


class IrqLine(Protocol):
    """One input of the interrupt controller. The caller reports each change of level once."""

    def set(self, level: bool) -> None:
        """Raise (True) or lower (False) the line."""


class PioDevice(Protocol):
    """A device on I/O ports. Registers are one byte wide unless it says otherwise with ``byte_wide``.

    A byte-wide device only ever sees ``size == 1``: the bus splits wider accesses into bytes at consecutive ports, as
    the ISA bus does.
    """

    byte_wide: bool

    def ports(self) -> Sequence[range]:
        """Return its ports, which never change."""

    def read(self, port: int, size: int) -> int:
        """Answer an ``in`` of ``size`` (1, 2 or 4) bytes; called on a vCPU thread."""

    def write(self, port: int, size: int, value: int) -> None:
        """Take an ``out`` of ``size`` (1, 2 or 4) bytes; called on a vCPU thread."""


class MmioDevice(Protocol):
    """A device in a range of guest-physical addresses."""

    def read(self, offset: int, size: int) -> int:
        """Answer a load of ``size`` (1, 2, 4 or 8) bytes at ``offset`` from the range's start."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a store of ``size`` (1, 2, 4 or 8) bytes at ``offset`` from the range's start."""


class PioBus:
    """Ports 0 to 0xffff. Attach every device before the first vCPU runs; look-ups take no lock."""

    __slots__ = ("_devices", "_readers", "_wide", "_writers")

    def __init__(self) -> None:
        self._readers: dict[int, Callable[[int, int], int]] = {}
        self._writers: dict[int, Callable[[int, int, int], None]] = {}
        self._wide: set[int] = set()
        self._devices: dict[int, PioDevice] = {}

    def attach(self, device: PioDevice) -> None:
        """Let ``device`` answer at its ports.

        Raises:
            BusConflict: one of them is taken, or is no port; then none is attached.
        """
        claimed = [port for ports in device.ports() for port in ports]
        for port in claimed:
            if not 0 <= port <= 0xFFFF:
                raise BusConflict(f"{type(device).__name__} claims port {port:#x}, which is none")
            if port in self._devices:
                raise BusConflict(
                    f"{type(device).__name__} claims port {port:#x}, where {type(self._devices[port]).__name__} answers"
                )
        for port in claimed:
            self._devices[port] = device
            self._readers[port] = device.read
            self._writers[port] = device.write
            if not device.byte_wide:
                self._wide.add(port)

    def claimed(self) -> Iterator[tuple[int, Callable[[int, int], int], Callable[[int, int, int], None]]]:
        """Yield each claimed port with its device's `read` and `write`, for a caller that looks ports up itself.

        Call them with a size of 1 only. Wider accesses go through `read` and `write` of the bus.
        """
        for port, reader in self._readers.items():
            yield port, reader, self._writers[port]

    def read(self, port: int, size: int) -> int:
        """Return what the guest's ``in`` of ``size`` bytes at ``port`` reads."""
        reader = self._readers.get(port)
        if reader is None:
            return (1 << 8 * size) - 1
        if size == 1 or port in self._wide:
            return reader(port, size)
        return sum(self.read(port + i & 0xFFFF, 1) << 8 * i for i in range(size))

    def write(self, port: int, size: int, value: int) -> None:
        """Do the guest's ``out`` of ``size`` bytes at ``port``."""
        writer = self._writers.get(port)
        # A wide access at a port without a device goes to no device, not even to one at the next port. PCI's
        # configuration address (0xcf8, 4 bytes) would otherwise hit the reset register at 0xcf9.
        if writer is None:
            return
        if size == 1 or port in self._wide:
            writer(port, size, value)
            return
        for i in range(size):
            self.write(port + i & 0xFFFF, 1, value >> 8 * i & 0xFF)


class MmioBus:
    """Device memory by guest-physical address. Attach every device before the first vCPU runs."""

    __slots__ = ("_devices", "_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._devices: list[MmioDevice] = []

    def attach(self, base: int, length: int, device: MmioDevice) -> None:
        """Let ``device`` answer at ``base`` to ``base + length - 1``.

        Raises:
            BusConflict: part of the range is taken, or it is empty.
        """
        if length <= 0 or base < 0:
            raise BusConflict(f"{type(device).__name__} claims {length} bytes at {base:#x}, which is no range")
        at = bisect_right(self._starts, base)
        if (at and self._ends[at - 1] > base) or (at < len(self._starts) and self._starts[at] < base + length):
            raise BusConflict(
                f"{type(device).__name__} claims {base:#x}-{base + length - 1:#x}, part of which is taken"
            )
        self._starts.insert(at, base)
        self._ends.insert(at, base + length)
        self._devices.insert(at, device)

    def read(self, address: int, size: int) -> int:
        """Return what the guest's load of ``size`` bytes at ``address`` reads; all-ones unless one device has them."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address + size > self._ends[at]:
            return (1 << 8 * size) - 1
        return self._devices[at].read(address - self._starts[at], size)

    def write(self, address: int, size: int, value: int) -> None:
        """Do the guest's store of ``size`` bytes at ``address``. It is lost unless one device has them all."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address + size <= self._ends[at]:
            self._devices[at].write(address - self._starts[at], size, value)
