"""How the host's end and the program's word make a result."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from offmap.compare import cell_run
from offmap.compare.cell_host import CellHosts, HostKind
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import CellTask, Settings, run_cell
from offmap.compare.events import CellEvent
from offmap.compare.facts import Host
from offmap.compare.job import Line, Preset
from offmap.compare.questions import Answer
from offmap.compare.spec import NATIVE, CellSpec
from offmap.errors import BackendRefused, OffmapError
from offmap.lab.errors import LabEnded, LabError, LabPanic, LabTimeout
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel

from .test_cell_host import Host as LabHostOfPrograms
from .test_cell_host import Program

OOPS = "\n[    9.1] BUG: unable to handle page fault for address: ffff888040000000\n[    9.2] Call Trace:\n"
ANSWER = Answer("works.boot", True)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give a function that runs a cell whose host ends as it is told, after one answer."""
    kernel = HostKernel("debian:6.12", "6.12.1", tmp_path, tmp_path)
    monkeypatch.setattr(cell_run, "kernels_of", lambda spec, report, modules: (kernel, kernel))
    monkeypatch.setattr(cell_run, "inputs_of", lambda host, guest: {"code": "c"})
    monkeypatch.setattr(cell_run, "code_digest", lambda: "c")
    monkeypatch.setattr(cell_run, "probe_initramfs", lambda modules: b"")

    def run(error: Exception | None, deadline: float = 600) -> CellResult:
        def host(task: CellTask, kind: HostKind, guest: HostKernel, module: None, *rest: Any) -> None:
            transcript, _, end, *_ = rest
            for line in (
                Line(host=Host("6.12.1")),
                Line(question="works.boot"),
                Line(answer=ANSWER),
                Line(question="costs.boot"),
            ):
                transcript.feed(msgspec.json.encode(line) + b"\n")
            if error is not None:
                raise error
            cell_run._judge(0, "", transcript.said(), end)

        monkeypatch.setattr(cell_run, "_run_in_host", host)
        return run_cell(CellTask(CellSpec("anon"), "run", Settings(deadline=deadline)))

    return run


@pytest.mark.parametrize(
    ("error", "deadline", "outcome", "reason"),
    [
        (LabPanic(OOPS), 600, CellOutcome.OOPS, "[    9.1] BUG: unable to handle page fault"),
        (LabTimeout("it was not done"), 0, CellOutcome.DEADLINE, "it was not done"),
        (LabTimeout("the lab host did not come up"), 600, CellOutcome.FAILED, "the lab host did not come up"),
        (LabEnded("the lab host ended by itself", "last words"), 600, CellOutcome.FAILED, "the lab host ended"),
        (BackendRefused("no module", "none", "build it"), 600, CellOutcome.REFUSED, "no module: none; build it"),
        (LabError("no qemu"), 600, CellOutcome.FAILED, "no qemu"),
        (OffmapError("something"), 600, CellOutcome.FAILED, "something"),
        (None, 600, CellOutcome.FAILED, "the measuring program ended with status 0: without a word"),
    ],
)
def test_ends(ends: Any, error: Exception | None, deadline: float, outcome: CellOutcome, reason: str) -> None:
    result = ends(error, deadline)
    assert result.outcome is outcome
    assert result.reason.startswith(reason)
    assert result.answers == (ANSWER,)  # what it had by then
    assert result.asked == "costs.boot"
    assert result.host == Host("6.12.1")
    assert result.inputs["code"] == "c" and result.inputs["deadline"] == f"{deadline:g}"
    assert result.oops == (OOPS if outcome is CellOutcome.OOPS else "")
    assert result.console == ("last words" if isinstance(error, LabEnded) else "")


def test_code_that_changes_meanwhile_measured_nothing_that_can_be_named(
    ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_run, "code_digest", lambda: "d")
    assert ends(None).inputs["code"] == "c-d"


def test_the_host_is_heard_complaining() -> None:
    console = "Linux version\nWARNING: CPU: 0 PID: 1 at mm/gup.c\nCall Trace:\n fine again\n"
    assert cell_run._complaints(console).startswith("WARNING: CPU: 0")
    assert cell_run._complaints("x86/fpu: enabled\nready\n") == ""


def test_the_running_kernel_is_a_kernel() -> None:
    guest = HostKernel("debian:6.12", "6.12.1", Path("/g"), Path("/g"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_run, "host_kernel", lambda spec, say: guest)
        host, its_guest = cell_run.kernels_of(CellSpec("anon", NATIVE), lambda _: None)
    assert its_guest is guest and host.name == NATIVE


class Shared(LabHostOfPrograms):
    """A lab host as a cell sees it."""

    console = SimpleNamespace(text="", tail=lambda _: "")
    options = SimpleNamespace(accel="tcg")

    def kill(self) -> None:
        raise AssertionError("nothing stopped the cell")


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[CellResult, list[str]]]]:
    """Give a function that runs a cell which may share a host; its program reports one outcome each time it is asked.

    It returns the result, and why the cell was run again.
    """
    kernel = HostKernel("debian:6.12", "6.12.1", tmp_path, tmp_path)
    monkeypatch.setattr(cell_run, "kernels_of", lambda spec, report, modules: (kernel, kernel))
    monkeypatch.setattr(cell_run, "inputs_of", lambda host, guest: {"code": "c"})
    monkeypatch.setattr(cell_run, "code_digest", lambda: "c")
    monkeypatch.setattr(LabHost, "start", lambda *_, **__: Shared())
    how = Settings(preset=Preset(questions=("works.boot",), fresh=False), initrd=tmp_path)

    with CellHosts() as hosts:

        def run(backend: str, *outcomes: CellOutcome) -> tuple[CellResult, list[str]]:
            left = list(outcomes)
            events: list[CellEvent] = []

            def write(program: Program, _: bytes) -> None:
                outcome = left.pop(0)
                program.heard(msgspec.json.encode(Line(outcome=outcome, reason=f"{len(left)} left")) + b"\n")

            monkeypatch.setattr(Program, "write", write)
            task = CellTask(CellSpec(backend, "debian:6.12", "debian:6.12"), "run", how)
            result = run_cell(task, events.append, hosts)
            assert not left
            return result, [event.again for event in events if event.again]

        yield run


def test_what_a_used_host_does_not_give_is_asked_of_a_new_one(in_turn: Callable[..., Any]) -> None:
    booted, refused, failed = CellOutcome.BOOTED, CellOutcome.REFUSED, CellOutcome.FAILED
    for backend, outcomes, times in (
        ("anon", [failed], 0),  # in a new host
        ("anon", [booted], 0),
        ("reserved", [refused, booted], 1),
        ("reserved", [booted], 0),
        ("reserved", [failed, refused], 1),
        ("reserved", [failed, failed], 1),  # the new host of the last one is a used one
        ("anon", [booted], 0),
        ("secretmem", [refused], 0),  # by this kernel, whatever the host
    ):
        result, again = in_turn(backend, *outcomes)
        assert result.outcome is outcomes[-1]
        assert again == ["its host had run other cells before; there: 1 left"] * times
