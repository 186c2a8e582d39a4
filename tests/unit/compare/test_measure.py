"""The order of a cell's questions, with guests that only count."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from offmap.compare import whole_cell
from offmap.compare.facts import Guest
from offmap.compare.kinds import Kind, kind_of
from offmap.compare.probes import costs, ram_process
from offmap.compare.probes.survey import Survey, measured
from offmap.errors import OffmapError

BOOT, IDLE = 1000, 50_000  # exits


class CountedGuest:
    """A guest whose exits go on as soon as anything is done after its boot: to it, or to another one."""

    all: dict[int, "CountedGuest"]

    def __init__(self, setup: Any, folder: Path) -> None:
        self.setup, self.pid, self.exits = setup, len(self.all) + 1, 0
        self.facts, self.boot_seconds = Guest("6.12", "tsc"), 1.0 + self.pid
        self.all[self.pid] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def boot(self) -> None:
        if self.setup.kind.ram == "broken":
            raise OffmapError("it did not boot")
        self._pass()
        self.exits += BOOT + self.pid

    def booted(self) -> list[Any]:
        return []

    def begin(self) -> None:
        self._pass()

    def _pass(self) -> None:
        for each in self.all.values():
            each.exits += IDLE if each.exits else 0


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    CountedGuest.all = {}
    monkeypatch.setattr(whole_cell, "LiveGuest", CountedGuest)
    monkeypatch.setattr(costs, "exit_counts", lambda pid: {"exits": CountedGuest.all[pid].exits})
    host = SimpleNamespace(
        job=SimpleNamespace(spec=SimpleNamespace(backend="unplugged", vcpus=2), boots=5, native=False),
        folder=tmp_path,
        backend=SimpleNamespace(name="unplugged"),
        kind=kind_of("unplugged"),
        try_out=lambda: None,
        plain=lambda: SimpleNamespace(kind=Kind("memfd")),
        candidate=lambda: SimpleNamespace(kind=Kind("unplugged")),
        bare=lambda setup, vcpus: setup,
        direct_file=lambda: tmp_path,
    )
    made = whole_cell.WholeCell(cast(Any, host), Survey(lambda line: None))

    def beside(plain: Any) -> None:
        with CountedGuest(host.candidate(), tmp_path) as guest:
            made._boot(cast(Any, guest), plain)

    monkeypatch.setattr(made, "_beside", beside)
    monkeypatch.setattr(costs, "populate", lambda name: measured("costs.populate", 1.0))
    monkeypatch.setattr(ram_process, "RamTask", lambda *args, **more: None)
    monkeypatch.setattr(ram_process, "hold_ram", lambda task: [])
    return made


def test_exits_are_of_the_boots_alone(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "_without_guest", lambda: None)
    cell.run()
    exits = cell.survey.answers["costs.exits"]
    assert (exits.baseline, exits.samples) == ((BOOT + 1,), (BOOT + 2,))


def test_boots_that_fail_leave_the_first_pair(cell: Any) -> None:
    bare = cell.host.bare
    cell.host.bare = lambda setup, vcpus: SimpleNamespace(kind=Kind("broken"))
    cell.run()
    boot, exits = (cell.survey.answers[f"costs.{name}"] for name in ("boot", "exits"))
    assert (boot.samples, boot.baseline, exits.samples) == ((3.0,), (2.0,), (BOOT + 2,))
    assert all(answer.detail.endswith("not measured: it did not boot") for answer in (boot, exits))
    cell.host.bare = bare
    cell._without_guest()
    assert [len(cell.survey.answers[f"costs.{name}"].samples) for name in ("boot", "exits")] == [5, 5]
