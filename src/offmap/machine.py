"""The library's `Machine`: a handle to one guest, which runs in its own process."""

import os
import threading
from collections.abc import Callable, Sequence

from offmap.errors import OffmapError
from offmap.owned import Owned
from offmap.vmm import records
from offmap.vmm.config import MachineConfig
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.process import VmProcess
from offmap.vmm.records import RamFacts


class Machine(Owned):
    """One guest, from its making to its end. A context manager: leaving it leaves no process behind.

    The guest, its memory and its devices are in a process of their own, which is confined before the guest runs
    (docs/sandbox.md), and which the kernel ends when this program ends. The constructor makes everything and loads the
    guest; `start` lets it run; `close` takes it apart. Its RAM is there until then. Any thread may call any of it, but
    a callback only `stop` and `console.feed`: the others would wait for it.

    Args:
        config: what to build.
        output: takes what the guest writes to its console.
        on_open: called once when the guest opens its console for input, as Linux does just before init.
        on_event: called when the console has room for input again, and when the machine has stopped.
        say: takes a line for the user: what a device or its driver did that somebody should know.
        sandbox: confine the process. For hosts that cannot, and guests that are trusted: False.
        fds: descriptors that `config` names by their numbers.

    All of these are called on one thread of the machine's, one at a time.

    Attributes:
        console: the guest's first serial port.
        stopped_fd: an eventfd that becomes readable when the machine has stopped.
        ram: what is known of the guest's RAM.

    Raises:
        OffmapError: this host cannot make it or not confine it, or a file is no good.
    """

    def __init__(
        self,
        config: MachineConfig,
        output: Callable[[bytes], None],
        *,
        on_open: Callable[[], None] = lambda: None,
        on_event: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
        sandbox: bool = True,
        fds: Sequence[int] = (),
    ) -> None:
        self.config = config
        self._output, self._on_open, self._on_event, self._say = output, on_open, on_event, say
        self._changed = threading.Condition(threading.RLock())  # of all below
        self._asking = threading.Lock()
        self._answer: records.Answered | None = None
        self._built: RamFacts | None = None
        self._stop: Stop | None = None
        self._asked: Stop | None = None
        self._ended = self._refused = False
        self._under_way = 0
        self.stopped_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._process = VmProcess("offmap.vmm.served:serve", (config, sandbox), self._hear, self._end, fds)
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._built is not None or self._ended)
                if self._built is None:
                    raise (self._stop and self._stop.error) or OffmapError("the VM's process has ended")
            except BaseException:
                self._process.close()
                raise
        except BaseException:
            os.close(self.stopped_fd)
            raise
        self.ram: RamFacts = self._built
        self.console: Console = Console(self._type)

    @property
    def pid(self) -> int:
        """The process that the guest runs in."""
        return self._process.pid

    @property
    def stopped(self) -> Stop | None:
        """How it ended, or None while it runs."""
        return self._stop

    def start(self) -> None:
        """Confine the process, and let the guest run. To be called once; one that has been stopped before never runs.

        Raises:
            OffmapError: it has been started before, or the process cannot be confined, which ends the machine.
        """
        self._ask(records.Start(), "started")

    def pause(self) -> bool:
        """Have vCPUs and devices stand still; when this returns, none of them touches guest memory.

        It takes as long as a device needs that waits for the host. A machine that is paused already stays so.

        Returns:
            False where the machine has stopped, now or before.

        Raises:
            OffmapError: it has not been started.
        """
        return self._ask(records.Pause(), "paused")

    def resume(self) -> None:
        """Go on after `pause`; where it is not paused, or has stopped, do nothing."""
        self._ask(records.Resume(), "resumed")

    def stop(self, outcome: Outcome = Outcome.QUIT, error: OffmapError | None = None) -> None:
        """Stop it, paused or not; the first call decides what the end was. On any thread, at any time. Does not wait.

        Args:
            outcome, error: what `stopped` is to say.
        """
        with self._changed:
            self._asked = self._asked or Stop(outcome, error)
        self._process.send(records.Halt())

    def _ask(self, request: records.ToVm, what: str) -> bool:
        """Have the process do something; whether the machine runs afterwards."""
        if self._process.on_its_thread:
            raise OffmapError(f"a machine cannot be {what} by one of its callbacks", "do it on another thread")
        with self._asking, self._changed:
            self._answer = None
            if self._ended or not self._process.send(request):
                return False
            self._changed.wait_for(lambda: self._answer is not None or self._ended)
            answer: records.Answered | None = self._answer
            if answer is None:
                return False  # `stopped` says why
            if answer.failure is not None:
                raise answer.failure.error()
            return answer.running

    def _type(self, data: bytes) -> int:
        with self._changed:
            count = min(len(data), records.MOST_TYPED - self._under_way)
            if count <= 0 or not self._process.send(records.Typed(data[:count])):
                count = 0
            self._refused = count < len(data)
            self._under_way += count
            return count

    def _hear(self, record: records.FromVm) -> None:
        """Take what the process says, on the thread that hears it."""
        match record:
            case records.Output(data):
                self._output(data)
            case records.Opened():
                self._on_open()
            case records.Said(line):
                self._say(line)
            case records.Taken(count):
                with self._changed:
                    self._under_way -= min(max(count, 0), self._under_way)
                    refused, self._refused = self._refused, False
                if refused:
                    self._on_event()
            case records.Stopped(outcome, failure):
                with self._changed:
                    asked = self._asked if outcome is Outcome.QUIT else None
                self._has_stopped(asked or Stop(outcome, failure.error() if failure else None))
            case _:
                with self._changed:
                    if isinstance(record, records.Built):
                        self._built = record.ram
                    elif isinstance(record, records.Answered):
                        self._answer = record
                    self._changed.notify_all()

    def _has_stopped(self, stop: Stop) -> None:
        with self._changed:
            first = self._stop is None
            self._stop = self._stop or stop
            self._changed.notify_all()
        if first:
            os.eventfd_write(self.stopped_fd, 1)
            self._on_event()

    def _end(self, error: OffmapError | None) -> None:
        """The process has ended."""
        try:
            self._has_stopped(Stop(Outcome.FAILED, error) if error else self._asked or Stop(Outcome.QUIT))
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def close(self) -> None:
        """Stop it if it runs, end its process, and wait until that has given back all it had.

        Raises:
            OffmapError: this is one of its callbacks.
        """
        if self._process.on_its_thread:
            raise OffmapError("a machine cannot be closed by one of its callbacks", "stop it there")
        self._process.close()
        if self.stopped_fd >= 0:
            os.close(self.stopped_fd)
            self.stopped_fd = -1


class Console:
    """The guest's first serial port, for input."""

    def __init__(self, type_: Callable[[bytes], int]) -> None:
        self._type = type_

    def feed(self, data: bytes) -> int:
        """Send ``data`` to the guest. Return how many bytes were taken; `on_event` says when to offer the rest."""
        return self._type(data)
