"""How a demonstration shows itself."""

import io

from rich.console import Console

from offmap.cli.demo_progress import DemoProgress
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.events import CellEvent
from offmap.compare.questions import Answer
from offmap.compare.spec import CellSpec

ONE, TWO = CellSpec("reserved"), CellSpec("secretmem", kvm_clock="on")
HIDDEN = CellResult(
    spec=ONE,
    outcome=CellOutcome.BOOTED,
    answers=(
        Answer("works.boot", True),
        Answer("hidden.before_io", True),
        Answer("hidden.populated_pages", 65536.0),
        Answer("hidden.canaries_planted", 64.0),
        Answer("hidden.canaries_found", 0.0),
    ),
)
REFUSED = CellResult(spec=TWO, outcome=CellOutcome.REFUSED, reason="no such RAM\nreally")


def test_in_a_pipe_each_stage_is_a_line_once() -> None:
    out = io.StringIO()
    with DemoProgress(Console(file=out, width=200), 2) as progress:
        progress.line("getting the kernels")
        progress.event(ONE, CellEvent(begun=True))
        progress.event(TWO, CellEvent(begun=True))
        progress.event(ONE, CellEvent(stage="scanning"))
        progress.event(TWO, CellEvent(stage="booting a host"))
        progress.event(TWO, CellEvent(stage="booting the guest"))
        progress.event(ONE, CellEvent(stage="scanning", share=0.5))
        progress.event(ONE, CellEvent(ended=HIDDEN))
        progress.event(TWO, CellEvent(ended=REFUSED))
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == [
        "getting the kernels",
        "reserved: begins",
        "secretmem:kvm-clock=on: begins",
        "reserved: scanning",
        "secretmem:kvm-clock=on: booting a host",
        "secretmem:kvm-clock=on: booting the guest",
        "1/2 reserved: hidden, 0 of 64 canaries found through the host kernel",
        "2/2 secretmem:kvm-clock=on: refused: no such RAM",
    ]


def test_on_a_terminal_the_table_fills() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with DemoProgress(console, 2) as progress:

        def picture() -> str:
            with console.capture() as capture:
                console.print(progress._picture())
            return capture.get()

        progress.event(ONE, CellEvent(begun=True))
        progress.event(ONE, CellEvent(stage="scanning", share=0.5))
        assert "reserved: scanning 50% (0 s)" in picture() and "verdict" not in picture()
        progress.event(ONE, CellEvent(ended=HIDDEN))
        assert "verdict" in picture() and "65,536" in picture() and "scanning" not in picture()
