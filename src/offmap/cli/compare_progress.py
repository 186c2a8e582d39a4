"""Shows the progress of a comparison: live on a terminal, elsewhere as a line for each event."""

import threading
import time
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from offmap.cli.log import as_json
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.events import CellEvent
from offmap.compare.spec import CellSpec
from offmap.log import Logger

_BAR_WIDTH = 40


def summary(result: CellResult) -> str:
    """The result of a cell in one line."""
    outcome = result.outcome
    known = sum(answer.value is not None for answer in result.answers)
    answers = f"{known} of {len(result.answers)} questions answered"
    if outcome is CellOutcome.BOOTED:
        said = answers
    else:
        said = next(iter(result.reason.splitlines()), "no reason given")
        if result.asked and outcome is not CellOutcome.REFUSED:
            said += f" (at {result.asked})"
        if result.answers:
            said += f"; {answers}"
    return f"{result.spec.title}: {outcome.value}: {said}"


class CompareProgress:
    """Shows the scheduler's events. A context manager that leaves the terminal clean.

    Args:
        total: number of cells, including those that earlier runs have done.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._at_a_time = 1
        self._lock = threading.Lock()
        self._running: dict[CellSpec, tuple[float, str]] = {}
        self._stage = ""
        self._ended = 0
        self._skipped = 0
        self._seconds = 0.0  # the time that the cells took which were run
        self._began = time.monotonic()
        live = Live(get_renderable=self._picture, console=console, refresh_per_second=4, transient=True)
        self._records = console.stderr and as_json()  # standard error is for log records alone
        self._live = live if console.is_terminal and not self._records else None

    def event(self, spec: CellSpec, event: CellEvent) -> None:
        """Show one event."""
        with self._lock:
            if line := self._take(spec, event):
                self.line(line)

    def line(self, text: str) -> None:
        """Show a line that stays."""
        self._say(text, f"[{time.monotonic() - self._began:6.1f} s] ")

    def _say(self, text: str, stamp: str = "") -> None:
        if self._records:
            Logger("offmap.cli.compare").info("%s", text)
        else:
            self._console.print(stamp + text, markup=False, highlight=False, soft_wrap=True)

    def _take(self, spec: CellSpec, event: CellEvent) -> str:
        """Take an event. Return the line to show, or nothing."""
        if event.stage:
            return self._at(spec, event.stage, event.share)
        if event.begun:
            self._running[spec] = (time.monotonic(), "")
            return "" if self._live else f"{self.name_of(spec)}: begins"
        if event.again:
            self._running.pop(spec, None)
            return f"{self.name_of(spec)}: is run again, as {event.again}"
        if event.note:
            return f"{self.name_of(spec)}: {event.note}"
        if event.skipped:
            self._skipped += 1
        if event.ended:
            self._running.pop(spec, None)
            self._ended += 1
            self._seconds += event.ended.seconds
            return f"{self._skipped + self._ended}/{self._total} {self.summary(event.ended)}"
        return ""

    def name_of(self, spec: CellSpec) -> str:
        """What a cell is called here."""
        return spec.title

    def summary(self, result: CellResult) -> str:
        """One cell in one line."""
        return f"{summary(result)} ({result.seconds:.0f} s)"

    def _at(self, spec: CellSpec, stage: str, share: float | None) -> str:
        text = stage if share is None else f"{stage} {share:.0%}"
        if spec in self._running:
            self._running[spec] = (self._running[spec][0], text)
            return ""
        if stage == self._stage:
            return ""
        self._stage = stage  # of getting kernels, before the first cell
        return stage

    def began(self, skipped: int, at_a_time: int) -> None:
        """Say how many cells are done from before. The estimate of the time left needs `at_a_time`."""
        self._at_a_time = max(at_a_time, 1)
        if skipped:
            self._say(f"{skipped} of {self._total} cells are done from before")

    def _picture(self) -> Group:
        with self._lock:
            done = self._skipped + self._ended
            left = f"{done} of {self._total} cells"
            if self._ended:
                mean = self._seconds / self._ended
                # what runs now is half done on average
                rest = (self._total - done - len(self._running) / 2) * mean / self._at_a_time
                left += f", about {max(rest, 0) / 60:.0f} minutes left"
            bar = ProgressBar(total=max(self._total, 1), completed=done, width=_BAR_WIDTH)
            return Group(*self._running_lines(), bar, Text(left))

    def _running_lines(self) -> list[Text]:
        """What runs now, a line for each cell."""
        now = time.monotonic()
        return [
            Text(
                f"  {self.name_of(spec)}: {stage or 'begins'} ({now - since:.0f} s)", overflow="ellipsis", no_wrap=True
            )
            for spec, (since, stage) in self._running.items()
        ]

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live is not None:
            self._live.stop()
