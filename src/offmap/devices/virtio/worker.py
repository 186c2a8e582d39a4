"""The thread of a device. All that the device does happens there, and so needs no locks.

It waits for the driver's kicks (ioeventfds), for the host files that the device watches, and for calls from other
threads (the transport's, for a vCPU). A stalled device, waiting for a disk for example, stalls only itself.
"""

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from offmap.errors import OffmapError
from offmap.owned import Owned

_T = TypeVar("_T")

_MOST_EVENTS = 16  # taken at once; the default makes room for a thousand each time


class Worker(Owned):
    """A thread that handles events until it is closed.

    Args:
        name: of the thread.
        on_error: called on the thread with what a handler raised. The thread goes on.

    Raises:
        OffmapError: this process may start no more threads.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._calls: deque[Callable[[], None]] = deque()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._closing = False
        self._go = threading.Event()
        with ExitStack() as building:
            self._epoll = building.enter_context(select.epoll())
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            building.callback(os.close, self._wake)
            self.watch(self._wake, self._run_calls, select.EPOLLIN | select.EPOLLET)
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                raise OffmapError(
                    f"this process may start no thread for {name}", "raise RLIMIT_NPROC (ulimit -u)"
                ) from None
            self._owned = building.pop_all()

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

    def call(self, function: Callable[[], _T]) -> _T:
        """Run `function` on the thread and wait for it: nothing else of the device runs meanwhile.

        Returns:
            What it returned, or raises what it raised.
        """
        if self.is_current:
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
                self._on_error(error)  # the calls behind it are still to be made

    def _run(self) -> None:
        poll = self._epoll.poll
        handlers = self._handlers
        while not self._closing:
            for fd, events, handler in [(fd, events, handlers.get(fd)) for fd, events in poll(-1, _MOST_EVENTS)]:
                # An earlier handler of this round may have unwatched it, and another file may have its number now.
                if handler is not None and handlers.get(fd) is handler:
                    try:
                        handler(events)
                    except Exception as error:
                        self._on_error(error)

    def close(self) -> None:
        """End the thread when it has finished its current work."""
        if self._closing:
            return

        def end() -> None:
            self._closing = True

        self.post(end)
        self._thread.join()
        self._owned.close()
