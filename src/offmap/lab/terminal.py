"""Our own terminal, lent to a command in the lab."""

import os
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def is_interactive() -> bool:
    """Say whether our input and output are both terminals, and ours to use (not a background job's)."""
    if not all(os.isatty(fd) for fd in (0, 1)):
        return False
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # not our controlling terminal: then there is no job control either
        return True


def terminal_size() -> tuple[int, int]:
    """Return (rows, columns) of the terminal on our output; 24 by 80 if it does not say."""
    size = os.get_terminal_size(1)
    return size.lines or 24, size.columns or 80


@contextmanager
def raw_terminal(on_resize: Callable[[int, int], None]) -> Iterator[None]:
    """Put our terminal into raw mode, so that every key reaches the command; restored at the end, whatever happens.

    Args:
        on_resize: called with (rows, columns) when the terminal changes its size.
    """
    saved = termios.tcgetattr(0)

    def resized(_number: int, _frame: FrameType | None) -> None:
        # Not in the handler itself: the main thread may hold the lock that sending takes.
        threading.Thread(target=on_resize, args=terminal_size(), daemon=True).start()

    def ended(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(0, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)
