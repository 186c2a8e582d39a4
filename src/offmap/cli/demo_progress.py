"""Progress of a demonstration: on a terminal its table as it fills, elsewhere a line for each event."""

from rich.console import Console, Group

from offmap.cli.compare_progress import CompareProgress
from offmap.compare.cell_result import CellResult
from offmap.compare.claims import DemoRow, row_name
from offmap.compare.report.demo import cells_table, row_line
from offmap.compare.spec import CellSpec


class DemoProgress(CompareProgress):
    """Takes the events of a demonstration; a context manager that leaves the terminal clean.

    Args:
        total: how many cells it has.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._rows: list[DemoRow] = []
        super().__init__(console, total)

    def name_of(self, spec: CellSpec) -> str:
        """The name of its row."""
        return row_name(spec)

    def summary(self, result: CellResult) -> str:
        """One cell in one line; its row joins the table."""
        from offmap.compare.demo import row_of

        self._rows.append(row_of(result))
        return row_line(self._rows[-1])

    def _at(self, spec: CellSpec, stage: str, share: float | None) -> str:
        before = self._running.get(spec, (0.0, ""))[1]
        line = super()._at(spec, stage, share)
        if self._live is None and spec in self._running and not before.startswith(stage):
            return f"{self.name_of(spec)}: {stage}"
        return line

    def _picture(self) -> Group:
        with self._lock:
            return Group(*self._running_lines(), *([cells_table(self._rows)] if self._rows else []))
