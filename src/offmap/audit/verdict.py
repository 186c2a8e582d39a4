"""The verdict: three values, never a bool."""

from collections.abc import Iterable
from enum import Enum

from offmap.errors import ExitStatus


class Verdict(Enum):
    """Whether the kernel's page tables map the guest's RAM."""

    HIDDEN = "hidden"  # no present entry in their kernel half maps a page of it
    EXPOSED = "exposed"  # at least one does, or a planted secret was read
    UNKNOWN = "unknown"  # it could not be determined

    @property
    def exit_status(self) -> ExitStatus:
        return _BY_GRAVITY[self]

    @property
    def gravity(self) -> int:
        """0 to 2, the gravest highest."""
        return list(_BY_GRAVITY).index(self)


_BY_GRAVITY = {
    Verdict.HIDDEN: ExitStatus.DONE,
    Verdict.UNKNOWN: ExitStatus.UNDETERMINED,
    Verdict.EXPOSED: ExitStatus.EXPOSED,
}


def worst(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """The gravest: exposed before unknown before hidden; None if there is nothing to judge."""
    return max((each for each in verdicts if each is not None), key=lambda each: each.gravity, default=None)


def exit_status_of(verdict: Verdict | None) -> ExitStatus:
    """Where there is no VM at all, nothing is exposed."""
    return ExitStatus.DONE if verdict is None else verdict.exit_status
