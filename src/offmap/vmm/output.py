"""The guest's console output. It waits for a slow reader while the guest lives, and no longer.

A vCPU's thread may write to a pipe that nobody reads. It must still end with a SIGTERM, and Python retries what a
signal interrupts. So no write blocks: pipes and terminals are opened a second time, non-blocking, as the flag belongs
to the open file, which our standard output shares with the shell. Waiting is a poll(2) that also listens for `abandon`.
"""

import os
import select
import stat

from offmap.owned import Owned


class ConsoleOutput(Owned):
    """Writes to the open file `fd`, which stays the caller's. Any thread may write, one at a time."""

    def __init__(self, fd: int) -> None:
        self._given = fd
        self._abandoned = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.fd = reopened(fd)
        # A socket, or a file that cannot be opened again: once poll(2) says so, it takes at least one line.
        self._ask_first = self.fd == fd and not stat.S_ISREG(os.fstat(fd).st_mode)

    def write(self, data: bytes) -> None:
        """Write all of it, or once abandoned as much as there is room for. Raises OSError: it cannot be written."""
        view = memoryview(data)
        waits = self._ask_first
        while view:
            if waits and not self._wait():
                return
            try:
                view = view[os.write(self.fd, view) :]
                waits = self._ask_first
            except BlockingIOError:
                waits = True

    def ready(self) -> bool:
        """Whether a line can be written now."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))

    def abandon(self) -> None:
        """From now on wait for nobody; wakes those who do. May be called from a signal handler."""
        os.eventfd_write(self._abandoned, 1)

    def _wait(self) -> bool:
        """Wait until it can be written to. False if it cannot, and has been abandoned."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        poll.register(self._abandoned, select.POLLIN)
        return any(fd == self.fd for fd, _ in poll.poll())

    def close(self) -> None:
        if self._abandoned >= 0:
            os.close(self._abandoned)
            self._abandoned = -1
            if self.fd != self._given:
                os.close(self.fd)


def reopened(fd: int) -> int:
    """A non-blocking open file of our own for the same pipe or terminal; `fd` itself for anything else."""
    if not (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd)):
        return fd
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # the reader has gone, which the write will tell, or another user's terminal
        return fd
