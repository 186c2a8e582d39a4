"""How far the guest's RAM is, where getting it takes long: on standard error, and gone before the guest speaks."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["PopulateProgress"]

_PATIENCE = 1.0  # seconds until anything is said
_REDRAW = 0.1  # seconds between two looks of the line on a terminal
_REPEAT = 5.0  # seconds between two lines elsewhere


class PopulateProgress:
    """Takes the share that is ready, from 0 to 1.

    On a terminal it is one line, rewritten, and wiped at 1 or by `clear`: the terminal is the guest's then. Elsewhere
    it is a line every few seconds.

    Args:
        what: is being got, with its size.
        stream: where it is said.
        clock: seconds.
    """

    def __init__(self, what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._stream = sys.stderr if stream is None else stream
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
            line = f"offmap run: {self._what}: {share:.0%} ready"
            terminal = self._stream.isatty()
            self._next = now + (_REDRAW if terminal else _REPEAT)
            self._drawn = terminal
            self._stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
            self._stream.flush()

    def clear(self) -> None:
        """Wipe the line, if there is one."""
        if self._drawn:
            self._drawn = False
            self._stream.write("\r\x1b[K")
            self._stream.flush()
