"""A VMM's audit of itself: ``offmap audit`` as a process of its own, so that what is looked at is not what looks."""

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess  # imported where it is used: not every guest's start has to wait for it

__all__ = ["SelfAudit"]


_GRACE = 2.0  # seconds


def _command(*options: str) -> list[str]:
    return [sys.executable, "-m", "offmap", "audit", "--no-progress", str(os.getpid()), *options]


class SelfAudit:
    """The audit that ``--audit`` asks for; its report goes to standard error, with all else that is not the guest's.

    Args:
        watch: go on until the guest ends, and report what changes.
    """

    def __init__(self, watch: bool) -> None:
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None
        self._status: int | None = None

    def start(self) -> None:
        """Begin, without waiting for it."""
        import subprocess

        options = ("--watch", "10") if self._watch else ()
        self._process = subprocess.Popen(_command(*options), stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())

    def finish(self, wait: bool = False) -> int | None:
        """Its exit status, once the guest has ended; None if it had not come to a verdict by then.

        Args:
            wait: for its verdict, as the guest's RAM is still there; one that watches has come to many.
        """
        if self._process is not None:
            import subprocess

            if wait and not self._watch:
                self._process.wait()
            elif not self._watch:
                # It may have spoken already, and only be on its way out.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
            if self._process.poll() is None:
                self._process.terminate()
            status = self._process.wait()
            self._process = None
            self._status = status if status >= 0 else None
        return self._status
