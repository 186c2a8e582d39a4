"""Run one machine to its end at this process's terminal: the event loop of ``offmap run``."""

import contextlib
import os
import select
from collections.abc import Callable, Iterator

from offmap.errors import KernelError, OffmapError
from offmap.typed import TYPE_CHECKING
from offmap.vmm.command_line import with_hvc0
from offmap.vmm.config import MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.output import ConsoleOutput
from offmap.vmm.stop_signals import stopped_by_signals
from offmap.vmm.terminal import EscapeKey, RawTerminal, Typed
from offmap.vmm.waiting import Waiting

if TYPE_CHECKING:
    from offmap.vmm.confinement import Confinement
    from offmap.vmm.hvc import Hvc

_LINE_DELAY = 3  # milliseconds that a character may wait for the rest of its line, so that the line costs one write
_READ_SIZE = 4096
_MOST_TYPED = 64 << 10  # bytes that wait for a guest to read them; of a terminal, what comes then is lost
_NOTHING = contextlib.nullcontext()


class Session:
    """A machine between `stdin` and `stdout` (fds).

    Args:
        hvc: give the guest a virtio console, hvc0. The terminal shows the first serial port until the guest opens
            hvc0, and hvc0 while the guest has it open. What Linux prints, it then prints to both.
        say: takes a line for the user, which must not mix with the guest's output.
        on_up: called on this thread once the guest has opened its console, as Linux does just before init (hvc0: when
            its driver has found it).
        on_end: called when the guest has stopped, before the machine is taken apart.
        confinement: is entered before the guest runs; None: nothing confines this process.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        stdin: int = 0,
        stdout: int = 1,
        hvc: bool = False,
        say: Callable[[str], None],
        on_up: Callable[[Machine], None] = lambda _: None,
        on_end: Callable[[Machine], None] = lambda _: None,
        confinement: "Confinement | None" = None,
    ) -> None:
        self._confinement = confinement
        self._config = config
        self._stdin = stdin
        self._stdout = stdout
        self._output: ConsoleOutput | None = None
        self._with_hvc = hvc
        self._hvc: Hvc | None = None
        self._at_hvc = False  # and not at the serial port
        self._serial_opened = False
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
                stopped_by_signals(self._stop) as signals,
                self._attached(self._output) as config,
                Machine(config, self._write, on_open=self._opened, on_event=self._wake, say=self._say) as machine,
            ):
                self._machine = machine
                with RawTerminal(self._stdin), self._hvc.following_the_size() if self._hvc else _NOTHING:
                    machine.start(self._confinement)
                    self._loop(machine, self._output, signals)
                self._on_end(machine)
            return machine.stopped or Stop(Outcome.QUIT)
        finally:
            os.close(self._events)

    @contextlib.contextmanager
    def _attached(self, output: ConsoleOutput) -> Iterator[MachineConfig]:
        """The machine to build, with the device that the terminal is at."""
        if not self._with_hvc:
            yield self._config
            return
        from offmap.vmm.hvc import Hvc

        terminal = self._stdout if os.isatty(self._stdout) else self._stdin
        with Hvc(
            output.fd,
            terminal,
            on_open=lambda: self._move(to_hvc=True),
            on_close=lambda: self._move(to_hvc=False),
            on_error=self._output_failed,
        ) as self._hvc:
            source = self._config.source
            yield self._config.replace(
                source=source._replace(command_line=with_hvc0(source.command_line)),
                devices=[*self._config.devices, ("console", self._hvc)],
            )

    def _wake(self) -> None:
        os.eventfd_write(self._events, 1)

    def _opened(self) -> None:
        self._up = self._serial_opened = True
        self._wake()

    def _move(self, *, to_hvc: bool) -> None:
        """The guest has opened its hvc0, or has none any more; on the device's thread, before it writes anything."""
        if self._machine is not None:
            self._machine.console.flush()  # the beginning of a line, which belongs to what was before
        self._at_hvc = to_hvc
        self._up = self._up or to_hvc
        self._wake()

    def _write(self, data: bytes) -> None:
        """Write all of it; a reader that has gone away ends the machine from the loop, not from a vCPU's thread."""
        if self._output is None or self._output_error is not None or self._at_hvc:
            return
        try:
            self._output.write(data)
        except OSError as error:
            self._output_failed(error)

    def _output_failed(self, error: OSError) -> None:
        self._output_error = error
        self._wake()

    def _quit(self, machine: Machine, reason: OffmapError | None = None) -> None:
        """End it as the user asked, even if nobody reads its output."""
        if self._output is not None:
            self._output.abandon()
        machine.stop(Outcome.QUIT, reason)

    def _stop(self, reason: OffmapError) -> bool:
        if self._machine is None:
            return False
        self._quit(self._machine, reason)
        return True

    def _loop(self, machine: Machine, output: ConsoleOutput, signals: int) -> None:
        escape = EscapeKey()
        pending = b""  # read, and not yet taken by the guest
        at_end = announced = flush_due = False
        at_terminal = os.isatty(self._stdin)
        waiting, stopped = Waiting(machine, self._confinement, signals, self._events), select.poll()
        stopped.register(machine.stopped_fd, select.POLLIN)
        watched: set[tuple[int, int]] = set()

        def watch(fd: int, event: int, wanted: bool) -> None:
            if wanted and (fd, event) not in watched:
                watched.add((fd, event))
                waiting.poll.register(fd, event)
            elif not wanted and (fd, event) in watched:
                watched.remove((fd, event))
                waiting.poll.unregister(fd)

        while machine.stopped is None:
            reading = (len(pending) < _READ_SIZE or at_terminal) and not at_end
            watch(self._stdin, select.POLLIN, reading)
            watch(output.fd, select.POLLOUT, flush_due)
            if self._hvc is not None:
                watch(self._hvc.input_fd, select.POLLOUT, self._at_hvc and bool(pending))
            ready = waiting.wait()
            if self._events in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._events)
                stopped.poll(_LINE_DELAY)
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
                passed, asked = escape.filter(data)
                pending += passed
                if len(pending) > _MOST_TYPED:  # a terminal: its Ctrl-A must be seen
                    pending = pending[:_MOST_TYPED]
                if asked is Typed.QUIT:
                    self._quit(machine)
                elif asked is Typed.HELP:
                    self._say("Ctrl-A x: quit; Ctrl-A a: send Ctrl-A; Ctrl-A h: this help")
            if pending:
                pending = pending[self._feed(machine, pending) :]
            machine.tick()
            if self._up and not announced:
                announced = True
                self._on_up(machine)

    def _feed(self, machine: Machine, data: bytes) -> int:
        """Send it to the guest, where the terminal is now; how many bytes were taken."""
        if self._hvc is None:
            return machine.console.feed(data)
        if self._at_hvc:
            return self._hvc.feed(data)
        # What is typed before the guest listens anywhere waits, as it may be hvc0 where it does.
        return machine.console.feed(data) if self._serial_opened else 0

    def _read_stdin(self) -> bytes:
        try:
            return os.read(self._stdin, _READ_SIZE)
        except OSError:
            return b""  # the terminal has hung up: no more input, and the guest goes on
