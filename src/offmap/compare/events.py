"""The events of a running comparison, for whoever shows them."""

from collections.abc import Callable
from dataclasses import dataclass

from offmap.compare.cell_result import CellResult
from offmap.compare.spec import CellSpec


@dataclass(frozen=True, slots=True)
class CellEvent:
    """One thing that happened to a cell; all but one kind of it is left out.

    Attributes:
        begun: it runs now.
        stage: what is being done.
        share: of the stage, from 0 to 1; None if unknown.
        skipped: it is done from before.
        again: why it is run again.
        note: something to be told.
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
