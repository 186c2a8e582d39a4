"""Every cell ends once, however its workers end."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from offmap.compare import scheduler as module
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import CellTask, Settings
from offmap.compare.events import CellEvent, Events
from offmap.compare.running import CellStopped, running_cell, stop_cells
from offmap.compare.scheduler import LOSSES, Scheduler, first_failure
from offmap.compare.spec import CellSpec
from offmap.compare.store import Store, read_cell
from offmap.errors import OffmapError
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

CELLS = [CellSpec(backend) for backend in ("anon", "memfd", "hugetlb", "unplugged")]
Call = Callable[[CellTask], CellResult]


class Pool:
    """Threads that do what a test wants instead of a cell."""

    def __init__(self, call: Call) -> None:
        self.executor = ThreadPoolExecutor(2)
        self.at_a_time = 2
        self._call = call
        self.stopped: list[str] = []
        self.nobody_left = False

    def call(self, events: Events, /) -> Call:
        return self._call

    def check(self) -> None:
        if self.nobody_left:
            raise OffmapError("nobody is left")

    def stop(self, run: str) -> None:
        self.stopped.append(run)


def fine(task: CellTask) -> CellResult:
    return CellResult(spec=task.spec, outcome=CellOutcome.BOOTED)


def run(out: Path, call: Call) -> tuple[dict[CellSpec, CellResult], list[tuple[CellSpec, CellEvent]], Pool]:
    events: list[tuple[CellSpec, CellEvent]] = []
    pool = Pool(call)
    with Store(out) as store, pool.executor:
        results = Scheduler(store, Settings(), lambda *event: events.append(event)).run(CELLS, pool)
    return results, events, pool


def kept(out: Path) -> list[CellSpec]:
    return sorted(read_cell(path).spec for path in (out / "cells").iterdir())


def test_all_end_and_are_kept(tmp_path: Path) -> None:
    results, events, pool = run(tmp_path, fine)
    assert set(results) == set(CELLS) and kept(tmp_path) == sorted(CELLS)
    assert Counter(spec for spec, event in events if event.ended) == Counter(CELLS)
    assert pool.stopped == []


@pytest.mark.parametrize("loss", [BrokenExecutor("gone"), CancelledError()])
def test_a_lost_workers_cell_is_run_again(tmp_path: Path, loss: BaseException) -> None:
    runs: Counter[str] = Counter()

    def call(task: CellTask) -> CellResult:
        runs[task.spec.backend] += 1
        if task.spec.backend == "memfd" and runs["memfd"] < LOSSES:
            raise loss
        return fine(task)

    results, events, _ = run(tmp_path, call)
    assert runs == {"anon": 1, "memfd": LOSSES, "hugetlb": 1, "unplugged": 1}
    assert {result.outcome for result in results.values()} == {CellOutcome.BOOTED}
    assert Counter(spec for spec, event in events if event.ended) == Counter(CELLS)
    assert [spec.backend for spec, event in events if event.again] == ["memfd"] * (LOSSES - 1)


def test_a_cell_that_kills_workers_fails_and_the_others_do_not(tmp_path: Path) -> None:
    def call(task: CellTask) -> CellResult:
        if task.spec.backend == "anon":
            raise BrokenExecutor("it was killed")
        return fine(task)

    results, _, _ = run(tmp_path, call)
    lost = results[CELLS[0]]
    assert lost.outcome is CellOutcome.FAILED
    assert lost.reason == "its worker was lost several times, the last time by BrokenExecutor: it was killed"
    assert [results[spec].outcome for spec in CELLS[1:]] == [CellOutcome.BOOTED] * 3
    failure = first_failure(list(results.values()))
    assert failure is not None and str(failure).startswith("anon on debian:6.12")


def test_a_cell_that_dask_has_given_up_is_not_tried_again(tmp_path: Path) -> None:
    class KilledWorker(Exception):
        """As distributed.scheduler has it."""

    runs: Counter[str] = Counter()

    def call(task: CellTask) -> CellResult:
        runs[task.spec.backend] += 1
        if task.spec.backend == "anon":
            raise KilledWorker("anon, by 4 workers")
        return fine(task)

    results, _, _ = run(tmp_path, call)
    assert results[CELLS[0]].outcome is CellOutcome.FAILED and "anon, by 4 workers" in results[CELLS[0]].reason
    assert set(runs.values()) == {1}


def test_a_bug_ends_the_comparison_and_is_no_result(tmp_path: Path) -> None:
    def call(task: CellTask) -> CellResult:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, call)
    assert kept(tmp_path) == []


def test_when_nobody_is_left_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    release = threading.Event()

    def call(task: CellTask) -> CellResult:
        release.wait(scaled(10))
        return fine(task)

    pool = Pool(call)
    pool.nobody_left = True
    with Store(tmp_path) as store, pool.executor:
        scheduler = Scheduler(store, Settings(), lambda *_: None)
        with pytest.raises(OffmapError, match="nobody is left"):
            scheduler.run(CELLS, pool)
        assert pool.stopped == [scheduler.run_id]
        release.set()


def test_a_result_that_cannot_be_kept_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offmap.compare.store.write_atomically", no_room)
    with pytest.raises(OffmapError, match="No space left on device; make room and run it again: what is done is kept"):
        run(tmp_path, fine)


def test_what_is_done_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = HostKernel("debian:6.12", "6.12", tmp_path, tmp_path)
    code = ["one"]
    monkeypatch.setattr(module, "kernels_of", lambda spec, report: (kernel, kernel))
    monkeypatch.setattr(module, "module_input", lambda spec, host: {})
    monkeypatch.setattr(module, "inputs_of", lambda host, guest: {"code": code[0]})
    events: list[CellEvent] = []
    with Store(tmp_path) as store:
        store.put(CellResult(spec=CELLS[1], outcome=CellOutcome.OOPS, inputs={"code": "one"}))
        scheduler = Scheduler(store, Settings(), lambda _, event: events.append(event))
        done, to_run = scheduler.missing(CELLS)
        assert list(done) == [CELLS[1]] and to_run == [CELLS[0], *CELLS[2:]]
        code[0] = "two"
        assert scheduler.missing(CELLS) == ({}, CELLS)
        assert events == [CellEvent(skipped=True), CellEvent(again="the code changed since")]


def test_stopping_ends_what_runs_and_starts_no_more() -> None:
    ended: list[str] = []
    with running_cell("run") as cell, running_cell("other") as other:
        cell.ends_by(lambda: ended.append("cell"))
        other.ends_by(lambda: ended.append("other"))
        assert stop_cells("run") == 1
        assert ended == ["cell"]
        cell.ends_by(lambda: ended.append("late"))  # a host that was just starting
        assert ended == ["cell", "late"]
        with pytest.raises(CellStopped):
            cell.check()
        other.check()
    with pytest.raises(CellStopped), running_cell("run"):
        pass
    assert stop_cells("run") == 0
