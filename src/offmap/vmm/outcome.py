"""How a machine's life ended."""

from dataclasses import dataclass
from enum import Enum

from offmap.errors import OffmapError

__all__ = ["Outcome", "Stop"]


class Outcome(Enum):
    """What ended it."""

    POWERED_OFF = "powered off"
    RESET = "reset"
    QUIT = "quit"  # by the user, or a signal
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Stop:
    """The end, and for FAILED the reason."""

    outcome: Outcome
    error: OffmapError | None = None
