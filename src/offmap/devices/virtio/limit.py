"""Limits on what a guest may ask of a device: bytes and requests a second, as token buckets.

A bucket holds what may be used in one second, and fills up at the same rate. A request is served while there is
something in the bucket, and may then take more than that: the next ones wait until the debt is paid.
"""

import time
from collections.abc import Callable

from offmap.options import Options
from offmap.typed import NamedTuple
from offmap.units import parse_size

USAGE = "rate=BYTES, ops=N"
_MOST = 1 << 50


class Limit(NamedTuple):
    """``rate=BYTES,ops=N``: what each queue of a device may move in a second; None: as much as it can.

    Attributes:
        rate: bytes.
        ops: requests, or packets.
    """

    rate: int | None = None
    ops: int | None = None

    @classmethod
    def from_options(cls, options: Options) -> "Limit | None":
        """Take both options; None if neither is given. Raises OffmapError if a value is wrong."""
        rate = options.text("rate", None, parse_size)
        if rate is not None and not 0 < rate <= _MOST:
            options.refuse("rate= is a number of bytes a second, like 10M")
        ops = options.number("ops", None, 1, _MOST)
        return None if rate is None and ops is None else cls(rate, ops)


class Limiter:
    """The buckets of one queue. To be used on one thread.

    Args:
        limit: how much may be used.
        later: calls a function on this thread after so many seconds.
        again: has the queue looked at again, as by a kick.
        clock: returns seconds that only grow.
    """

    def __init__(
        self,
        limit: Limit,
        later: Callable[[float, Callable[[], None]], None],
        again: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rates = (limit.ops, limit.rate)
        self._left = [float(rate or 0) for rate in self._rates]
        self._later = later
        self._again = again
        self._clock = clock
        self._filled = clock()
        self._waiting = False

    def use(self, ops: int, size: int) -> None:
        """Take one request's worth out of the buckets: `ops` requests, `size` bytes."""
        self._left[0] -= ops
        self._left[1] -= size

    def has_some(self) -> bool:
        """Whether another request may be served now. If not, the queue is looked at again once it may."""
        now = self._clock()
        passed, self._filled = now - self._filled, now
        wait = 0.0
        for number, rate in enumerate(self._rates):
            if rate is None:
                continue
            self._left[number] = left = min(self._left[number] + rate * passed, float(rate))
            if left <= 0:
                wait = max(wait, (1 - left) / rate)
        if wait and not self._waiting:
            self._waiting = True
            self._later(wait, self._look)
        return not wait

    def _look(self) -> None:
        self._waiting = False
        self._again()
