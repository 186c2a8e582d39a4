"""A terminal as it was, to be restored once the program that changed it has gone."""

import contextlib
import fcntl
import os


class Terminal:
    """Remembers the state of a terminal.

    Args:
        fd: of the terminal.
    """

    def __init__(self, fd: int) -> None:
        import termios  # a guest without a terminal need not wait for it

        self._fd = fd
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        self._mode = termios.tcgetattr(fd)

    def restore(self) -> None:
        """Put it back, unless it is another program's by now: the shell's, which has its own idea of it."""
        import termios

        with contextlib.suppress(OSError, termios.error):  # it has gone
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags)
            if termios.tcgetattr(self._fd) != self._mode:
                termios.tcsetattr(self._fd, termios.TCSANOW, self._mode)
