"""How a machine's life ended."""

from enum import Enum

from offmap.errors import OffmapError
from offmap.typed import NamedTuple


class Outcome(Enum):
    """What ended it."""

    POWERED_OFF = "powered off"
    RESET = "reset"
    QUIT = "quit"  # by the user, or a signal
    FAILED = "failed"


class Stop(NamedTuple):
    """The end, and for FAILED the reason."""

    outcome: Outcome
    error: OffmapError | None = None
