"""A VMM under attack by its guest (payloads/attack.c), and one whose guest is left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from offmap.owned import Owned

__all__ = ["Vmm", "attacked_devices"]

_RUN = [sys.executable, "-m", "offmap", "run"]


def attacked_devices(folder: Path, memory: str = "memfd", nets: Sequence[str] = ()) -> list[str]:
    """Options: a device of each kind that needs nothing of the host, and cards; makes a drive's image in `folder`."""
    image = folder / "attacked.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    options = ["--memory", memory, "--memory-size", "128M", "--drive", str(image), "--rng"]
    if memory == "memfd":  # others cannot give pages back
        options += ["--balloon", "size=8M"]
    for net in nets:
        options += ["--net", net]
    return [*options, "--vsock", f"cid=3,path={folder / 'attacked.sock'}"]


class Vmm(Owned):
    """``offmap run`` of a payload.

    Attributes:
        output: what its guest has said so far.
    """

    def __init__(self, payload: Path, options: Sequence[str] = ("--memory-size", "64M")) -> None:
        self.output = b""
        self._process = subprocess.Popen(
            [*_RUN, "--kernel", str(payload), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid

    def expect(self, what: bytes, times: int = 1) -> None:
        """Wait until the guest has said `what` so often more. Raises AssertionError: it ended before."""
        assert self._process.stdout is not None
        wanted = self.output.count(what) + times
        while self.output.count(what) < wanted:
            data = os.read(self._process.stdout.fileno(), 4096)
            assert data, self.ended()
            self.output += data

    def keys(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def own_memory(self) -> int:
        """Bytes of the process's anonymous memory; its guest's is shared memory."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) << 10

    def terminate(self) -> tuple[float, int, str]:
        """End it by SIGTERM: how many seconds that took, and its status and words as `ended` has them."""
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        status, errors = self.ended()
        return time.monotonic() - began, status, errors

    def ended(self) -> tuple[int, str]:
        """Its status and what it said to the user, once it has ended."""
        output, errors = self._process.communicate()
        self.output += output
        return self._process.returncode, errors.decode()

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
