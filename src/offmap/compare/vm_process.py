"""A VMM in its own process, and its guest's console: to read, and to type at."""

import json
import os
import re
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from offmap.compare.vmm_command import REPORT
from offmap.patience import ends_within, scaled

END_DEADLINE = 30.0  # seconds
_NEVER = re.compile(r"(?!)")


class VmProcess:
    """A VMM as a process of its own, the guest's console on pipes; a context manager that leaves none behind.

    Args:
        argv: what to run.
        folder: gets its standard error, and the report that `offmap run` writes.
    """

    def __init__(self, argv: Sequence[str], folder: Path) -> None:
        self._argv = list(argv)
        self._errors = folder / "stderr"
        self._report = folder / REPORT
        self._console = bytearray()

    def __enter__(self) -> Self:
        with self._errors.open("wb") as errors:
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            if not ends_within(self._process, END_DEADLINE):
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: re.Pattern[str], seconds: float) -> str:
        """Read the console until it matches, ends, or `seconds` have passed; returns all it said so far."""
        deadline = time.monotonic() + seconds
        console = self._process.stdout
        if console is None:
            return ""
        with selectors.DefaultSelector() as selector:
            selector.register(console, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0 and selector.select(left):
                data = os.read(console.fileno(), 65536)
                self._console += data
                if not data:
                    self._process.wait()
                    break
                if pattern.search(self._text()):
                    break
        return self._text()

    def _text(self) -> str:
        return self._console.decode(errors="replace")

    def wait(self) -> int | None:
        """Read the console to its end; the VMM's exit status, or None if it did not end in time."""
        self.wait_for(_NEVER, scaled(END_DEADLINE))
        return self.status()

    def status(self) -> int | None:
        return self._process.poll()

    def complaint(self) -> str:
        """The VMM's last line on standard error, without the command's name."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("offmap run: ") if lines else ""

    def populate_seconds(self) -> float | None:
        """How long the VMM took to get its guest's RAM, as it wrote down at its end; None where it did not."""
        try:
            seconds: float = json.loads(self._report.read_text())["populate_seconds"]
        except (OSError, ValueError, KeyError):
            return None
        return seconds
