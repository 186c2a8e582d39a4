"""Shows on standard error how much of the guest's RAM is ready, if that takes long. Wiped before the guest runs."""

import sys
import time
from collections.abc import Callable

from offmap.cli.log import draws
from offmap.log import Logger

_PATIENCE = 1.0  # seconds before anything is shown
_REDRAW = 0.1  # seconds between two updates of the line on a terminal
_REPEAT = 5.0  # seconds between two lines elsewhere


class PopulateProgress:
    """Is called with the share that is ready, from 0 to 1.

    On a terminal it rewrites one line. At 1, or by `clear`, it wipes the line: the guest gets the terminal. Elsewhere
    it logs a record every few seconds.

    Args:
        what: the kind of RAM and its size, as text for people.
        clock: returns the time in seconds.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._next: float | None = None
        self._drawn = False

    def __call__(self, share: float) -> None:
        now = self._clock()
        if self._next is None:
            self._next = now + _PATIENCE
        if share >= 1:
            self.clear()
        elif now >= self._next:
            line = f"{self._what}: {share:.0%} ready"
            self._drawn = draws()
            self._next = now + (_REDRAW if self._drawn else _REPEAT)
            if self._drawn:
                print(f"\r\x1b[Koffmap run: {line}", end="", file=sys.stderr, flush=True)
            else:
                Logger("offmap.cli.run").info(line)

    def clear(self) -> None:
        """Wipe the line, if there is one."""
        if self._drawn:
            self._drawn = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
