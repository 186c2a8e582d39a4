"""SIGINT, SIGTERM and SIGHUP while a machine is built and while it runs."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from offmap.errors import OffmapError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[OffmapError], bool]) -> Iterator[None]:
    """While open, each of these signals calls `stop` with the reason; on the main thread only, as Python has it.

    Args:
        stop: ends the machine and returns True; False while the machine is being built. Then the first signal raises
            the reason, so that partial state is rolled back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # who runs a machine on another thread ends it from there, too
        return
    unwinding = False

    def handle(number: int, _frame: object) -> None:
        nonlocal unwinding
        reason = OffmapError(f"stopped by {signal.Signals(number).name}")
        if not stop(reason) and not unwinding:
            unwinding = True  # a second signal must not stop what gives the memory back
            raise reason

    saved = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
