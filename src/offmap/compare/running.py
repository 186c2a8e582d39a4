"""The cells that this process is running, so that they can be ended: none outlives the comparison that wanted it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offmap.errors import OffmapError

__all__ = ["CellStopped", "RunningCell", "running_cell", "stop_cells"]

_lock = threading.Lock()
_stopped: set[str] = set()
_cells: dict[str, set["RunningCell"]] = {}


class CellStopped(OffmapError):
    """The comparison ended before the cell."""


class RunningCell:
    """One of them.

    Attributes:
        run: the comparison it belongs to.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._end: Callable[[], None] | None = None

    def ends_by(self, end: Callable[[], None]) -> None:
        """Have `end` called by `stop_cells`, or now if that has been called already."""
        with _lock:
            self._end = end
            stopped = self.run in _stopped
        if stopped:
            end()

    def check(self) -> None:
        """Go on only if nobody has stopped it.

        Raises:
            CellStopped: somebody has.
        """
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
    """One more cell of comparison `run`.

    Raises:
        CellStopped: that has been ended.
    """
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
    """End all cells of comparison `run` in this process, and start none of it any more; how many there were."""
    with _lock:
        _stopped.add(run)
        cells = list(_cells.get(run, ()))
    for cell in cells:
        cell.end()
    return len(cells)
