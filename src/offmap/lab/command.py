"""A command running in a disposable host, seen from outside: its streams, signals and exit status."""

import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offmap.lab.errors import LabError, LabTimeout
from offmap.lab.guest.frames import (
    ACK,
    EXIT,
    FAILED,
    MAX_PAYLOAD,
    RESIZE,
    SIGNAL,
    STDERR,
    STDIN,
    STDIN_EOF,
    STDOUT,
    WINDOW,
    Start,
    encode_start,
    i32,
    to_i32,
)
from offmap.patience import scaled

Sink = int | Callable[[bytes], object]  # a file descriptor, or what to call with each piece
KILL_GRACE_SECONDS = 10.0  # from SIGKILL to the report of the end; longer means that the host itself hangs
_HEAR_SECONDS = 1.0
SIGPIPE = 13
SIGKILL = 9


def _join(thread: threading.Thread) -> None:
    """Wait for its end, in short waits, as `LabCommand` does for the command's: its sink may take nothing."""
    while thread.is_alive():
        thread.join(_HEAR_SECONDS)


@dataclass(frozen=True)
class Completed:
    """A command that has ended: its exit status and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


def start_message(
    argv: Sequence[str | os.PathLike[str]],
    environment: Mapping[str, str],
    cwd: str | os.PathLike[str] | None,
    terminal: tuple[int, int] | None,
) -> bytes:
    """Return the payload of a START. Raises LabError: no process can be started with these words."""
    words = [os.fsencode(word) for word in argv]
    if not words:
        raise LabError("no command to run", "write it after --")
    pairs = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
    try:
        return encode_start(Start(words, pairs, os.fsencode(cwd or Path.cwd()), terminal))
    except ValueError as error:
        raise LabError(f"cannot run {argv[0]!r}: {error}") from error


class Link(Protocol):
    """What a command needs of its host."""

    def send(self, kind: int, channel: int, payload: bytes = b"") -> None:
        """Send one frame."""

    def failure(self) -> LabError:
        """Say why the host has ended."""

    def doing(self) -> str:
        """Say what the host has done lately."""

    def kill(self) -> None:
        """End the host now."""


class _Pump:
    """Writes one output stream to its sink in a thread of its own, so that a slow sink holds up nothing else."""

    def __init__(self, command: "LabCommand", kind: int, sink: Sink) -> None:
        self.command = command
        self.kind = kind
        self.sink = sink
        self.error: Exception | None = None
        self.queue: deque[bytes | None] = deque()
        self.filled = threading.Condition()
        self.thread = threading.Thread(target=self._run, name=f"lab-output-{kind}", daemon=True)
        self.thread.start()

    def put(self, data: bytes | None) -> None:
        """Queue a piece; None for the end."""
        with self.filled:
            self.queue.append(data)
            self.filled.notify()

    def _run(self) -> None:
        while True:
            with self.filled:
                while not self.queue:
                    self.filled.wait()
                data = self.queue.popleft()
            if data is None:
                return
            if self.error is None:
                try:
                    self._write(data)
                except Exception as error:  # whatever a callable raises is raised again by wait()
                    self.error = error
                    # As a pipe whose reader is gone does to its writer.
                    self.command.send_signal(SIGPIPE)
            self.command.acknowledge(self.kind, len(data))

    def _write(self, data: bytes) -> None:
        if not isinstance(self.sink, int):
            self.sink(data)
            return
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.sink, view) :]
            except BlockingIOError:  # we were given a non-blocking descriptor
                select.select([], [self.sink], [])


class LabCommand:
    """A started command; made by `LabHost.popen`.

    Args:
        link: its host.
        channel: its number.
        name: what it is called in messages.
        stdout, stderr: where its output goes.
        stdin: bytes, a file descriptor to read from, or None for none at all.
        keep_stdin: leave its input open for `write` (with ``stdin=None``).
    """

    def __init__(
        self,
        link: Link,
        channel: int,
        name: str,
        stdout: Sink,
        stderr: Sink,
        stdin: bytes | int | None = None,
        keep_stdin: bool = False,
    ) -> None:
        self.channel = channel
        self.name = name
        self._link = link
        self._source = stdin
        self._keep_stdin = keep_stdin
        self._status: int | None = None
        self._start_errno = 0
        self._in_folder = 1
        self._over = threading.Event()  # ended, or its host did
        self._when_over: Callable[[], object] | None = None
        self._credit = WINDOW
        self._credit_given = threading.Condition()
        self._wake: tuple[int, int] | None = (
            os.pipe() if isinstance(stdin, int) else None
        )  # ends the reader of our input
        self._ending = threading.Lock()
        self._pumps = {STDOUT: _Pump(self, STDOUT, stdout), STDERR: _Pump(self, STDERR, stderr)}
        self._stdin_thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start to forward the input; called once its START has been sent."""
        if isinstance(self._source, int):
            self._stdin_thread = threading.Thread(
                target=self._forward, args=(self._source,), name="lab-input", daemon=True
            )
        elif self._source is not None:
            self._stdin_thread = threading.Thread(
                target=self._feed, args=(self._source,), name="lab-input", daemon=True
            )
        elif not self._keep_stdin:
            self.close_stdin()
        if self._stdin_thread:
            self._stdin_thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._over.is_set()

    # Called by the host's reader.

    def deliver(self, kind: int, payload: bytes) -> None:
        """Take a frame from the host."""
        if kind in self._pumps:
            self._pumps[kind].put(payload)
        elif kind == ACK:
            with self._credit_given:
                self._credit += to_i32(payload[1:])[0]
                self._credit_given.notify_all()
        elif kind == EXIT:
            (status,) = to_i32(payload)
            self._status = status if status >= 0 else 128 - status
            self.abandon()
        elif kind == FAILED:
            self._start_errno, self._in_folder = to_i32(payload)
            self.abandon()

    def abandon(self) -> None:
        """Nothing more will come: let the waiting threads end."""
        with self._ending:
            if self._over.is_set():
                return
            for pump in self._pumps.values():
                pump.put(None)
            if self._wake:
                os.write(self._wake[1], b"x")
            self._over.set()
            call = self._when_over
        with self._credit_given:
            self._credit_given.notify_all()
        if call is not None:
            call()

    def acknowledge(self, kind: int, taken: int) -> None:
        """Give the host credit for more of a stream."""
        if not self._over.is_set():
            self._link.send(ACK, self.channel, bytes((kind,)) + i32(taken))

    # For the user.

    def when_over(self, call: Callable[[], object]) -> None:
        """Have ``call`` called when nothing more comes, perhaps from another thread; at once if that is so already."""
        with self._ending:
            self._when_over = call
            over = self._over.is_set()
        if over:
            call()

    def write(self, data: bytes) -> None:
        """Write to the command's input; blocks while the command does not read (for ``keep_stdin``)."""
        self._feed(data, end=False)

    def close_stdin(self) -> None:
        """End the command's input."""
        self._link.send(STDIN_EOF, self.channel)

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group; nothing happens if it has ended."""
        if not self._over.is_set():
            self._link.send(SIGNAL, self.channel, i32(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if not self._over.is_set():
            self._link.send(RESIZE, self.channel, i32(rows, columns))

    def poll(self) -> int | None:
        """Return the exit status, or None while the command runs."""
        return self._status

    def kill(self) -> None:
        """Kill the command, and its host if that does not help."""
        self.send_signal(SIGKILL)
        if not self._over.wait(scaled(KILL_GRACE_SECONDS)):
            self._link.kill()
            self._over.wait(scaled(KILL_GRACE_SECONDS))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit status, 128 and the number for a signal.

        Raises:
            LabPanic: the host panicked.
            LabEnded: the host ended in another way.
            LabTimeout: ``timeout`` seconds passed; the command has been killed.
            LabError: the command could not be started, or its output could not be written.
        """
        if not self._ends_in(timeout):
            doing = self._link.doing()
            self.kill()
            raise LabTimeout(
                f"{self.name} did not end in {timeout:g} s and was killed ({doing})", "allow more with --timeout"
            )
        for pump in self._pumps.values():
            _join(pump.thread)
        if self._stdin_thread:
            _join(self._stdin_thread)
        self._close_wake()
        if self._start_errno:
            what = f"run {self.name}" if self._in_folder else f"enter the folder in which to run {self.name}"
            raise LabError(f"cannot {what} in the lab host: {os.strerror(self._start_errno)}")
        for pump in self._pumps.values():
            if isinstance(pump.error, OSError) and not isinstance(pump.error, BrokenPipeError):
                raise LabError(f"cannot write the output of {self.name}: {pump.error.strerror}") from pump.error
            if pump.error is not None and not isinstance(pump.error, OSError):
                raise pump.error
        if self._status is None:
            raise self._link.failure()
        return self._status

    def _ends_in(self, seconds: float | None) -> bool:
        """Wait for the end, at most so long, and say whether it came.

        In short waits: a signal that comes just before one, or on another thread, is heard when that is over.
        """
        until = math.inf if seconds is None else time.monotonic() + seconds
        while not self._over.wait(max(min(until - time.monotonic(), _HEAR_SECONDS), 0)):
            if time.monotonic() >= until:
                return self._over.is_set()
        return True

    def _close_wake(self) -> None:
        with self._ending:
            for fd in self._wake or ():
                os.close(fd)
            self._wake = None

    def _feed(self, data: bytes, end: bool = True) -> None:
        view = memoryview(data)
        while view:
            with self._credit_given:
                while self._credit <= 0 and not self._over.is_set():
                    self._credit_given.wait()
                if self._over.is_set():
                    return
                piece = view[: min(self._credit, MAX_PAYLOAD)]
                self._credit -= len(piece)
            self._link.send(STDIN, self.channel, bytes(piece))
            view = view[len(piece) :]
        if end:
            self.close_stdin()

    def _forward(self, fd: int) -> None:
        """Read our own descriptor until its end, or the command's."""
        if self._wake is None:
            return
        wake = self._wake[0]
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        with suppress(OSError):
            poll.register(fd, select.POLLIN)
        while not self._over.is_set():
            ready = dict(poll.poll())
            if wake in ready:
                return
            try:
                data = b"" if fd < 0 or ready.get(fd, 0) & select.POLLNVAL else os.read(fd, MAX_PAYLOAD)
            except BlockingIOError:
                continue
            except OSError:  # closed, or a terminal of which we are not in the foreground any more
                data = b""
            if not data:
                self.close_stdin()
                return
            self._feed(data, end=False)
