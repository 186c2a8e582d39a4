"""Audits of a wrapped VMM, each in a process of its own, so that the supervisor stays small."""

import os
import subprocess
import sys
from dataclasses import dataclass

from offmap.errors import ExitStatus
from offmap.owned import Owned


@dataclass(frozen=True, slots=True)
class Answer:
    """What an audit said.

    Attributes:
        line: for the user.
        exposed: the host kernel can reach the guest's RAM.
    """

    line: str
    exposed: bool


class Audit(Owned):
    """An audit that runs. Poll `fd`: POLLIN when it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._child = subprocess.Popen(
            [sys.executable, "-m", "offmap", "audit", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.fd = os.pidfd_open(self._child.pid)

    def answer(self) -> Answer:
        """What it said."""
        said, _ = self._child.communicate()
        return answer_of(self._child.returncode, said, self.pid)

    def close(self) -> None:
        if self.fd >= 0:
            if self._child.poll() is None:
                self._child.kill()
                self._child.communicate()
            os.close(self.fd)
            self.fd = -1


def answer_of(status: int, said: str, pid: int) -> Answer:
    """What an audit's exit status and output mean. Nothing but an audit that ended with "hidden" says so."""
    lines = said.strip().splitlines() or ["it said nothing"]
    if status in {ExitStatus.DONE, ExitStatus.EXPOSED}:
        return Answer(lines[0], status == ExitStatus.EXPOSED)
    reason = lines[0] if status == ExitStatus.UNDETERMINED else lines[-1]
    return Answer(f"placed, not audited: {reason.removeprefix('offmap audit: ')} (again: offmap audit {pid})", False)
