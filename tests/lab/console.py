"""``offmap run`` in a disposable host, with a test at its console."""

import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from offmap.lab.host import LabHost
from offmap.lab.qemu import NO_SELF_TESTS
from offmap.patience import scaled

__all__ = ["CMDLINE", "PATIENCE", "Guest"]

CMDLINE = f"console=ttyS0 quiet {NO_SELF_TESTS}"
PATIENCE = 120.0  # seconds, to be scaled, for what takes 10 on an idle machine
PRINT_PID = ("sh", "-c", 'echo "pid $$" >&2; exec "$@"', "sh")


class Guest:
    """A VMM in the host; a context manager that leaves none there.

    Args:
        options: of ``offmap run``.
        kernel: the guest's; None where `options` name an image.
        wrapper: a command to run the VMM by.
    """

    def __init__(self, host: LabHost, kernel: Path | None, *options: str, wrapper: Sequence[str] = ()) -> None:
        self._console = bytearray()
        self._errors = bytearray()
        self._heard = threading.Condition()
        self._seen = 0
        boot = [] if kernel is None else ["--kernel", str(kernel)]
        argv = [*wrapper, *PRINT_PID, sys.executable, "-m", "offmap", "run", *boot, *options]
        self.command = host.popen(argv, stdout=self._take_output, stderr=self._take_error, keep_stdin=True)

    def _take_output(self, data: bytes) -> None:
        with self._heard:
            self._console += data
            self._heard.notify_all()

    def _take_error(self, data: bytes) -> None:
        with self._heard:
            self._errors += data
            self._heard.notify_all()

    @property
    def errors(self) -> str:
        """What it has said beside its console, without the line that `pid` is from."""
        return re.sub(r"^pid \d+\n", "", self._errors.decode())

    @property
    def pid(self) -> int:
        """The VMM's process in the host."""
        return int(self.expect_error(r"^pid (\d+)\n")[1])

    def _await(self, text: bytearray, pattern: bytes, start: int, seconds: float) -> re.Match[bytes]:
        deadline = time.monotonic() + scaled(seconds)
        search = re.compile(pattern, re.DOTALL | re.MULTILINE).search
        with self._heard:
            # In a copy: a bytearray cannot grow while a match of it is held.
            while (match := search(bytes(text), start)) is None:
                left = deadline - time.monotonic()
                assert left > 0 and not self.command.ended, (pattern, bytes(text[start:]), bytes(self._errors))
                self._heard.wait(min(left, 1.0))
        return match

    def expect(self, pattern: str, seconds: float = PATIENCE) -> str:
        """Wait until the console has said this after what was waited for last; return it (or its first group)."""
        match = self._await(self._console, pattern.encode(), self._seen, seconds)
        self._seen = match.end()
        return match[match.lastindex or 0].decode(errors="replace")

    def expect_error(self, pattern: str, seconds: float = PATIENCE) -> re.Match[bytes]:
        """Wait until it has said this on standard error."""
        return self._await(self._errors, pattern.encode(), 0, seconds)

    def keys(self, text: str) -> None:
        """Type at the console."""
        self.command.write(text.encode())

    def shell(self, line: str, seconds: float = PATIENCE) -> str:
        """Run a line in the guest's shell; return what it printed."""
        # The echo of what is typed never shows the markers, as their halves are apart in it.
        self.keys(f'echo "<""<"; {line}; echo ">"">"\n')
        return self.expect(r"<<\r\n(.*?)>>", seconds).replace("\r\n", "\n").strip()

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait until the VMM has ended; return its status."""
        return self.command.wait(scaled(seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.command.ended:
            self.command.kill()
