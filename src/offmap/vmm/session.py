"""Run one machine to its end at this process's terminal: the event loop of ``offmap run``."""

import contextlib
import os
import selectors
import time
from collections.abc import Callable

from offmap.errors import KernelError, OffmapError
from offmap.vmm.config import MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.output import ConsoleOutput
from offmap.vmm.stop_signals import stopped_by_signals
from offmap.vmm.terminal import EscapeKey, RawTerminal, Typed

__all__ = ["Session"]

_LINE_DELAY = 0.003  # seconds that a character may wait for the rest of its line, so that the line costs one write
_READ_SIZE = 4096
_DAY = 86400.0


class Session:
    """A machine between `stdin` and `stdout` (fds).

    Args:
        say: takes a line for the user, which must not mix with the guest's output.
        on_up: called on this thread once the guest has opened its console, as Linux does just before init.
        on_end: called when the guest has stopped, before the machine is taken apart.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        stdin: int = 0,
        stdout: int = 1,
        say: Callable[[str], None],
        on_up: Callable[[Machine], None] = lambda _: None,
        on_end: Callable[[Machine], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._stdin = stdin
        self._stdout = stdout
        self._output: ConsoleOutput | None = None
        self._say = say
        self._on_up = on_up
        self._on_end = on_end
        self._up = False
        self._machine: Machine | None = None
        self._output_error: OSError | None = None

    def run(self) -> Stop:
        """Build the machine, run it to its end, take it apart. On the process's main thread, as it handles signals.

        Returns:
            How it ended; an outcome of FAILED carries the error.

        Raises:
            OffmapError: it could not be built, or a signal came before it was.
        """
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with (
                ConsoleOutput(self._stdout) as self._output,
                stopped_by_signals(self._stop),
                Machine(self._config, self._write, on_open=self._opened, on_event=self._wake, say=self._say) as machine,
            ):
                self._machine = machine
                with RawTerminal(self._stdin):
                    machine.start()
                    self._loop(machine, self._output)
                self._on_end(machine)
            return machine.stopped or Stop(Outcome.QUIT)
        finally:
            os.close(self._events)

    def _wake(self) -> None:
        os.eventfd_write(self._events, 1)

    def _opened(self) -> None:
        self._up = True
        self._wake()

    def _write(self, data: bytes) -> None:
        """Write all of it; a reader that has gone away ends the machine from the loop, not from a vCPU's thread."""
        if self._output is None or self._output_error is not None:
            return
        try:
            self._output.write(data)
        except OSError as error:
            self._output_error = error
            self._wake()

    def _quit(self, machine: Machine, reason: OffmapError | None = None) -> None:
        """End it as the user asked, whether or not somebody reads what it has said."""
        if self._output is not None:
            self._output.abandon()
        machine.stop(Outcome.QUIT, reason)

    def _stop(self, reason: OffmapError) -> bool:
        if self._machine is None:
            return False
        self._quit(self._machine, reason)
        return True

    def _loop(self, machine: Machine, output: ConsoleOutput) -> None:
        escape = EscapeKey()
        pending = b""  # read, and not yet taken by the guest
        at_end = announced = flush_due = writing = False
        # poll(2), because epoll refuses regular files, and a guest's input may come from one.
        with selectors.PollSelector() as selector, selectors.PollSelector() as stopped:
            selector.register(machine.stopped_fd, selectors.EVENT_READ)
            selector.register(self._events, selectors.EVENT_READ)
            stopped.register(machine.stopped_fd, selectors.EVENT_READ)
            reading = False
            while machine.stopped is None:
                if reading != (not pending and not at_end):
                    reading = not reading
                    if reading:
                        selector.register(self._stdin, selectors.EVENT_READ)
                    else:
                        selector.unregister(self._stdin)
                if writing != flush_due:
                    writing = not writing
                    if writing:
                        selector.register(output.fd, selectors.EVENT_WRITE)
                    else:
                        selector.unregister(output.fd)
                due = machine.next_event()
                # No longer than a day: poll(2) takes an int of milliseconds, and the host's clock may have been set.
                timeout = None if due is None else min(max(due - time.time(), 0), _DAY)
                ready = {key.fd for key, _ in selector.select(timeout)}
                if self._events in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._events)
                    stopped.select(_LINE_DELAY)
                    flush_due = True
                if flush_due and output.ready():
                    # Never wait here, for a reader or for a vCPU that waits for one: Ctrl-A x must be seen.
                    flush_due = False
                    machine.console.flush(wait=False)
                if self._output_error is not None:
                    error = KernelError("writing what the guest's console says", self._output_error)
                    machine.stop(Outcome.FAILED, error)
                if reading and self._stdin in ready:
                    data = self._read_stdin()
                    at_end = not data
                    pending, asked = escape.filter(data)
                    if asked is Typed.QUIT:
                        self._quit(machine)
                    elif asked is Typed.HELP:
                        self._say("Ctrl-A x: quit; Ctrl-A a: send Ctrl-A; Ctrl-A h: this help")
                if pending:
                    pending = pending[machine.console.feed(pending) :]
                machine.tick()
                if self._up and not announced:
                    announced = True
                    self._on_up(machine)

    def _read_stdin(self) -> bytes:
        try:
            return os.read(self._stdin, _READ_SIZE)
        except OSError:
            return b""  # the terminal has hung up: no more input, and the guest goes on
