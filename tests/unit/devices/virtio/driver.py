"""The other side of a virtqueue: a driver that can be as wrong as a test wants it."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offmap.devices.virtio.dma import Dma
from offmap.devices.virtio.queue import Queue
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.uapi.virtio.ring import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE

__all__ = ["NEXT", "WRITE", "Buffer", "Driver", "guest_memory"]

NEXT, WRITE, INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
DESC, AVAIL, USED, TABLES, BUFFERS = 0x1000, 0x9000, 0xA000, 0x20000, 0x40000


def guest_memory(size: int = 1 << 20, pieces: int = 1) -> GuestMemory:
    """Anonymous memory as a guest's RAM, in one or several regions."""
    return GuestMemory(Backing("test", -1, size // pieces) for _ in range(pieces))


@dataclass(frozen=True)
class Buffer:
    """One descriptor's worth: bytes that the device reads, or room (a number of bytes) that it writes."""

    content: bytes | int

    @property
    def size(self) -> int:
        return self.content if isinstance(self.content, int) else len(self.content)


class Driver:
    """Sets up one queue in `memory` and works it as Linux does: buffers of a chain lie one behind another."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 8,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        excluded: Sequence[PhysicalRange] = (),
        base: int = 0,
    ) -> None:
        self.memory = memory
        self.size = size
        self.desc, self.avail, self.used = base + DESC, base + AVAIL, base + USED
        self._tables, self._buffers = base + TABLES, base + BUFFERS
        self.dma = Dma(memory.regions, excluded)
        self.interrupts = 0
        self.event_idx = event_idx
        self.indirect = indirect
        self.avail_idx = self.seen = 0
        self._next_descriptor = 0
        self.rooms: dict[int, list[tuple[int, int]]] = {}
        self._next_buffer = self._buffers
        memory.write(self.avail, bytes(TABLES - AVAIL))  # whatever another driver has left there

    def queue(self, again: Callable[[], None] | None = None) -> Queue:
        """The device's side."""
        return Queue(
            self.dma,
            self.size,
            self.desc,
            self.avail,
            self.used,
            interrupt=self._interrupt,
            event_idx=self.event_idx,
            indirect=self.indirect,
            again=again,
        )

    def _interrupt(self) -> None:
        self.interrupts += 1

    def descriptor(self, index: int, address: int, length: int, flags: int = 0, next_: int = 0, table: int = 0) -> None:
        """Write one, to the queue's table or to another."""
        self.memory.write((table or self.desc) + 16 * index, struct.pack("<QIHH", address, length, flags, next_))

    def make_available(self, head: int, *, ahead: int = 1) -> None:
        """Put `head` into the available ring and move its index by `ahead`."""
        self.memory.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx = self.avail_idx + ahead & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_idx))

    def add(self, *buffers: Buffer | bytes | int) -> int:
        """Make a chain of `buffers` available; returns its head."""
        wrapped = [b if isinstance(b, Buffer) else Buffer(b) for b in buffers]
        needed = 1 if self.indirect else len(wrapped)
        if self._next_descriptor + needed > self.size:
            self._next_descriptor, self._next_buffer = 0, self._buffers
        head = self._next_descriptor
        self._next_descriptor += needed
        table = self._tables + head * 16 * 64 if self.indirect else 0
        start = 0 if self.indirect else head
        rooms = []
        for number, buffer in enumerate(wrapped):
            address = self._next_buffer
            self._next_buffer += buffer.size + 64
            flags = NEXT if number + 1 < len(wrapped) else 0
            if isinstance(buffer.content, int):
                flags |= WRITE
                rooms.append((address, buffer.size))
                self.memory.write(address, b"\xcc" * buffer.size)
            else:
                self.memory.write(address, buffer.content)
            self.descriptor(start + number, address, buffer.size, flags, start + number + 1, table)
        if self.indirect:
            self.descriptor(head, table, 16 * len(wrapped), INDIRECT)
        self.rooms[head] = rooms
        self.make_available(head)
        return head

    def used_idx(self) -> int:
        """What the device has published."""
        (idx,) = struct.unpack("<H", self.memory.read(self.used + 2, 2))
        return int(idx)

    def take(self) -> tuple[int, int] | None:
        """The next used element (head, written), or None."""
        if self.used_idx() == self.seen:
            return None
        head, written = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8))
        self.seen = self.seen + 1 & 0xFFFF
        return head, written

    def result(self) -> bytes:
        """The device-writable part of the next used chain, as far as the device says that it has written."""
        taken = self.take()
        assert taken is not None, "nothing was used"
        head, written = taken
        whole = b"".join(self.memory.read(address, size) for address, size in self.rooms[head])
        return whole[:written]

    def whole_result(self) -> bytes:
        """The same, all of it, for devices that write from the end."""
        taken = self.take()
        assert taken is not None, "nothing was used"
        return b"".join(self.memory.read(address, size) for address, size in self.rooms[taken[0]])

    def set_used_event(self, value: int) -> None:
        """Where the driver wants the next interrupt."""
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", value))

    def avail_event(self) -> int:
        """Where the device wants the next kick."""
        (event,) = struct.unpack("<H", self.memory.read(self.used + 4 + 8 * self.size, 2))
        return int(event)
