"""The split virtqueue, the device's side of it (virtio 1.2, section 2.7).

The rings are in guest memory, and a hostile driver may write anything to them at any time. So each field is read once,
checked as a local copy, and what cannot be is a DriverError: the queue is then dead until the driver resets the device.
What moves the data is the kernel: a chain is lists of views straight into guest memory, for preadv and its like.

Memory ordering. CPython executes loads and stores in program order. x86 lets no store pass a store and no load pass a
load, but a later load may pass an earlier store. In two places it must not: `notify` publishes the used index, then
reads where the driver wants its interrupt; `rearm` publishes where we want a kick, then looks for more buffers. Both
take and release a lock in between. The interpreter does so by LOCK-prefixed instructions (sem_trywait, sem_post), which
are full fences on x86.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from operator import add
from struct import Struct
from time import monotonic

from offmap.devices.virtio.dma import Dma, DriverError, Piece
from offmap.devices.virtio.limit import Limiter
from offmap.typed import NamedTuple
from offmap.uapi.virtio.ring import (
    VRING_AVAIL_ALIGN_SIZE,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_ALIGN_SIZE,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_ALIGN_SIZE,
)

MAX_QUEUE_SIZE = 1 << 15  # virtio 1.2, 2.7: "The maximum Queue Size value is 32768"

_WORTHWHILE = 8  # descriptors in a table from which on looking at it as a whole is quicker

_AT_ONCE = 64  # descriptors of a table that one Struct unpacks; it takes 128 bytes for each. All sizes take 266 KiB
_MOST_BYTES = (1 << 32) - 1  # of a chain (2.7.5.2), so that what was written of it fits into its used element

_SHARE = 64 << 20  # bytes that `chains` goes through before others have their turn; a buffer counts as _AT_LEAST
_AT_LEAST = 256 << 10
_TURN = 0.05  # seconds, likewise: a request may wait for a disk (a flush)

_DESCRIPTOR = Struct("<QIHH")  # struct vring_desc: addr, len, flags, next


class Chain(NamedTuple):
    """A buffer that the driver has made available: views into guest memory, in order.

    Attributes:
        head: what `Queue.push` gives back to the driver.
        readable: what the driver has written for the device.
        writable: what the device may write.
        readable_bytes, writable_bytes: their sizes.
    """

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    readable_bytes: int
    writable_bytes: int


@cache
def _table(count: int) -> Struct:
    """The Struct that unpacks `count` descriptors of a table, at most _AT_ONCE."""
    return Struct("<" + count * "QIHH")


def _descriptors(ram: memoryview, at: int, count: int) -> tuple[int, ...]:
    """Address, length, flags and next of each of the `count` descriptors at `at` of `ram`, one after the other."""
    if count <= _AT_ONCE:
        return _table(count).unpack_from(ram, at)
    words: list[int] = []
    end = at + 16 * count
    for piece in range(at, end, 16 * _AT_ONCE):
        words += _table(min(_AT_ONCE, (end - piece) // 16)).unpack_from(ram, piece)
    return tuple(words)


class Queue:
    """One virtqueue that the driver has set up. To be used on one thread.

    Args:
        dma: the guest's memory.
        size: descriptors.
        desc, avail, used: guest-physical addresses of the three parts.
        interrupt: tells the driver that there are used buffers.
        event_idx: VIRTIO_RING_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_RING_F_INDIRECT_DESC was negotiated.
        again: has the queue looked at again later, as by a kick. None: `chains` goes on as long as it can.
        limiter: counts what was pushed; while it is empty, `take` finds nothing.

    Attributes:
        size, desc, avail, used: as above.
        stopped: it is not the driver's any more.

    Raises:
        DriverError: a size or an address that the specification forbids.
    """

    def __init__(
        self,
        dma: Dma,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        interrupt: Callable[[], None],
        event_idx: bool = False,
        indirect: bool = False,
        again: Callable[[], None] | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise DriverError(f"sets up a queue of size {size}, which is not a power of two")
        for name, address, alignment in (
            ("descriptor table", desc, VRING_DESC_ALIGN_SIZE),
            ("available ring", avail, VRING_AVAIL_ALIGN_SIZE),
            ("used ring", used, VRING_USED_ALIGN_SIZE),
        ):
            if address % alignment:
                raise DriverError(f"puts a {name} at {address:#x}, which is not aligned to {alignment}")
        self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.stopped = False
        self._mask = size - 1
        self._dma = dma
        self._limiter = limiter
        self._interrupt = interrupt
        self._event_idx = event_idx
        self._indirect = indirect
        self._again = again
        self._desc = dma.view(desc, 16 * size)
        # le16 flags, idx, ring[size], used_event
        self._avail = dma.view(avail, 6 + 2 * size).cast("H")
        # le16 flags, idx; {le32 id, len} ring[size]; le16 avail_event
        used_bytes = dma.view(used, 6 + 8 * size)
        self._used = used_bytes.cast("H")
        self._used_elements = used_bytes[4 : 4 + 8 * size].cast("I")
        self._avail_event_at = 2 + 4 * size
        self._used_event_at = 2 + size
        self._last_avail = 0
        self._used_idx = 0
        self._signalled = 0  # used idx at the last decision to interrupt or not
        self._fenced = -1  # used idx before the last fence
        self._lock = threading.Lock()
        self._piece: Piece = (1, 0, memoryview(b""))  # of the guest's RAM, where the last buffer was
        self._share = 0  # of work, that is left to `chains`

    def pop(self) -> Chain | None:
        """The next buffer that the driver has made available, or None.

        Raises:
            DriverError: the specification forbids such a buffer.
        """
        last = self._last_avail
        avail = self._avail
        ahead = avail[1] - last & 0xFFFF
        if not ahead:
            return None
        size = self.size
        if ahead > size:
            raise DriverError(f"makes {ahead} buffers available in a queue of {size}")
        head = index = avail[2 + (last & self._mask)]
        self._last_avail = last + 1 & 0xFFFF
        table = self._desc
        words: tuple[int, ...] = ()  # all of an indirect table, where it is no longer than a chain
        count = left = size  # descriptors in the table, and how many more the chain may have
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_bytes = writable_bytes = 0
        start, end, ram = self._piece  # where the last buffer was, the next one is
        while True:
            if index >= count:
                raise DriverError(f"names descriptor {index} of {count}")
            if not left:
                raise DriverError(f"makes a chain of more than {size} descriptors, or a loop")
            left -= 1
            if words:
                at = 4 * index
                address = words[at]
                length = words[at + 1]
                flags = words[at + 2]
                index = words[at + 3]
            else:
                address, length, flags, index = _DESCRIPTOR.unpack_from(table, 16 * index)
            if address < start or address + length > end:
                start, end, ram = self._piece = self._dma.piece(address, length)
            address -= start
            if flags & VRING_DESC_F_INDIRECT:
                # At the end of a chain, and only one deep. Its write flag means nothing (2.7.5.3.2).
                if table is not self._desc or words or not self._indirect or flags & VRING_DESC_F_NEXT:
                    raise DriverError("uses an indirect descriptor where it may not")
                if not length or length % 16:
                    raise DriverError(f"uses an indirect table of {length} bytes")
                index = 0
                left += 1  # it is no buffer itself: a chain of the queue's size may be in its table
                count = length // 16
                if count <= size:
                    words = _descriptors(ram, address, count)
                    if left == size and count >= _WORTHWHILE:
                        chain = _straight(head, words, start, end, ram)
                        if chain is not None:
                            return chain
                else:
                    table = ram[address : address + length]
                continue
            if flags & VRING_DESC_F_WRITE:
                writable.append(ram[address : address + length])
                writable_bytes += length
            else:
                if writable:
                    raise DriverError("puts a readable descriptor behind a writable one")
                readable.append(ram[address : address + length])
                readable_bytes += length
            if not flags & VRING_DESC_F_NEXT:
                if readable_bytes + writable_bytes > _MOST_BYTES:
                    raise DriverError(f"makes a chain of {readable_bytes + writable_bytes} bytes")
                return Chain(head, readable, writable, readable_bytes, writable_bytes)

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back to the driver; the device has written the first `written` bytes of its writable part."""
        used_idx = self._used_idx
        element = 2 * (used_idx & self._mask)
        elements = self._used_elements
        elements[element] = chain.head
        elements[element + 1] = written
        self._used_idx = self._used[1] = used_idx + 1 & 0xFFFF
        if self._limiter is not None:
            self._limiter.use(1, chain.readable_bytes + written)

    def push_all(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """Give several chains back, each with the bytes written: one packet. The driver sees them all at once."""
        used_idx = self._used_idx
        elements = self._used_elements
        for chain, written in chains:
            element = 2 * (used_idx & self._mask)
            elements[element] = chain.head
            elements[element + 1] = written
            used_idx += 1
            if self._limiter is not None:
                self._limiter.use(0, chain.readable_bytes + written)
        if self._limiter is not None:
            self._limiter.use(1, 0)
        self._used_idx = self._used[1] = used_idx & 0xFFFF

    def notify(self) -> None:
        """Interrupt the driver for what was pushed since the last call, if it wants that."""
        new, old = self._used_idx, self._signalled
        if new == old:
            return
        self._signalled = new
        if self._fenced != new:
            self._fence()
        self._fenced = -1
        if self._event_idx:
            # vring_need_event(): is used_event among old ... new - 1?
            if new - self._avail[self._used_event_at] - 1 & 0xFFFF < new - old & 0xFFFF:
                self._interrupt()
        elif not self._avail[0] & VRING_AVAIL_F_NO_INTERRUPT:
            self._interrupt()

    def rearm(self) -> bool:
        """Ask for a kick with the next buffer. Return whether one is there already: no kick may come for that one."""
        if self._event_idx:
            self._used[self._avail_event_at] = self._last_avail
            self._fence()
            self._fenced = self._used_idx  # everything that was pushed so far was before a fence
        return self._avail[1] != self._last_avail

    def take(self) -> Chain | None:
        """As `pop`. If there is no buffer, ask for a kick with the next one."""
        if self._limiter is not None and not self._limiter.has_some():
            return None
        while (chain := self.pop()) is None:
            if not self.rearm():
                return None
        return chain

    def chains(self) -> Iterator[Chain]:
        """Yield the available buffers. At the end the driver is asked for a kick with the next one.

        A driver may add buffers as quickly as they are used. It need not even run for it: a drive's data can be read
        into the available ring. So after a share of buffers, or some time, the rest waits (`again`). Whoever waits for
        the thread gets a turn in between, to stop the device for example.

        Raises:
            DriverError: as `pop`.
        """
        self._share = _SHARE
        until = monotonic() + _TURN
        while (chain := self.take()) is not None:
            self._share -= chain.readable_bytes + chain.writable_bytes + _AT_LEAST
            yield chain
            if (self._share <= 0 or monotonic() >= until) and self._again is not None:
                self._again()
                return

    def charge(self, work: int) -> None:
        """Count `work` (bytes) that a buffer makes beyond the bytes in it: for the share of `chains`, and the limit."""
        self._share -= work
        if self._limiter is not None:
            self._limiter.use(0, work)

    def go_on_later(self) -> bool:
        """Have the queue looked at again, after others have had their turn. False: nobody would do it."""
        if self._again is None:
            return False
        self._again()
        return True

    def undo_pop(self) -> None:
        """Put the last popped buffer back. The next `pop` gives it again."""
        self._last_avail = self._last_avail - 1 & 0xFFFF

    def stop(self) -> None:
        """Let go of guest memory. From now on `pop` finds nothing, and pushed buffers go nowhere."""
        self.stopped = True
        self._avail = memoryview(bytes(6 + 2 * self.size)).cast("H")
        self._used = memoryview(bytearray(6 + 8 * self.size)).cast("H")
        self._used_elements = memoryview(bytearray(8 * self.size)).cast("I")
        self._desc = memoryview(bytes(16 * self.size))
        self._last_avail = 0
        self._interrupt = lambda: None
        self._again = self._limiter = None
        self._piece = (1, 0, memoryview(b""))

    def _fence(self) -> None:
        with self._lock:
            pass


def _straight(head: int, words: tuple[int, ...], start: int, end: int, ram: memoryview) -> Chain | None:
    """Read a long chain whose descriptors are linked in their order, as Linux links them, all at once.

    Returns:
        The chain; None if it is linked otherwise, or not all in `ram` (guest-physical `start` to `end`).
    """
    flags = words[2::4]
    count = len(flags)
    reads = flags.count(VRING_DESC_F_NEXT) + (not flags[-1])
    writes = count - reads
    linked = (VRING_DESC_F_NEXT,) * reads + (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE,) * writes
    if flags[:-1] != linked[:-1] or flags[-1] != linked[-1] & ~VRING_DESC_F_NEXT:
        return None
    if words[3:-4:4] != tuple(range(1, count)):
        return None
    lengths = words[1::4]
    if sum(lengths) > _MOST_BYTES:
        return None
    # tuple(map()) would put one more tuple into the free lists of CPython each time: 3 MiB in the end.
    ends = list(map(add, words[::4], lengths))
    if min(words[::4]) < start or max(ends) > end:
        return None
    views = [ram[low - start : high - start] for low, high in zip(words[::4], ends, strict=True)]
    return Chain(head, views[:reads], views[reads:], sum(lengths[:reads]), sum(lengths[reads:]))
