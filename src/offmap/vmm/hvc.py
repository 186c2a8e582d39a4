"""The guest's hvc0 at this process's terminal: a virtio console with its input, its output, and the terminal's size."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from offmap.devices.virtio.console import Console
from offmap.devices.virtio.console_port import Port
from offmap.devices.virtio.device import Surroundings
from offmap.owned import Owned


class Hvc(Owned):
    """A device spec, and the user's end of what it makes. To be closed after the machine that it is a device of.

    Args:
        output: the fd that takes what the guest writes; stays the caller's.
        terminal: the fd of the terminal whose size the guest is told; where it is none, no size is.
        on_open: the guest has opened its console, or begins to write to it; called on the device's thread.
        on_close: it has no console any more, as its driver has gone (which may open it again); likewise.
        on_error: writing to `output` failed; likewise.

    Attributes:
        input_fd: poll(2) says that it can be written to when `feed` has room.
    """

    def __init__(
        self,
        output: int,
        terminal: int,
        *,
        on_open: Callable[[], None],
        on_close: Callable[[], None],
        on_error: Callable[[OSError], None],
    ) -> None:
        self._terminal = terminal
        # Its end is never the guest's: a serial line has none either, and the guest goes on without input.
        self._input, self.input_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._console = Console(
            [
                Port(
                    input=self._input,
                    output=output,
                    console=True,
                    on_open=on_open,
                    on_close=on_close,
                    on_error=on_error,
                )
            ]
        )

    def build(self, _surroundings: Surroundings) -> Console:
        """Give the device; to be called once."""
        self._tell_size()
        return self._console

    def feed(self, data: bytes) -> int:
        """Send it to the guest, for which it waits until the guest reads; how many bytes were taken."""
        try:
            return os.write(self.input_fd, data)
        except BlockingIOError:
            return 0

    @contextlib.contextmanager
    def following_the_size(self) -> Iterator[None]:
        """While open, the guest is told of each change of the terminal's size. On the main thread only."""
        saved = signal.signal(signal.SIGWINCH, lambda *_: self._tell_size())
        try:
            self._tell_size()  # it may have changed before
            yield
        finally:
            signal.signal(signal.SIGWINCH, saved)

    def _tell_size(self) -> None:
        with contextlib.suppress(OSError):  # no terminal
            size = os.get_terminal_size(self._terminal)
            self._console.resize(size.columns, size.lines)

    def close(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            os.close(self.input_fd)
            self._input = -1
