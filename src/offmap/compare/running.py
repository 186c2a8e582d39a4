"""The cells that run in this process. They can be ended, so that none outlives its comparison."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offmap.errors import OffmapError

_lock = threading.Lock()
_stopped: set[str] = set()
_cells: dict[str, set["RunningCell"]] = {}


class CellStopped(OffmapError):
    """The comparison ended before the cell."""


class RunningCell:
    """A cell that runs.

    Attributes:
        run: the comparison it belongs to.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._end: Callable[[], None] | None = None

    def ends_by(self, end: Callable[[], None]) -> None:
        """Let `stop_cells` call `end`, or call it now if the comparison was stopped already."""
        with _lock:
            self._end = end
            stopped = self.run in _stopped
        if stopped:
            end()

    def check(self) -> None:
        """Check that the comparison still runs. Raises CellStopped: it was stopped."""
        with _lock:
            if self.run in _stopped:
                raise CellStopped("the comparison was ended")

    def end(self) -> None:
        """End what runs."""
        with _lock:
            end = self._end
        if end is not None:
            end()


@contextmanager
def running_cell(run: str) -> Iterator[RunningCell]:
    """Register a cell of comparison `run` for as long as it runs. Raises CellStopped: the comparison was stopped."""
    cell = RunningCell(run)
    cell.check()
    with _lock:
        _cells.setdefault(run, set()).add(cell)
    try:
        yield cell
    finally:
        with _lock:
            _cells[run].discard(cell)


def stop_cells(run: str) -> int:
    """End all cells of comparison `run` in this process, and let no other start. Return how many were ended."""
    with _lock:
        _stopped.add(run)
        cells = list(_cells.get(run, ()))
    for cell in cells:
        cell.end()
    return len(cells)
