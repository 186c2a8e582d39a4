"""Runs ``offmap audit`` on the VMM, as a process of its own: the auditor must not be the process that it audits."""

import os
import sys
import threading

from offmap.cli.log import as_json
from offmap.log import Logger
from offmap.typed import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess  # imported where it is used: not every guest's start has to wait for it


_GRACE = 2.0  # seconds


def _command(pid: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "offmap", "audit", "--no-progress", str(pid), *options]


class SelfAudit:
    """The audit that ``--audit`` asks for. Its report goes to standard error.

    If standard error takes log records, each line of the report is a record.

    Args:
        watch: go on until the guest ends, and report each change.
    """

    def __init__(self, watch: bool) -> None:
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._relay: threading.Thread | None = None

    def start(self, pid: int | None = None) -> None:
        """Start the audit of process `pid`, by default this one. Does not wait for it."""
        import subprocess

        pid = os.getpid() if pid is None else pid
        options = ("--watch", "10") if self._watch else ()
        if not as_json():
            self._process = subprocess.Popen(
                _command(pid, *options), stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()
            )
            return
        command = _command(pid, "--log-format", "json", *options)
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._relay = threading.Thread(target=_relay, args=(self._process.stdout,), name="audit-lines")
        self._relay.start()

    def finish(self, wait: bool = False) -> int | None:
        """End the audit, once the guest has ended. Returns its exit status; None if it has no verdict yet.

        Args:
            wait: wait for the verdict, as the guest's RAM is still there. An audit that watches is not waited for.
        """
        if self._process is not None:
            from offmap.patience import ends_within  # when the guest has ended: its start does not wait for it

            if wait and not self._watch:
                self._process.wait()
            elif not self._watch:
                ends_within(self._process, _GRACE)  # it may have given its verdict, and only be ending
            if self._process.poll() is None:
                self._process.terminate()
            status = self._process.wait()
            self._process = None
            if self._relay is not None:
                self._relay.join()
            self._status = status if status >= 0 else None
        return self._status


def _relay(report: IO[bytes]) -> None:
    logger = Logger("offmap.cli.audit")
    with report:
        for line in report:
            if text := line.decode(errors="replace").rstrip():
                logger.info("%s", text)
