"""How a comparison shows itself."""

import io
import json

import pytest
from rich.console import Console

from offmap.cli.compare_progress import CompareProgress, summary
from offmap.cli.log import LogOptions, logging_to_stderr
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.events import CellEvent
from offmap.compare.questions import Answer
from offmap.compare.spec import CellSpec

ONE, TWO = CellSpec("anon"), CellSpec("memfd")
FINE = CellResult(
    spec=ONE,
    outcome=CellOutcome.BOOTED,
    answers=(Answer("works.boot", True), Answer("works.vsock", None, "not asked")),
    seconds=61.4,
)
OOPS = CellResult(spec=TWO, outcome=CellOutcome.OOPS, reason="BUG: bad\nmore", asked="works.kvm_clock")


def test_in_a_pipe_it_is_lines() -> None:
    out = io.StringIO()
    with CompareProgress(Console(file=out, width=200), 3) as progress:
        progress.event(ONE, CellEvent(stage="downloading"))
        progress.event(ONE, CellEvent(stage="downloading"))
        progress.event(CellSpec("hugetlb"), CellEvent(skipped=True))
        progress.event(TWO, CellEvent(again="the code changed since"))
        progress.began(1, 2)
        progress.event(ONE, CellEvent(begun=True))
        progress.event(ONE, CellEvent(stage="asking", share=0.5))
        progress.event(ONE, CellEvent(ended=FINE))
        progress.event(TWO, CellEvent(ended=OOPS))
    lines = [line.partition("] ")[2] or line for line in out.getvalue().splitlines()]
    assert lines == [
        "downloading",
        f"{TWO.title}: is run again, as the code changed since",
        "1 of 3 cells are done from before",
        f"{ONE.title}: begins",
        f"2/3 {ONE.title}: booted: 1 of 2 questions answered (61 s)",
        f"3/3 {TWO.title}: oops: BUG: bad (at works.kvm_clock) (0 s)",
    ]


def test_services_get_records(capsys: pytest.CaptureFixture[str]) -> None:
    options = LogOptions(log_format="json")
    terminal = Console(stderr=True, force_terminal=True)
    with logging_to_stderr("offmap compare", options), CompareProgress(terminal, 3) as progress:
        progress.event(CellSpec("hugetlb"), CellEvent(skipped=True))
        progress.began(1, 2)
        progress.event(ONE, CellEvent(begun=True))
        progress.event(ONE, CellEvent(ended=FINE))
    said = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "1 of 3 cells are done from before",
        f"{ONE.title}: begins",
        f"2/3 {ONE.title}: booted: 1 of 2 questions answered (61 s)",
    ]


def test_on_a_terminal_it_is_a_picture_that_goes_away() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with CompareProgress(console, 2) as progress:
        progress.began(0, 1)
        progress.event(ONE, CellEvent(begun=True))
        progress.event(ONE, CellEvent(stage="asking", share=0.5))
        with console.capture() as capture:
            console.print(progress._picture())
        progress.event(ONE, CellEvent(ended=FINE))
        assert f"{ONE.title}: asking 50% (0 s)" in capture.get()
        assert "0 of 2 cells" in capture.get()
        with console.capture() as capture:
            console.print(progress._picture())
        assert "1 of 2 cells, about 1 minutes left" in capture.get()


def test_a_cell_without_a_reason_says_so() -> None:
    assert summary(CellResult(spec=ONE, outcome=CellOutcome.FAILED)).endswith("failed: no reason given")
