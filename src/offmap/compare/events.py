"""Events of a running comparison, for progress displays."""

from collections.abc import Callable
from dataclasses import dataclass

from offmap.compare.cell_result import CellResult
from offmap.compare.spec import CellSpec


@dataclass(frozen=True, slots=True)
class CellEvent:
    """One event of a cell. Only the fields of one kind of event are set.

    Attributes:
        begun: the cell starts.
        stage: what is being done.
        share: done of the stage, from 0 to 1; None if unknown.
        skipped: an earlier run has its result.
        again: why it is run again.
        note: a message for the user.
        ended: its result.
    """

    begun: bool = False
    stage: str = ""
    share: float | None = None
    skipped: bool = False
    again: str = ""
    note: str = ""
    ended: CellResult | None = None


Report = Callable[[CellEvent], None]
"""Takes the events of one cell, from any thread."""

Events = Callable[[CellSpec, CellEvent], None]
"""Takes the events of all cells, from any thread."""
