"""The user's end of the console: standard input and output, the terminal's raw mode, the escape key."""

import contextlib
import os
import sys
from enum import Enum
from types import TracebackType

from offmap.typed import Self

_CTRL_A = 0x01


class Typed(Enum):
    """What the user asked for with the escape key."""

    NOTHING = "nothing"
    QUIT = "quit"
    HELP = "help"


class EscapeKey:
    """Ctrl-A, as QEMU and GNU screen have it: then ``x`` quits, ``h`` helps, and ``a`` or Ctrl-A is one Ctrl-A."""

    def __init__(self) -> None:
        self._armed = False

    def filter(self, data: bytes) -> tuple[bytes, Typed]:
        """The bytes that are for the guest, and what else was asked for. What follows a quit is dropped."""
        passed = bytearray()
        asked = Typed.NOTHING
        for byte in data:
            if self._armed:
                self._armed = False
                match byte:
                    case 0x78:  # x
                        return bytes(passed), Typed.QUIT
                    case 0x68 | 0x3F:  # h, ?
                        asked = Typed.HELP
                    case 0x61 | 0x01:  # a
                        passed.append(_CTRL_A)
                    case _:
                        passed += bytes((_CTRL_A, byte))
            elif byte == _CTRL_A:
                self._armed = True
            else:
                passed.append(byte)
        return bytes(passed), asked


class RawTerminal:
    """While open, standard input passes every key to the guest unprocessed; afterwards it is as it was.

    Output processing stays on, so that our own messages on the same terminal still end their lines.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = sys.stdin.fileno() if fd is None else fd
        self._saved: list[object] | None = None

    def __enter__(self) -> Self:
        if os.isatty(self._fd):
            import termios  # a guest without a terminal need not wait for these
            import tty

            self._saved = termios.tcgetattr(self._fd)
            tty.setraw(self._fd, termios.TCSADRAIN)
            raw = termios.tcgetattr(self._fd)
            raw[1] |= termios.OPOST | termios.ONLCR
            termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._saved is not None:
            import termios

            with contextlib.suppress(termios.error):  # the terminal has gone: there is nothing to restore
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
