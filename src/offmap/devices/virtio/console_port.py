"""One port of a virtio console: its files on the host, and how bytes get from and to them."""

import contextlib
import errno
import os
import select
import socket
import stat
from collections.abc import Callable, Sequence

from offmap.devices.virtio.iov import gather, length, scatter
from offmap.devices.virtio.queue import Chain, Queue
from offmap.typed import NamedTuple

IOV_MAX = 1024  # UIO_MAXIOV, linux/uio.h: what readv and writev take at once
_BOUNCE_SIZE = 64 << 10  # bytes that a pipe holds; a guest may describe as much room as it likes


class Port(NamedTuple):
    """One port.

    Attributes:
        name: what the guest finds it by; empty for none.
        input: fd of its input, owned by the caller. The guest sees its end of file. None: the port has no input.
        output: fd of its output, owned by the caller, preferably non-blocking. None: the output is lost.
        console: the port is an hvc console.
        last: its output waits until the output of all other ports is written.
        on_error: called once, on the device's thread, with the error of a write to `output`. Later output is lost.
        on_open: called on the device's thread when the guest opens the port or first writes to it. A kernel's console
            may print the log before its driver opens the port.
        on_close: called on the device's thread when an open port is closed, or its driver has gone.
    """

    name: str = ""
    input: int | None = None
    output: int | None = None
    console: bool = False
    last: bool = False
    on_error: Callable[[OSError], None] = lambda _: None
    on_open: Callable[[], None] = lambda: None
    on_close: Callable[[], None] = lambda: None


class Stream:
    """A port and its state."""

    def __init__(self, port: Port, number: int) -> None:
        self.port = port
        self.number = number
        self.open = False  # by the guest
        self.in_use = False  # opened or written to: what on_open and on_close were told
        self.input_ended = False
        self.output_failed = False
        self.input_queue: Queue | None = None
        self.output_queue: Queue | None = None
        self.unwritten: tuple[Chain, int] | None = None  # popped, and written up to there
        self.goes_on = False  # the rest is written once others have had their turn
        self.input_polls = port.input is not None and _polls(port.input)
        mode = 0 if port.output is None else os.fstat(port.output).st_mode
        self.peer: socket.socket | None = None  # the output, where it is a socket
        if port.output is not None and stat.S_ISSOCK(mode):
            self.peer = socket.socket(fileno=os.dup(port.output))
        # What could not be opened anew to be non-blocking, such as another user's terminal.
        waits = not stat.S_ISSOCK(mode) and not stat.S_ISREG(mode)
        self.output_blocks = port.output is not None and waits and os.get_blocking(port.output)

    def use(self, in_use: bool) -> None:
        if self.in_use != in_use:
            self.in_use = in_use
            (self.port.on_open if in_use else self.port.on_close)()

    def close(self) -> None:
        if self.peer is not None:
            self.peer.close()

    def forget(self) -> None:
        self.use(False)
        self.open = False
        self.input_queue = self.output_queue = self.unwritten = None


def _polls(fd: int) -> bool:
    """Whether epoll takes it: not so regular files, which never make one wait."""
    with select.epoll() as epoll, contextlib.suppress(PermissionError):
        epoll.register(fd)
        return True
    return False


def read_into(fd: int, buffers: Sequence[memoryview]) -> int:
    """Read from `fd` into the buffers; return how many bytes."""
    try:
        return os.readv(fd, buffers[:IOV_MAX])
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
    # Some file systems read by GUP (uncached 9p), which hidden RAM refuses.
    with memoryview(bytearray(min(length(buffers), _BOUNCE_SIZE))) as bounce:
        size = os.readv(fd, [bounce])
        scatter(bounce[:size], buffers)
        bounce[:size] = bytes(size)
    return size


def write_from(fd: int, buffers: Sequence[memoryview]) -> int:
    """Write the buffers to `fd`; return how many bytes were written."""
    try:
        return os.writev(fd, buffers)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
    with memoryview(bytearray(min(length(buffers), _BOUNCE_SIZE))) as bounce:
        gather(buffers, bounce)
        try:
            return os.write(fd, bounce)
        finally:
            bounce[:] = bytes(len(bounce))
