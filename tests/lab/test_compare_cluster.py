"""The comparison's cells on a real dask cluster of two worker processes, one of which is killed in mid-run."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import Settings
from offmap.compare.cluster import cluster_pool
from offmap.compare.inputs import code_digest
from offmap.compare.scheduler import Scheduler
from offmap.compare.spec import NATIVE, CellSpec
from offmap.compare.store import Store, read_cell
from offmap.errors import OffmapError
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

distributed = pytest.importorskip("distributed", reason="--dask is not tested: install offmap[dask]")

pytestmark = [
    pytest.mark.lab,
    pytest.mark.filterwarnings("ignore"),  # of dask, about the workers that we kill
]

TARGET = Path(__file__).with_name("compare_target.py")
BACKENDS = ("anon", "memfd", "hugetlb", "secretmem")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Give a cluster of two workers, a process and a thread each, that nobody starts again."""
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        local_directory=str(tmp_path / "dask"),
        memory_limit=0,
    ) as cluster:
        yield cluster


def worker_pids(cluster: Any) -> dict[str, int]:
    """The process of each worker."""
    with distributed.Client(cluster, set_as_default=False) as client:
        return dict(client.run(os.getpid))


def in_background(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """Run `work` in a thread; what it raises is collected."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that happens in another process."""
    last = time.monotonic() + scaled(seconds)
    while not true():
        assert time.monotonic() < last, "it did not happen"
        threading.Event().wait(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="cells on the running kernel need root: a lost worker is not tested")
def test_a_killed_worker_and_every_cell_ends_once(lab_kernel: HostKernel, cluster: Any, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    specs = [CellSpec(backend, NATIVE) for backend in BACKENDS]
    how = dict.fromkeys(BACKENDS, f"wait {marks}")
    settings = Settings(program=(str(TARGET), json.dumps(how)))
    ended: list[CellSpec] = []
    results: dict[CellSpec, CellResult] = {}

    def running() -> dict[str, int]:
        found = (path.name.split(".") for path in marks.glob("*.*"))
        return {backend: int(pid) for backend, pid in found if alive(int(pid))}

    def run() -> None:
        with Store(tmp_path / "out") as store:
            scheduler = Scheduler(store, settings, lambda spec, event: ended.append(spec) if event.ended else None)
            _, to_run = scheduler.missing(specs)
            with cluster_pool(cluster.scheduler_address, code_digest()) as pool:
                results.update(scheduler.run(to_run, pool))

    workers = worker_pids(cluster)
    thread, raised = in_background(run)
    until(lambda: len(running()) == 2 or bool(raised))
    assert not raised
    first = running()
    victim = next(iter(workers.values()))
    os.kill(victim, signal.SIGKILL)
    # what it was measuring ends with it, and begins again elsewhere once there is room
    until(lambda: any(not alive(pid) for pid in first.values()))
    lost = {backend for backend, pid in first.items() if not alive(pid)}
    assert len(lost) == 1
    (marks / "go").touch()
    thread.join(scaled(120))
    assert not thread.is_alive() and not raised

    assert Counter(ended) == Counter(specs)  # each of them, once
    assert {result.outcome for result in results.values()} == {CellOutcome.BOOTED}
    for spec in specs:
        assert read_cell(tmp_path / "out/cells" / f"{spec.key}.json") == results[spec]
    runs = Counter(path.name.split(".")[0] for path in marks.glob("*.*"))
    assert runs == {backend: 2 if backend in lost else 1 for backend in BACKENDS}


def qemu_of(worker: int) -> int | None:
    """The disposable host that a worker runs; a thread of the worker is its parent."""
    for children in Path(f"/proc/{worker}/task").glob("*/children"):
        for child in children.read_text().split():
            if "offmap-cell-" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    return None


@pytest.mark.slow
def test_a_killed_worker_takes_its_disposable_host_with_it(
    lab_kernel: HostKernel, cluster: Any, tmp_path: Path
) -> None:
    specs = [CellSpec(backend) for backend in BACKENDS[:3]]
    settings = Settings(program=(str(TARGET), json.dumps(dict.fromkeys(BACKENDS, "sleep 5"))))
    ended: list[CellSpec] = []
    results: dict[CellSpec, CellResult] = {}

    def run() -> None:
        with Store(tmp_path / "out") as store:
            scheduler = Scheduler(store, settings, lambda spec, event: ended.append(spec) if event.ended else None)
            with cluster_pool(cluster.scheduler_address, code_digest()) as pool:
                results.update(scheduler.run(specs, pool))

    victim = next(iter(worker_pids(cluster).values()))
    thread, raised = in_background(run)
    until(lambda: qemu_of(victim) is not None or bool(raised))
    assert not raised
    host = qemu_of(victim)
    assert host is not None
    os.kill(victim, signal.SIGKILL)
    until(lambda: not alive(host), 10)
    thread.join(scaled(200))
    assert not thread.is_alive() and not raised
    assert Counter(ended) == Counter(specs)
    assert {result.outcome for result in results.values()} == {CellOutcome.BOOTED}
    assert all(result.host.lab for result in results.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="cells on the running kernel need root: ending is not tested")
def test_ended_from_here_nothing_runs_on_there(lab_kernel: HostKernel, cluster: Any, tmp_path: Path) -> None:
    specs = [CellSpec(backend, NATIVE) for backend in BACKENDS[:3]]
    settings = Settings(program=(str(TARGET), json.dumps(dict.fromkeys(BACKENDS, f"wait {tmp_path}"))))

    class Pool:
        """A cluster that is ended once two cells run."""

        def __init__(self, pool: Any) -> None:
            self.executor, self.call, self.stop = pool.executor, pool.call, pool.stop
            self.at_a_time = pool.at_a_time

        def check(self) -> None:
            if len(running()) == 2:
                raise KeyboardInterrupt

    def running() -> list[int]:
        return [int(path.name.split(".")[1]) for path in tmp_path.glob("*.[0-9]*")]

    with Store(tmp_path / "out") as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr("offmap.compare.scheduler._LOOK_SECONDS", 0.2)
        scheduler = Scheduler(store, settings, lambda *_: None)
        _, to_run = scheduler.missing(specs)
        with cluster_pool(cluster.scheduler_address, code_digest()) as pool, pytest.raises(KeyboardInterrupt):
            scheduler.run(to_run, Pool(pool))
    pids = running()
    assert len(pids) == 2
    until(lambda: not any(map(alive, pids)), 10)
    assert not list((tmp_path / "out/cells").iterdir())


def test_an_unfit_worker_is_said_in_one_line(cluster: Any) -> None:
    for code, kernels, reason in (
        ("other", (), r"^tcp://\S+ cannot run cells: its offmap is not the one here; "),
        (code_digest(), ("/nowhere/bzImage",), r"^tcp://\S+ cannot run cells: it has no /nowhere/bzImage; "),
    ):
        with (
            pytest.raises(OffmapError, match=reason) as caught,
            cluster_pool(cluster.scheduler_address, code, kernels),
        ):
            pass
        assert "\n" not in str(caught.value)


def test_no_cluster_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.compare.cluster._CONNECT_SECONDS", "1s")
    with (
        pytest.raises(OffmapError, match=r"^there is no dask scheduler at tcp://127\.0\.0\.1:9 ") as caught,
        cluster_pool("tcp://127.0.0.1:9", code_digest()),
    ):
        pass
    assert "\n" not in str(caught.value)
