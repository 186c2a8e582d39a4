"""Hosts that measure one cell after the other, with a program that only answers."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from offmap.compare.cell_host import CellHost, CellHosts, HostKind
from offmap.compare.cell_result import CellOutcome
from offmap.compare.job import Job, Line
from offmap.compare.spec import CellSpec
from offmap.compare.transcript import Transcript
from offmap.lab.errors import LabEnded, LabTimeout
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel

KIND = HostKind(HostKernel("debian:6.12", "6.12.1", Path("/k"), Path("/m")), "code", ("-m", "x"), "2G", "", "tcg")
JOB = Job(CellSpec("anon"), "/kernel", "/initrd", "/folder")
DONE = msgspec.json.encode(Line(outcome=CellOutcome.BOOTED)) + b"\n"


class Program:
    """Says something when it is given a job."""

    def __init__(self, heard: Callable[[bytes], object]) -> None:
        self.heard = heard
        self.given: list[bytes] = []
        self.says: bytes | None = DONE  # None: it ends
        self.ended = False
        self.closed = False
        self._call: Callable[[], object] = lambda: None

    def when_over(self, call: Callable[[], object]) -> None:
        self._call = call

    def write(self, data: bytes) -> None:
        self.given.append(data)
        if self.says is None:
            self.ended = True
            self._call()
        elif self.says:
            threading.Thread(target=self.heard, args=(self.says,)).start()

    def close_stdin(self) -> None:
        self.closed = True

    def wait(self, _seconds: float | None = None) -> int:
        if not self.closed:
            raise LabEnded("the lab host ended by itself", "last words")
        return 0


class Host:
    """A lab host that only has programs."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.closed = 0

    def popen(self, argv: Any, stdout: Callable[[bytes], object], **_: Any) -> Program:
        self.programs.append(Program(stdout))
        return self.programs[-1]

    def doing(self) -> str:
        return "nothing"

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def lab() -> Iterator[tuple[Host, CellHost]]:
    host = Host()
    with CellHost(cast(LabHost, host), tempfile.TemporaryDirectory(), KIND.program) as cell_host:
        yield host, cell_host


def transcript() -> Transcript:
    return Transcript(lambda _: None)


def test_one_program_measures_all_cells(lab: tuple[Host, CellHost]) -> None:
    host, cell_host = lab
    for number in range(3):
        said = transcript()
        assert cell_host.measure(JOB, said, 60, last=False) == (0, "")
        assert said.said().outcome is CellOutcome.BOOTED
        assert len(host.programs) == 1 and len(host.programs[0].given) == number + 1
    assert msgspec.json.decode(host.programs[0].given[0], type=Job) == JOB
    assert not host.programs[0].closed
    assert cell_host.measure(JOB, transcript(), 60, last=True) == (0, "")
    assert host.programs[0].closed


def test_a_host_that_ends_is_that_cells_end(lab: tuple[Host, CellHost]) -> None:
    host, cell_host = lab
    cell_host.measure(JOB, transcript(), 60, last=False)
    host.programs[0].says = None
    with pytest.raises(LabEnded):
        cell_host.measure(JOB, transcript(), 60, last=False)
    assert not cell_host.usable


def test_a_program_that_says_nothing_is_not_waited_for_without_end(lab: tuple[Host, CellHost]) -> None:
    host, cell_host = lab
    cell_host.measure(JOB, transcript(), 60, last=False)
    host.programs[0].says = b""
    with pytest.raises(LabTimeout, match=r"not done after 0\.01 s"):
        cell_host.measure(JOB, transcript(), 0.01, last=False)


def test_a_host_waits_for_the_next_cell_unless_the_last_one_ended_badly() -> None:
    made: list[Host] = []

    def start() -> CellHost:
        made.append(Host())
        return CellHost(cast(LabHost, made[-1]), tempfile.TemporaryDirectory(), KIND.program)

    with CellHosts() as hosts:
        with hosts.one(KIND, start) as first, hosts.one(KIND, start) as second:
            assert second is not first
        with hosts.one(KIND, start) as third:
            assert third is first and len(made) == 2
        with hosts.one(KIND, start, new=True) as fresh:
            assert fresh.is_new and len(made) == 3
            fresh.close()
        other = HostKind(KIND.kernel, "another code", KIND.program, "2G", "", "tcg")
        with hosts.one(other, start) as fourth:
            assert fourth is not first and len(made) == 4
        with pytest.raises(LabEnded), hosts.one(KIND, start):
            raise LabEnded("the lab host ended by itself", "")
        assert made[0].closed
        second.close()
        with hosts.one(KIND, start):
            assert len(made) == 5
    assert all(host.closed for host in made)
    assert not first.folder.exists()
