"""The table of the demonstration, a row of it as a line, and what came of the attack."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from offmap.audit.verdict import Verdict
from offmap.compare.cell_result import CellOutcome
from offmap.compare.claims import DemoRow

_VERDICT_STYLE = {Verdict.HIDDEN: "bold green", Verdict.EXPOSED: "bold red", Verdict.UNKNOWN: "bold yellow"}
_NOT_MEASURED = "-"


class PipedConsole(Console):
    """A console whose reader may go away. rich would end the process with status 1, which here means "exposed"."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command line."""
        raise BrokenPipeError


def row_line(cell: DemoRow) -> str:
    """One row in one line."""
    if cell.outcome is not CellOutcome.BOOTED:
        return f"{cell.name}: {cell.outcome.value}: {cell.reason.splitlines()[0] if cell.reason else 'no reason given'}"
    verdict = cell.verdict.value if cell.verdict else "not audited"
    found = f"{cell.canaries_found} of {cell.canaries_planted} canaries found through the host kernel"
    return f"{cell.name}: {verdict}, {found}"


def attack_lines(cells: Iterable[DemoRow]) -> list[str]:
    """The attack on a plain guest and on hidden ones, side by side; none if none was tried."""
    attacked = [cell for cell in cells if cell.attack]
    beside = next((cell.plain_attack_reads for cell in attacked if cell.plain_attack_reads), None)
    if not attacked:
        return []
    plain = f"recovered in {beside:,} reads" if beside else "not recovered, so the other lines say nothing"
    # Where it ended, and at which page; without what was tried after that.
    rows = [("plain RAM", plain), *((cell.name, cell.attack.partition(";")[0]) for cell in attacked)]
    width = max(len(name) for name, _ in rows)
    head = "A secret in a process of the guest, for an attacker who reads what the host kernel maps (offmap attack):"
    return [head, *(f"  {name:{width}}  {said}" for name, said in rows)]


def _number(value: int | float | None) -> str:
    if value is None:
        return _NOT_MEASURED
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def cells_table(cells: Iterable[DemoRow]) -> Table:
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
        if cell.outcome is CellOutcome.BOOTED and cell.verdict is not None:
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
