"""The thread of a device. All that the device does happens there, and so needs no locks.

It waits for the driver's kicks (ioeventfds), for the host files that the device watches, and for calls from other
threads (the transport's, for a vCPU). A stalled device, waiting for a disk for example, stalls only itself.
"""

import heapq
import itertools
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

from offmap.errors import OffmapError
from offmap.owned import Owned
from offmap.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeVar

    _T = TypeVar("_T")

_MOST_EVENTS = 16  # taken at once; the default makes room for a thousand each time


class Worker(Owned):
    """A thread that handles events until it is closed.

    Args:
        name: of the thread.
        on_error: called on the thread with what a handler raised. The thread goes on.
        start: start the thread now. Else `start` does, and calls run on their caller's thread until then.

    Raises:
        OffmapError: this process may start no more threads.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], None], *, start: bool = True) -> None:
        self._name = name
        self._on_error = on_error
        self._thread: threading.Thread | None = None
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # a heap: when, in which order, what
        self._order = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._closing = False
        self._go = threading.Event()
        with ExitStack() as building:
            self._epoll = building.enter_context(select.epoll())
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            building.callback(os.close, self._wake)
            self.watch(self._wake, self._run_calls, select.EPOLLIN | select.EPOLLET)
            if start:
                self.start()
            self._owned = building.pop_all()

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Start the thread, which runs `first` before all else. Raises OffmapError: there may be no more threads."""

        def run() -> None:
            first()
            self._run()

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise OffmapError(
                f"this process may start no thread for {self._name}", "raise RLIMIT_NPROC (ulimit -u)"
            ) from None
        self._thread = thread

    def watch(self, fd: int, handler: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `handler` with the events (``EPOLL*``) that come up on `fd`; on an fd that is watched, change both.

        With EPOLLET an eventfd need not be read: each write to it is an event of its own.
        """
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, which must be open still; if it is not watched, do nothing."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call(self, function: "Callable[[], _T]") -> "_T":
        """Run `function` on the thread and wait for it: nothing else of the device runs meanwhile.

        Returns:
            What it returned, or raises what it raised.
        """
        if self._thread is None or self.is_current:
            return function()
        results: list[_T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._calls.append(run)
        os.eventfd_write(self._wake, 1)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread later. What it raises goes to `on_error`."""
        self._calls.append(function)
        os.eventfd_write(self._wake, 1)

    def later(self, seconds: float, function: Callable[[], None]) -> None:
        """Run `function` on this thread, which is the caller's, when so many seconds have passed."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), function))

    def _seconds_to_wait(self) -> float:
        """Run what is due. Return how long to wait for an event; -1: for as long as it takes."""
        while self._later and (wait := self._later[0][0] - time.monotonic()) > 0:
            return math.ceil(wait * 1000) / 1000  # epoll counts milliseconds: it must not wake up too early
        while self._later and self._later[0][0] <= time.monotonic():
            try:
                heapq.heappop(self._later)[2]()
            except Exception as error:
                self._failed(error)
        return 0 if self._later else -1

    @property
    def watched(self) -> int:
        """How many fds are watched, its own included."""
        return len(self._handlers)

    @property
    def is_current(self) -> bool:
        """Whether the caller is on this thread."""
        return threading.current_thread() is self._thread

    def pause(self) -> None:
        """Make the thread stand still until `resume`; when this returns, it does. Called from outside, once."""
        standing = threading.Event()
        go = self._go = threading.Event()

        def stand() -> None:
            standing.set()
            go.wait()

        self.post(stand)
        standing.wait()

    def resume(self) -> None:
        """Let the thread go on."""
        self._go.set()

    def _run_calls(self, _events: int) -> None:
        # Only those that are there now: one that posts itself, to go on later, lets kicks and host files have a turn.
        for _ in range(len(self._calls)):
            try:
                self._calls.popleft()()
            except Exception as error:
                self._failed(error)  # the calls behind it are still to be made

    def turn(self, seconds: float = 0.0) -> bool:
        """Handle what comes up within so many seconds (-1: as long as it takes). Return whether there was anything.

        The thread does it again and again. Where none was started, somebody else may.
        """
        handlers = self._handlers
        events = self._epoll.poll(seconds, _MOST_EVENTS)
        for fd, what, handler in [(fd, what, handlers.get(fd)) for fd, what in events]:
            # An earlier handler of this round may have unwatched it, and another file may have its number now.
            if handler is not None and handlers.get(fd) is handler:
                try:
                    handler(what)
                except Exception as error:
                    self._failed(error)
        return bool(events)

    def _failed(self, error: Exception) -> None:
        """Hand on what was raised. Whatever comes of that, the thread goes on: others wait for it in `call`."""
        try:
            self._on_error(error)
        except Exception as another:
            thread = threading.current_thread()
            threading.excepthook(threading.ExceptHookArgs((type(another), another, another.__traceback__, thread)))

    def _run(self) -> None:
        while not self._closing:
            self.turn(self._seconds_to_wait() if self._later else -1)

    def close(self) -> None:
        """End the thread when it has finished its current work."""
        if self._closing:
            return
        if self._thread is None:
            self._closing = True
            self._owned.close()
            return

        def end() -> None:
            self._closing = True

        self.post(end)
        self._thread.join()
        self._owned.close()
