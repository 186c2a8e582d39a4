"""VMMs that are killed at any moment, run in a disposable host: ``kill_target.py KILLS COMMAND…``, ``offmap run …``.

All but the first are forks of a process that has imported what the first one did: an emulated host takes seconds for
that, in which a VMM holds nothing yet. Prints JSON: of each kill, whether memory was out, and whether the guest was
ready.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import offmap.cli.main
from offmap.compare.guest import READY
from offmap.patience import scaled

HOLDERS = Path("/sys/class/misc/offmap/holders")
PATIENCE = 120.0  # seconds on an idle machine


class Vmm:
    """A VMM whose output is listened to.

    Args:
        start: starts it with these as its input and its output, and returns its process.
    """

    def __init__(self, start: Callable[[int, int], int]) -> None:
        theirs, self._input = os.pipe()
        self._output, said = os.pipe()
        self.heard = b""
        self.began = time.monotonic()
        self._pid = start(theirs, said)
        os.close(theirs)
        os.close(said)

    def listen(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Hear what it says for so long, or until it has ended or there is enough of it."""
        ends = time.monotonic() + seconds
        while not enough() and (left := ends - time.monotonic()) > 0:
            if select.select([self._output], [], [], left)[0]:
                if not (data := os.read(self._output, 1 << 16)):
                    return
                self.heard += data

    def await_(self, enough: Callable[[], bool], step: float = PATIENCE) -> float:
        """Wait for something, and look every ``step`` seconds; how long it took from the start."""
        ends = time.monotonic() + scaled(PATIENCE)
        while not enough():
            if time.monotonic() > ends:
                raise SystemExit(self.heard.decode(errors="replace"))
            self.listen(step, enough)
        return time.monotonic() - self.began

    def is_ready(self) -> bool:
        return READY.encode() in self.heard

    def kill(self) -> tuple[bool, bool]:
        """Kill it, and wait until nobody has its output any more; what it was killed in."""
        stage = bool(HOLDERS.read_text()), self.is_ready()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self.listen(scaled(PATIENCE))
        os.close(self._input)
        os.close(self._output)
        return stage


def has_memory() -> bool:
    return bool(HOLDERS.read_text())


def whole(command: Sequence[str]) -> tuple[float, list[str]]:
    """Start one as anybody does: for how long its guest boots, in seconds, and what it imports."""
    tracing = [sys.executable, "-X", "importtime", *command]
    vmm = Vmm(lambda theirs, said: subprocess.Popen(tracing, stdin=theirs, stdout=said, stderr=said).pid)
    had = vmm.await_(has_memory, 0.05)
    ready = vmm.await_(vmm.is_ready)
    vmm.kill()
    lines = vmm.heard.decode(errors="replace").splitlines()
    return ready - had, [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]


def fork(command: Sequence[str]) -> Vmm:
    """Start one in a process that has imported everything."""

    def start(theirs: int, said: int) -> int:
        if pid := os.fork():
            return pid
        try:
            os.setsid()
            for place, fd in enumerate((theirs, said, said)):
                os.dup2(fd, place)
            os.closerange(3, 1 << 10)
            sys.argv = ["offmap", *command]
            offmap.cli.main.main(command)
        finally:
            os._exit(1)

    return Vmm(start)


def main() -> int:
    kills, command = int(sys.argv[1]), sys.argv[2:]
    boots, imported = whole(["-m", "offmap", *command])
    for name in imported:
        with suppress(ImportError):  # what is named in a file that runs as __main__, for one
            import_module(name)
    first = fork(command)
    had = first.await_(has_memory, 0.01)
    stages = [first.kill()]
    chance = random.Random(7)
    late = kills // 4
    for number in range(1, kills):
        vmm = fork(command)
        if number < kills - late:  # most around the time when it gets its memory
            vmm.listen(chance.uniform(0, 1.5 * had))
        else:
            vmm.await_(has_memory, 0.01)
            vmm.listen(chance.uniform(0, 1.1 * (had + boots) - had))
        stages.append(vmm.kill())
    print(json.dumps({"stages": stages, "had": had, "boots": boots}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
