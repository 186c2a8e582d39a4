"""How long to wait: by what a process does, and where only time can tell, by how fast this machine is.

A process that runs, or would if a processor were free, makes progress; so does one that says something. One that does
neither is stuck. One that runs for long without a word is stuck too: how long is counted in its own processor time.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess  # imported where it is used: not every guest's start has to wait for it

TICK = 0.5  # seconds between two looks at a process
SPIN_SECONDS = 90.0  # processor time without a word; a boot takes 5, all of it silent
IDLE_SECONDS = 20.0  # of neither running nor wanting to
_REFERENCE = 0.0165  # seconds that _work() took on the machine on which limits were chosen, while it was idle
_ROUNDS = 2


@dataclass(frozen=True)
class Calibration:
    """How this machine compares to the one on which limits were chosen.

    Attributes:
        slowness: how many times as much processor time a piece of work takes, at least 1.
        stretch: how many times as long it takes by the clock, beside all else that runs now; at least `slowness`.
    """

    slowness: float
    stretch: float

    def __str__(self) -> str:
        return (
            f"limits are {self.stretch:.1f} times those of the machine they were chosen on"
            f" (processor {self.slowness:.1f} times as slow, the rest for what else runs here)"
        )


def calibration() -> Calibration:
    """Say how fast this machine is now: its processor, measured once in a process (35 ms), and what else runs."""
    slowness = _slowness()
    return Calibration(slowness, slowness * _crowding())


@cache
def _slowness() -> float:
    began = time.thread_time()
    for _ in range(_ROUNDS):
        _work()
    return max(1.0, (time.thread_time() - began) / _ROUNDS / _REFERENCE)


def _crowding() -> float:
    """Return how many times as long one thread takes because of others that want a processor, at least 1.

    Timing a short piece of work would not tell: who comes new is served first.
    """
    try:
        words = Path("/proc/loadavg").read_text().split()  # proc(5): averages, runnable now / all
        others = max(float(words[0]), int(words[3].partition("/")[0]) - 1)
    except (OSError, ValueError, IndexError):
        return 1.0
    return 1.0 + others / (os.cpu_count() or 1)


def scaled(seconds: float) -> float:
    """Return a time limit in seconds, scaled from an idle, fast machine to this one under its present load."""
    return seconds * calibration().stretch


def ends_within(process: "subprocess.Popen[Any]", seconds: float) -> bool:  # of text or of bytes
    """Say whether a child of ours ends within a limit, which is `scaled` for one that takes longer."""
    import subprocess

    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        try:
            process.wait(scaled(seconds) - seconds)
        except subprocess.TimeoutExpired:
            return False
    return True


def _work() -> int:
    total = 0
    for number in range(200_000):
        total = (total + number * number) & 0xFFFF
    return total


class Deadline:
    """A limit that a user has set, in seconds of the clock from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until it passes; 0 once it has."""
        return max(0.0, self._at - time.monotonic())


class Watch:
    """Tells whether a process is stuck; to be asked every `TICK`.

    Args:
        pid: returns its process id, or None while there is none.
        words: returns a number that grows whenever it says something.
    """

    def __init__(self, pid: Callable[[], int | None], words: Callable[[], int]) -> None:
        self._pid = pid
        self._words = words
        self._seen = (words(), _activity(pid()))
        self._looked = time.monotonic()
        self.spun = 0.0  # processor seconds since its last word
        self.idled = 0.0  # seconds of doing nothing since its last word

    def stuck(self) -> str:
        """Say in which way it is stuck; an empty string while it is not."""
        now, words, activity = time.monotonic(), self._words(), _activity(self._pid())
        passed, self._looked = now - self._looked, now
        said, before = self._seen
        self._seen = (words, activity)
        if words != said:
            self.spun = self.idled = 0.0
            return ""
        ran = max(0.0, activity.ran - before.ran)
        self.spun += ran
        waited = max(0.0, activity.waited - before.waited)
        if not activity.on_disk:
            self.idled += max(0.0, passed - ran - waited)
        if self.spun > SPIN_SECONDS * _slowness():
            return f"it used {self.spun:.0f} s of processor time without a word"
        if self.idled > IDLE_SECONDS * _slowness():
            return f"it did nothing for {self.idled:.0f} s"
        return ""


def processor_seconds(pid: int | None) -> float:
    """Return the processor time that a process's threads have used."""
    return _activity(pid).ran


@dataclass(frozen=True)
class _Activity:
    ran: float = 0.0  # seconds on a processor, all threads
    waited: float = 0.0  # seconds of waiting for one
    on_disk: bool = False  # a thread is in an uninterruptible wait now


def _activity(pid: int | None) -> _Activity:
    ran = waited = 0
    on_disk = False
    for task in Path(f"/proc/{pid}/task").glob("*") if pid is not None else ():
        try:
            figures = (task / "schedstat").read_text().split()  # Documentation/scheduler/sched-stats.rst
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended
            continue
        ran += int(figures[0])
        waited += int(figures[1])
        on_disk = on_disk or state == "D"
    return _Activity(ran / 1e9, waited / 1e9, on_disk)
