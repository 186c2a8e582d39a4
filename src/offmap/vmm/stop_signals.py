"""SIGINT, SIGTERM and SIGHUP while a machine is built and while it runs."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from offmap.errors import OffmapError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def wakeup_file() -> Iterator[int]:
    """While open, a file that is ready once a signal has come; on the main thread only, as Python has it.

    Who waits for a signal must wait for it. (Python's own handler only notes the signal. One that comes just before
    poll(2), or on another thread, would be heard when something else has ended the wait, which may be never.)
    """
    ours, pythons = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    saved = signal.set_wakeup_fd(pythons, warn_on_full_buffer=False)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(saved)
        os.close(ours)
        os.close(pythons)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[OffmapError], bool]) -> Iterator[int]:
    """While open, each of these signals calls `stop` with the reason; on the main thread only, as Python has it.

    It gives the `wakeup_file`, which the main thread must wait for, with whatever it waits for, and read. On other
    threads it is -1.

    Args:
        stop: ends the machine and returns True; False while the machine is being built. Then the first signal raises
            the reason, so that partial state is rolled back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield -1  # who runs a machine on another thread ends it from there, too
        return
    unwinding = False

    def handle(number: int, _frame: object) -> None:
        nonlocal unwinding
        reason = OffmapError(f"stopped by {signal.Signals(number).name}")
        if not stop(reason) and not unwinding:
            unwinding = True  # a second signal must not stop what gives the memory back
            raise reason

    with wakeup_file() as file:
        saved = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield file
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)
