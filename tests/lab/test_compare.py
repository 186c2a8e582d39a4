"""The comparison's cells in real disposable hosts: those that end badly cost only themselves."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import Settings
from offmap.compare.events import CellEvent
from offmap.compare.facts import Host
from offmap.compare.scheduler import Scheduler, local_pool
from offmap.compare.spec import CellSpec
from offmap.compare.store import Store
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

pytestmark = pytest.mark.lab

TARGET = Path(__file__).with_name("compare_target.py")
QUESTION = "costs.boot"


@pytest.fixture(autouse=True)
def code_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody's editing meanwhile make a cell another measurement."""
    for module in ("inputs", "cell_run", "scheduler"):
        monkeypatch.setattr(f"offmap.compare.{module}.code_digest", lambda: "code")


class Events:
    """What the scheduler said."""

    def __init__(self) -> None:
        self.all: list[tuple[CellSpec, CellEvent]] = []

    def __call__(self, spec: CellSpec, event: CellEvent) -> None:
        self.all.append((spec, event))

    def of(self, kind: str) -> list[Any]:
        return [said for _, event in self.all if (said := getattr(event, kind))]


def program(**how: str) -> tuple[str, ...]:
    """The stand-in, and what it does to cells of which RAM."""
    return (str(TARGET), json.dumps(how))


def compare(
    out: Path, specs: list[CellSpec], settings: Settings, jobs: int = 2
) -> tuple[dict[CellSpec, CellResult], Events]:
    """Run what is missing."""
    events = Events()
    with Store(out) as store:
        scheduler = Scheduler(store, settings, events)
        done, to_run = scheduler.missing(specs)
        if to_run:
            with local_pool(jobs) as pool:
                done |= scheduler.run(to_run, pool)
    return done, events


def cell_hosts(folder: str) -> set[int]:
    """The process ids of all QEMUs that are the disposable host of a cell whose temporary files are in `folder`."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            own = f"{folder}/offmap-cell-".encode()  # other tests have such hosts too, and run meanwhile
            if words[0].rpartition(b"/")[2].startswith(b"qemu-system") and own in b" ".join(words):
                found.add(int(process.name))
    return found


def test_a_panic_is_that_cells_result_and_the_others_go_on(lab_kernel: HostKernel, tmp_path: Path) -> None:
    specs = [CellSpec("anon"), CellSpec("memfd"), CellSpec("hugetlb")]
    settings = Settings(deadline=round(scaled(120)), program=program(anon="panic", hugetlb="refuse"))
    results, _ = compare(tmp_path, specs, settings)
    panicked, fine, refused = (results[spec] for spec in specs)

    assert panicked.outcome is CellOutcome.OOPS
    assert "sysrq" in panicked.oops.lower() and "Kernel panic - not syncing" in panicked.oops
    assert panicked.asked == QUESTION
    assert panicked.answered["works.boot"].value is True
    assert panicked.answer(QUESTION).value is None and "oops" in panicked.answer(QUESTION).reason

    assert fine.outcome is CellOutcome.BOOTED
    assert fine.answered[QUESTION].value == 1.5
    assert fine.host == Host(kernel=lab_kernel.release, lab=True)
    assert fine.machine.accel in {"tcg", "kvm"}
    assert fine.inputs["host_release"] == lab_kernel.release

    assert (refused.outcome, refused.reason) == (CellOutcome.REFUSED, "not on this host; ask another")

    # Done is done, an oops too; a damaged file is not.
    path = tmp_path / "cells" / f"{specs[1].key}.json"
    path.write_bytes(path.read_bytes().replace(b"1.5", b"0.5"))
    again, events = compare(tmp_path, specs, settings)
    assert again[specs[0]] == panicked and again[specs[2]] == refused
    assert again[specs[1]].answered[QUESTION].value == 1.5
    assert [spec for spec, event in events.all if event.ended] == [specs[1]]
    assert "damaged" in events.of("again")[0]


@pytest.mark.slow
def test_a_hang_ends_at_its_deadline(lab_kernel: HostKernel, tmp_path: Path) -> None:
    specs = [CellSpec("anon"), CellSpec("memfd"), CellSpec("hugetlb")]
    deadline = round(scaled(40))  # a host has to come up in it
    settings = Settings(deadline=deadline, program=program(anon="hang", memfd="garbage", hugetlb="silent"))
    results, _ = compare(tmp_path, specs, settings)
    hung, garbage, silent = (results[spec] for spec in specs)
    assert (hung.outcome, hung.asked) == (CellOutcome.DEADLINE, QUESTION)
    assert f"{deadline} s" in hung.reason and hung.answered["works.boot"].value is True
    assert deadline <= hung.seconds < deadline + scaled(20)
    assert garbage.outcome is CellOutcome.FAILED and "no event" in garbage.reason
    assert (silent.outcome, silent.reason) == (
        CellOutcome.FAILED,
        "the measuring program ended with status 3: it broke",
    )
    # With no more time it would end the same way; with more, it may not. What failed is tried again.
    again, events = compare(tmp_path, specs, Settings(deadline=deadline, program=program()))
    assert again[specs[0]] == hung
    assert [again[spec].outcome for spec in specs[1:]] == [CellOutcome.BOOTED] * 2
    again, events = compare(tmp_path, specs, Settings(deadline=deadline + 60, program=program()))
    assert again[specs[0]].outcome is CellOutcome.BOOTED
    assert events.of("again") == ["it may take longer now"]


@pytest.mark.slow
def test_a_kernel_of_ones_own_beside_debians(lab_kernel: HostKernel, tmp_path: Path) -> None:
    image = tmp_path / "own" / "bzImage"
    (tmp_path / "own/lib/modules").mkdir(parents=True)
    image.write_bytes(lab_kernel.vmlinuz.read_bytes())
    (tmp_path / "own/lib/modules" / lab_kernel.release).symlink_to(lab_kernel.modules)
    specs = [CellSpec("anon", str(image)), CellSpec("anon")]
    settings = Settings(deadline=round(scaled(120)), program=program())
    results, _ = compare(tmp_path / "out", specs, settings)
    assert [results[spec].outcome for spec in specs] == [CellOutcome.BOOTED] * 2
    assert {path.name for path in (tmp_path / "out/cells").iterdir()} == {f"{spec.key}.json" for spec in specs}
    # made again, it is another kernel; the others are what they were
    image.write_bytes(image.read_bytes() + b"\0" * 16)
    _, events = compare(tmp_path / "out", specs, settings)
    assert [spec for spec, event in events.all if event.again] == [specs[0]]
    assert events.of("again") == ["the host kernel changed since"]


DRIVER = """
import json, sys
from pathlib import Path
from offmap.cli.signals import ended_by_signals
from offmap.compare.spec import CellSpec
from offmap.compare.cell_run import Settings
from offmap.compare.scheduler import Scheduler, local_pool
from offmap.compare.store import Store
specs = [CellSpec("anon"), CellSpec("memfd"), CellSpec("hugetlb")]
def event(spec, data):
    print(json.dumps([spec.backend, data.stage]), flush=True)
with ended_by_signals(), Store(Path(sys.argv[1])) as store:
    scheduler = Scheduler(store, Settings(program=(sys.argv[2], sys.argv[3])), event)
    done, to_run = scheduler.missing(specs)
    with local_pool(2) as pool:
        scheduler.run(to_run, pool)
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Give a folder whose name leaves room for that of a socket in it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.parametrize(
    ("number", "when"),
    [
        pytest.param(signal.SIGTERM, "asking", id="SIGTERM"),
        pytest.param(signal.SIGINT, "booting", id="SIGINT-in-the-boot"),
        pytest.param(signal.SIGKILL, "asking", id="SIGKILL"),
    ],
)
@pytest.mark.slow
def test_nothing_runs_on(lab_kernel: HostKernel, tmp_path: Path, short_folder: str, number: int, when: str) -> None:
    environment = {**os.environ, "TMPDIR": short_folder}
    argv = [sys.executable, "-c", DRIVER, str(tmp_path), str(TARGET), json.dumps({"anon": "hang", "memfd": "hang"})]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=environment) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if when in line:
                break
        if when == "asking":
            assert cell_hosts(short_folder)
        driver.send_signal(number)
        driver.communicate(timeout=scaled(30))
    assert _soon(lambda: not cell_hosts(short_folder)), "a disposable host outlived its comparison"
    assert not list((tmp_path / "cells").iterdir())  # and none was called a failure
    with Store(tmp_path):  # nobody holds it
        pass


def _soon(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    last = time.monotonic() + scaled(seconds)
    while time.monotonic() < last:
        if true():
            return True
        threading.Event().wait(0.1)
    return true()
