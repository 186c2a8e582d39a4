"""What can go wrong, each with the exit status it ends in.

Every error a user can meet is one line: what failed, why, and what to do. The command line prints ``str(error)`` and
exits with ``error.exit_status``; anything that is not an OffmapError is a bug and keeps its traceback.
"""

import errno
import os
from enum import IntEnum

__all__ = ["BackendRefused", "ExitStatus", "KernelError", "OffmapError", "Undetermined"]


class ExitStatus(IntEnum):
    """Exit status of every offmap command (docs/design.md)."""

    DONE = 0  # for an audit: hidden
    EXPOSED = 1
    FAILED = 2  # it failed or was used wrongly
    UNDETERMINED = 3  # the answer cannot be determined here
    NOT_RUN = 125  # of run --exec, whose others are the command's (as env(1), timeout(1) and others have it)


class OffmapError(Exception):
    """A failure that a user can meet.

    Args:
        what: what failed and why, without a final full stop.
        remedy: what to do about it, as an imperative; empty where nothing can be done.
    """

    exit_status = ExitStatus.FAILED

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}; {remedy}" if remedy else what)


class Undetermined(OffmapError):
    """The question cannot be answered on this host: neither hidden nor exposed may be said."""

    exit_status = ExitStatus.UNDETERMINED


class BackendRefused(OffmapError):
    """This host cannot give guest RAM of the kind that was asked for (never replaced by a weaker one)."""


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
        super().__init__(f"{operation} failed: {os.strerror(number)} ({name})", remedy)
