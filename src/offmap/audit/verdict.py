"""The verdict: three values, never a bool."""

from collections.abc import Iterable
from enum import Enum

from offmap.errors import ExitStatus


class Verdict(Enum):
    """hidden: no present entry in the kernel half of the page tables maps a page of the guest's RAM. exposed: at least
    one does, or a planted secret was read. unknown: it could not be determined.
    """

    HIDDEN = "hidden"
    EXPOSED = "exposed"
    UNKNOWN = "unknown"

    @property
    def exit_status(self) -> ExitStatus:
        return _EXIT_STATUS[self]

    @property
    def gravity(self) -> int:
        """0 to 2, the gravest highest."""
        return _BY_GRAVITY.index(self)


_BY_GRAVITY = (Verdict.HIDDEN, Verdict.UNKNOWN, Verdict.EXPOSED)
_EXIT_STATUS = {
    Verdict.HIDDEN: ExitStatus.DONE,
    Verdict.EXPOSED: ExitStatus.EXPOSED,
    Verdict.UNKNOWN: ExitStatus.UNDETERMINED,
}


def worst(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """The gravest: exposed before unknown before hidden; None if there is nothing to judge."""
    return max((each for each in verdicts if each is not None), key=lambda each: each.gravity, default=None)


def exit_status_of(verdict: Verdict | None) -> ExitStatus:
    """Where there is no VM at all, nothing is exposed."""
    return ExitStatus.DONE if verdict is None else verdict.exit_status
