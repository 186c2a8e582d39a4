"""How the demonstration shows itself: live on a terminal, line by line elsewhere, and as a table at the end."""

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

from offmap.audit.verdict import Verdict
from offmap.compare.cell import Cell, Outcome

__all__ = ["DemoProgress", "PipedConsole", "cells_table"]

_VERDICT_STYLE = {Verdict.HIDDEN: "bold green", Verdict.EXPOSED: "bold red", Verdict.UNKNOWN: "bold yellow"}
_NOT_MEASURED = "-"
_SHARE_STEP = 0.25  # how often a long stage is mentioned where nothing can be redrawn


class PipedConsole(Console):
    """A console whose reader may go away. rich would end the process with status 1, which here means "exposed"."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command line."""
        raise BrokenPipeError


class DemoProgress:
    """Takes the demonstration's events and shows what is going on; a context manager that leaves the terminal clean."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Status("starting", console=console) if console.is_terminal else None
        self._backend = ""
        self._stage = ""
        self._share = 0.0
        self._began = time.monotonic()

    def event(self, data: dict[str, Any]) -> None:
        """Show one event of offmap.compare.demo."""
        if "backend" in data:
            self._backend = data["backend"]
        if "stage" in data:
            self._show(data["stage"], data.get("share"))
        if "cell" in data:
            self._line(_summary(Cell.from_json(data["cell"])))
            self._stage = ""

    def _show(self, stage: str, share: float | None) -> None:
        prefix = f"{self._backend}: " if self._backend else ""
        percent = "" if share is None else f" {share:.0%}"
        if self._status is not None:
            self._status.update(f"{prefix}{stage}{percent}")
            return
        if stage != self._stage:
            self._line(f"{prefix}{stage}")
            self._share = 0.0
        elif share is not None and share < 1 and share - self._share >= _SHARE_STEP:
            self._line(f"{prefix}{stage}{percent}")
            self._share = share
        self._stage = stage

    def _line(self, text: str) -> None:
        line = f"[{time.monotonic() - self._began:6.1f} s] {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()


def _summary(cell: Cell) -> str:
    if cell.outcome is not Outcome.BOOTED:
        return f"{cell.name}: {cell.outcome.value}: {cell.reason.splitlines()[0] if cell.reason else 'no reason given'}"
    verdict = cell.verdict.value if cell.verdict else "not audited"
    found = f"{cell.canaries_found} of {cell.canaries_planted} canaries found through the host kernel"
    return f"{cell.name}: {verdict}, {found}"


def _number(value: int | float | None) -> str:
    if value is None:
        return _NOT_MEASURED
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def cells_table(cells: Iterable[Cell]) -> Table:
    """One row a guest. A dash is "not measured"; a 0 was measured."""
    cells = list(cells)
    clocks = any(cell.kvm_clock != "auto" for cell in cells)  # of interest where rows differ by it
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("guest RAM", no_wrap=True)
    if clocks:
        table.add_column("guest's\nclock", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for title in ("pages\nin use", "in direct\nmap", "aliased", "unknown", "canaries\nfound", "RAM\nready s", "boot s"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        if cell.outcome is Outcome.BOOTED and cell.verdict is not None:
            said = f"[{_VERDICT_STYLE[cell.verdict]}]{cell.verdict.value}[/]"
        else:
            said = cell.outcome.value
        found = _NOT_MEASURED if cell.canaries_found is None else f"{cell.canaries_found} of {cell.canaries_planted}"
        table.add_row(
            cell.backend,
            *([cell.clocksource or _NOT_MEASURED] if clocks else []),
            said,
            _number(cell.pages_populated),
            _number(cell.direct_map_pages),
            _number(cell.alias_pages),
            _number(cell.unknown_pages),
            found,
            _number(cell.populate_seconds),
            _number(cell.boot_seconds),
        )
    return table
