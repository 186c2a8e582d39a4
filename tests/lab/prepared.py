"""Programs for a disposable host that start fast there: see prepared_target.py."""

import json
import sys
import threading
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from offmap.lab.host import LabHost
from offmap.patience import scaled

__all__ = ["Ran", "run"]

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    """What became of a program."""

    status: int
    stdout: str
    stderr: str


class _Prepared:
    """The process in a host; it ends with the host."""

    def __init__(self, host: LabHost) -> None:
        self._heard = bytearray()
        self._more = threading.Condition()
        argv = [sys.executable, "-m", "tests.lab.prepared_target"]
        self._command = host.popen(argv, stdout=self._hear, keep_stdin=True, cwd=ROOT)

    def _hear(self, data: bytes) -> None:
        with self._more:
            self._heard += data
            self._more.notify_all()

    def run(self, words: tuple[str, ...], seconds: float) -> Ran:
        self._command.write(json.dumps(words).encode() + b"\n")
        with self._more:
            said = self._more.wait_for(lambda: b"\n" in self._heard or self._command.ended, scaled(seconds))
            assert said and self._heard, f"no answer from {words}"
            line, _, rest = bytes(self._heard).partition(b"\n")
            self._heard[:] = rest
        return Ran(*json.loads(line))


_PREPARED: WeakKeyDictionary[LabHost, _Prepared] = WeakKeyDictionary()


def run(host: LabHost, *words: str, seconds: float = 120.0) -> Ran:
    """Run ``python -m WORDS…`` in a host.

    The interpreter and what the program imports are there already: that takes an emulated host seconds. For programs
    that are a means of a test, and not for those that it is about.

    Args:
        seconds: that it may take on an idle machine.
    """
    if host not in _PREPARED:
        _PREPARED[host] = _Prepared(host)
    return _PREPARED[host].run(words, seconds)
