"""A driver's half of virtqueues in a guest's memory, mostly right and now and then wrong in one thing."""

from collections.abc import Sequence
from struct import Struct

from offmap.devices.virtio.dma import Dma
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.memory.memfd import map_memfd
from offmap.uapi.virtio.ring import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE

from .choices import Choices

NEXT, WRITE, INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
HALF = 512 << 10  # bytes of each of the two regions: rings are in the first one, buffers in the second one
SPAN = 32 << 10  # bytes of the first region for one queue
KEPT = PhysicalRange(2 * HALF - 0x2000, 2 * HALF - 0x1000)  # a page that is kept from the guest
_AVAIL, _USED, _TABLES = 0x2000, 0x3000, 0x5000  # in a span
_TABLE = 16 * 64  # bytes for an indirect table
_DESCRIPTOR = Struct("<QIHH")
_LE16 = Struct("<H")
_ODD = (0, 1, 3, 12, KEPT.start, KEPT.end - 1, HALF - 2, 2 * HALF - 1, 2 * HALF, 1 << 32, (1 << 64) - 1, (1 << 64) - 16)
_LENGTHS = (0, 1, 7, 0x1000, 0x10000, HALF, 0x7FFFFFFF, 0xFFFFFFFF)
_FLAGS = (0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 0xFFFF, 0x8000)
_AHEAD = (0, 2, 3, 0x100, 0x8000, 0xFFFF)


class GuestRam:
    """The RAM of a guest, in two regions with a page of the second one kept from it."""

    def __init__(self) -> None:
        self.memory = GuestMemory([map_memfd("fuzzed RAM", HALF, 0) for _ in range(2)])
        self.rings, self.buffers = (backing.view for backing in self.memory.backings)
        self.dma = Dma(self.memory.regions, [KEPT])
        start = KEPT.start - HALF
        self._kept = self.buffers[start : start + KEPT.size]
        self._kept[:] = b"\xa5" * KEPT.size

    def check(self) -> None:
        """Raise AssertionError if the page that is kept from the guest was written to."""
        assert self._kept == b"\xa5" * KEPT.size, "a device wrote to a page that is kept from the guest"

    def close(self) -> None:
        self._kept.release()
        self.dma.release()
        self.memory.close()


class Ring:
    """One queue as its driver sees it. Descriptors are used round and round, whether or not they are free again."""

    def __init__(self, ram: GuestRam, number: int, size: int) -> None:
        self._ram = ram
        self._base = base = number * SPAN
        self.size = size
        self.desc, self.avail, self.used = base, base + _AVAIL, base + _USED
        self._free = self._table = 0
        self._idx = 0
        view = ram.rings
        view[base + _AVAIL : base + _AVAIL + 6 + 2 * size] = bytes(6 + 2 * size)
        view[base + _USED : base + _USED + 6 + 8 * size] = bytes(6 + 8 * size)

    def used_idx(self) -> int:
        """How many buffers the device has given back."""
        return int.from_bytes(self._ram.rings[self.used + 2 : self.used + 4], "little")

    def set_flags(self, flags: int, used_event: int) -> None:
        """When the driver wants interrupts."""
        _LE16.pack_into(self._ram.rings, self.avail, flags)
        _LE16.pack_into(self._ram.rings, self.avail + 4 + 2 * self.size, used_event)

    def add(self, choices: Choices, reads: Sequence[bytes], writes: Sequence[int], *, indirect: bool) -> None:
        """Make a buffer available: what the device reads, and how many bytes it may write, in so many pieces."""
        c = choices
        size, rings, buffers = self.size, self._ram.rings, self._ram.buffers
        at = 64 * c.byte()
        pieces: list[list[int]] = []
        for data in reads:
            end = at + len(data)
            if end > HALF:
                break
            buffers[at:end] = data
            pieces.append([HALF + at, len(data), 0])
            at = end
        for room in writes:
            pieces.append([HALF + at, room, WRITE])
            at += room
        if len(pieces) > size:
            del pieces[size:]
        wrong = c.below(9) + 1 if c.rarely(10) else 0
        chosen = c.byte() % len(pieces) if wrong and pieces else 0
        if wrong and pieces:
            piece = pieces[chosen]
            if wrong == 1:
                piece[0] = c.of(_ODD)
            elif wrong == 2:
                piece[1] = c.of(_LENGTHS)
            elif wrong == 3:
                piece[0] = c.word(3)  # anywhere, the rings too
            elif wrong == 4:
                pieces.reverse()
        whole = len(pieces)
        if indirect and whole <= 64 and not c.rarely(4):
            table, first = self._base + _TABLES + self._table * _TABLE, 0
            self._table = (self._table + 1) % 8
            head, start = self._free, table
            length = 16 * whole + (c.of((1, 16, -16)) if wrong == 5 else 0)
            _DESCRIPTOR.pack_into(rings, self.desc + 16 * head, table, length & 0xFFFFFFFF, INDIRECT, 0)
            self._free = (head + 1) % size
        else:
            if self._free + whole > size:
                self._free = 0
            head = first = self._free
            start = self.desc + 16 * head
            self._free = (head + max(whole, 1)) % size
        for number, (address, length, written) in enumerate(pieces):
            flags = written if number + 1 == whole else written | NEXT
            following = first + number + 1
            if number == chosen:
                if wrong == 6:
                    flags = c.of(_FLAGS)
                elif wrong == 7:
                    following = c.byte()
                    flags |= NEXT
            _DESCRIPTOR.pack_into(rings, start + 16 * number, address, length, flags, following & 0xFFFF)
        _LE16.pack_into(rings, self.avail + 4 + 2 * (self._idx & size - 1), c.word(2) if wrong == 8 else head)
        self._idx = self._idx + (c.of(_AHEAD) if wrong == 9 else 1) & 0xFFFF
        _LE16.pack_into(rings, self.avail + 2, self._idx)
