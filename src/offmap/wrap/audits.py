"""Audits of a wrapped VMM, each in a process of its own, so that the supervisor stays small.

An audit takes seconds of processor time, and the guest is there meanwhile. So for some time it gets only what nobody
else wants (SCHED_IDLE, which is so for its reads as well); then it takes its share, however busy the host is.
"""

import os
import sys
import time

from offmap.owned import Owned
from offmap.wrap import signals as signal

TYPE_CHECKING = False  # the start does not wait for `enum`
if TYPE_CHECKING:
    from offmap.exit_status import ExitStatus

CLOCK_ALONE = 10
"""Exit status of ``judge``, beside those of ``offmap audit``: nothing is exposed but kvm-clock's page."""

NO_VM = 11
"""The process has no VM, by KVM's own list: nothing is hidden, and nothing exposed."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))  # noqa: PTH120 - where `offmap` is
_MOST = 1 << 20  # bytes of output that are read
_IDLE = 15.0  # seconds for which an audit gives way to all others
_LEAST, _USUAL = 19, 0  # nice values
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)  # by the supervisor


class Answer:
    """What an audit said.

    Attributes:
        line: for the user.
        status: hidden (DONE), EXPOSED, or UNDETERMINED, which is all else; None: there is no VM to be judged.
        clock_alone: of a guest that is exposed, nothing is but kvm-clock's page.
    """

    def __init__(self, line: str, status: "ExitStatus | None", *, clock_alone: bool = False) -> None:
        self.line = line
        self.status = status
        self.clock_alone = clock_alone


class Audit(Owned):
    """An audit that runs. Poll `fd`: POLLIN when it has ended. Call `hurry` after `patience` seconds.

    Raises:
        OSError: no more processes or files can be had.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._said = os.memfd_create("audit")
        # It finds all modules where this process did, which has left its folder.
        program = f"import sys; sys.path[:] = {[_PACKAGE, *sys.path]!r}; from offmap.wrap.judge import main; main()"
        try:
            self._child = os.posix_spawn(
                sys.executable,
                [sys.executable, "-c", program, str(pid)],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, self._said, 1), (os.POSIX_SPAWN_DUP2, self._said, 2)],
                setsigdef=_IGNORED,
                setsigmask=(),  # we block one
                setsid=True,
            )
        except OSError:
            os.close(self._said)
            raise
        self.fd = os.pidfd_open(self._child)
        self._yields_until: float | None = time.monotonic() + _IDLE
        self._schedule(os.SCHED_IDLE, _LEAST)

    def patience(self) -> float | None:
        """The seconds for which it gives way to others still; None: it does not."""
        return None if self._yields_until is None else max(0.0, self._yields_until - time.monotonic())

    def hurry(self) -> None:
        """Have it take its share of the processors from now on."""
        self._yields_until = None
        self._schedule(os.SCHED_OTHER, _USUAL)

    def answer(self) -> Answer:
        """What it said."""
        status = self._wait()
        return answer_of(status, os.pread(self._said, _MOST, 0).decode(errors="replace"), self.pid)

    def close(self) -> None:
        if self.fd >= 0:
            if self._child:
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)
                self._wait()
            os.close(self.fd)
            os.close(self._said)
            self.fd = -1

    def _schedule(self, policy: int, nice: int) -> None:
        """Set how it is scheduled, as far as we may: an ordinary user's audit stays idle, which has little to do."""
        try:
            for task in os.listdir(f"/proc/{self._child}/task"):  # noqa: PTH208 - pathlib costs half a megabyte
                os.sched_setscheduler(int(task), policy, os.sched_param(0))
        except OSError:
            pass  # not ours to change, or one of them has ended
        try:
            # Its session may be a group of the scheduler's (sched_autogroup), which compares policies within one only.
            with open(f"/proc/{self._child}/autogroup", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(str(nice))
        except OSError:
            pass

    def _wait(self) -> int:
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return os.waitstatus_to_exitcode(status)


def answer_of(status: int, said: str, pid: int) -> Answer:
    """What an audit's exit status and output mean. Nothing but an audit that ended with "hidden" says so."""
    from offmap.exit_status import ExitStatus

    if status == CLOCK_ALONE:
        return Answer(said.strip(), ExitStatus.EXPOSED, clock_alone=True)
    if status == NO_VM:
        return Answer(said.strip(), None)
    lines = said.strip().splitlines() or ["it said nothing"]
    words = {ExitStatus.DONE: "HIDDEN:", ExitStatus.EXPOSED: "EXPOSED:"}
    if status in words and lines[0].startswith(words[ExitStatus(status)]):
        return Answer(lines[0], ExitStatus(status))
    reason = lines[0] if status == ExitStatus.UNDETERMINED else lines[-1]
    line = f"placed, not audited: {reason.removeprefix('offmap audit: ')} (again: offmap audit {pid})"
    return Answer(line, ExitStatus.UNDETERMINED)
