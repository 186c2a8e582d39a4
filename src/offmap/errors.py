"""What can go wrong, each with the exit status it ends in.

Every error a user can meet is one line: what failed, why, and what to do. The command line prints ``str(error)`` and
exits with ``error.exit_status``; anything that is not an OffmapError is a bug and keeps its traceback.
"""

import errno
import os

TYPE_CHECKING = False  # importing `typing` costs each wrapped VMM's supervisor a megabyte
if TYPE_CHECKING:
    from typing import Self

    from offmap.exit_status import ExitStatus as ExitStatus  # noqa: PLC0414 - exported


def __getattr__(name: str) -> object:
    if name != "ExitStatus":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from offmap.exit_status import ExitStatus

    return globals().setdefault(name, ExitStatus)


class OffmapError(Exception):
    """A failure that a user can meet: printed as ``what: why; remedy``, in one line without a final full stop.

    Args:
        what: what failed, and why where one phrase says both.
        remedy: what to do about it, as an imperative; empty where nothing can be done.
        why: why it failed, where `what` does not say it.
    """

    _status = 2

    @property
    def exit_status(self) -> "ExitStatus":
        """What a command that fails by it ends with."""
        from offmap.exit_status import ExitStatus

        return ExitStatus(self._status)

    def __init__(self, what: str, remedy: str = "", *, why: str = "") -> None:
        self.what = what
        self.why = why
        self.remedy = remedy
        super().__init__(f"{self.reason}; {remedy}" if remedy else self.reason)

    @property
    def reason(self) -> str:
        """What failed and why, without the remedy."""
        return f"{self.what}: {self.why}" if self.why else self.what


class Undetermined(OffmapError):
    """The question cannot be answered on this host: neither hidden nor exposed may be said."""

    _status = 3


class BackendRefused(OffmapError):
    """This host cannot give guest RAM of the kind that was asked for (never replaced by a weaker one).

    Args:
        what: what it cannot give.
        why: why not.
        remedy: what to do about it, as an imperative.
    """

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(what, remedy, why=why)

    @classmethod
    def from_line(cls, line: str) -> "Self":
        """The refusal that another process printed as `line`; printed again, it is the same line."""
        reason, _, remedy = line.rpartition("; ") if "; " in line else (line, "", "")
        what, _, why = reason.partition(": ")
        return cls(what, why, remedy)


class KernelError(OffmapError):
    """A system call failed.

    Args:
        operation: the call, by its own name (``KVM_CREATE_VM``, ``mmap of /dev/mem``).
        error: errno, or the OSError that carried it.
        remedy: what to do about it.
    """

    def __init__(self, operation: str, error: int | OSError, remedy: str = "") -> None:
        number = error if isinstance(error, int) else (error.errno or 0)
        self.operation = operation
        self.errno = number
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{operation} failed", remedy, why=f"{os.strerror(number)} ({name})")
