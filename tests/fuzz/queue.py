"""The queue by itself, and a queue whose rings somebody else writes to while it is read."""

import contextlib
import ctypes
import os
import random
import signal

from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.limit import Limit, Limiter
from offmap.devices.virtio.queue import Chain, Queue

from .choices import Choices
from .rings import HALF, SPAN, GuestRam, Ring
from .target import MOST_STEPS, Target

_SIZES = (16, 8, 64, 1, 2, 512)
_SETUPS = 4  # of one case
_LIMIT = Limit(rate=1 << 16, ops=300)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What the other writer writes, and where: descriptors, the available ring and indirect tables.
_WORDS = (b"\0", b"\1\0", b"\2\0", b"\4\0", b"\xff\xff", b"\x10\0\0\0", HALF.to_bytes(8, "little"), bytes(8))
_PLACES = (0, 0, 0x2000, 0x5000)


class QueueTarget(Target):
    """A queue. What comes out of it must be what the driver put in, inside guest memory, whatever the driver did."""

    sources = ("devices/virtio/queue.py", "devices/virtio/dma.py")

    def __init__(self) -> None:
        self.ram = GuestRam()
        self._again = self._served = 0
        self._now = 0.0

    def case(self, choices: Choices) -> bool:
        served = 0
        for _ in range(_SETUPS):  # a driver sees that the device has given it up, and begins again
            served += self._use(choices)
            if not choices.left:
                break
        self.ram.check()
        return bool(served)

    def _use(self, c: Choices) -> int:
        """Set a queue up and use it, until it is given up or nothing is left to decide by. Return how much was served.

        A chain that was taken counts, whatever becomes of the queue afterwards.
        """
        event_idx, indirect, many = c.byte() & 1, bool(c.byte() & 3), c.byte()
        ring = Ring(self.ram, 0, c.of(_SIZES))
        queue = None
        self._served = 0
        try:
            queue = self._queue(c, ring, event_idx=bool(event_idx), indirect=indirect, limited=many > 200)
            for _ in range(MOST_STEPS):
                if not c.left:
                    break
                self._step(c, queue, ring, indirect=indirect)
            self._take(queue, 3)
            queue.notify()
        except DriverError:
            pass
        finally:
            if queue is not None:
                queue.stop()
                assert queue.pop() is None
        return self._served

    def _step(self, c: Choices, queue: Queue, ring: Ring, *, indirect: bool) -> None:
        what = c.byte()
        if what < 160:
            self._add(c, ring, indirect=indirect)
        elif what < 200:
            self._take(queue, c.byte() & 3)
        elif what < 220:
            for chain in queue.chains():
                self._served += 1
                self.check(chain, ring.size)
                queue.push(chain, min(chain.writable_bytes, 1 << 20))
                queue.charge(c.byte() << 16)
        elif what < 230:
            queue.notify()
        elif what < 240:
            ring.set_flags(c.byte() & 1, c.word(2))
        elif what < 244:
            if queue.pop() is not None:
                queue.undo_pop()
        elif what < 250:
            queue.go_on_later()
        else:
            self.meddle(c)

    def _queue(self, c: Choices, ring: Ring, *, event_idx: bool, indirect: bool, limited: bool) -> Queue:
        size, places = ring.size, [ring.desc, ring.avail, ring.used]
        if c.rarely(24):
            size = c.word(2)
        if c.rarely(24):
            places[c.below(3)] = c.word(8) if c.byte() & 1 else c.word(3)

        def again() -> None:
            self._again += 1

        return Queue(
            self.ram.dma,
            size,
            *places,
            interrupt=lambda: None,
            event_idx=event_idx,
            indirect=indirect,
            again=again if limited else None,
            limiter=Limiter(_LIMIT, lambda *_: None, again, self._clock) if limited else None,
        )

    def _clock(self) -> float:
        self._now += 0.01
        return self._now

    @staticmethod
    def _add(c: Choices, ring: Ring, *, indirect: bool) -> None:
        many = 9 + c.byte() % 40 if c.rarely(4) else c.byte() & 3
        reads = [bytes(c.byte()) for _ in range(many)]
        writes = [c.byte() << (c.byte() & 7) for _ in range(c.byte() & 3)]
        ring.add(c, reads, writes, indirect=indirect)

    def _take(self, queue: Queue, how: int) -> None:
        """Serve what there is."""
        served: list[tuple[Chain, int]] = []
        for _ in range(64):
            chain = queue.take() if how & 1 else queue.pop()
            if chain is None:
                break
            self.check(chain, queue.size)
            self._served += 1
            if how & 2:
                served.append((chain, 1))
            else:
                queue.push(chain, 0)
        if how & 2:
            queue.push_all(served)
        queue.rearm()
        queue.notify()

    @staticmethod
    def check(chain: Chain, size: int) -> None:
        """Raise AssertionError if a chain is not what the specification allows, or its sums are wrong."""
        assert len(chain.readable) + len(chain.writable) <= size, "more descriptors than the queue has"
        assert sum(map(len, chain.readable)) == chain.readable_bytes
        assert sum(map(len, chain.writable)) == chain.writable_bytes
        assert 0 <= chain.head < size

    def meddle(self, c: Choices) -> None:
        """Write anything anywhere into the rings."""
        data = c.bytes(1 + (c.byte() & 15))
        at = c.word(2) % (SPAN - len(data))
        self.ram.rings[at : at + len(data)] = data

    def close(self) -> None:
        self.ram.close()


class RacingQueueTarget(QueueTarget):
    """The same, and another processor's thread (a process with the same memory) writes to the rings all the time.

    The page of buffers that is kept from the guest, and the invariants of a chain, hold all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._racer = _race(self.ram)

    def case(self, choices: Choices) -> bool:
        with contextlib.suppress(DriverError):
            return super().case(choices)
        return True

    def close(self) -> None:
        os.kill(self._racer, signal.SIGKILL)
        os.waitpid(self._racer, 0)
        super().close()


def _race(ram: GuestRam) -> int:
    """Start the other writer, which ends with this process. Return its pid."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    dice = random.Random(1)
    while os.getppid() == parent:
        for _ in range(1 << 16):
            word = _WORDS[dice.randrange(len(_WORDS))]
            at = _PLACES[dice.randrange(len(_PLACES))] + 2 * dice.randrange(128)
            ram.rings[at : at + len(word)] = word
    os._exit(0)
