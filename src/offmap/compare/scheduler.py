"""Runs the cells of a comparison on an executor: threads of this process, or the workers of a dask cluster.

Every cell ends exactly once: an earlier run has its result, or it is run now and its result is kept. If a worker is
lost, its cell is run again on another. However the comparison ends, none of its cells goes on running.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from offmap.compare.cell_host import CellHosts
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import CellTask, Settings, kernels_of, run_cell
from offmap.compare.events import CellEvent, Events
from offmap.compare.inputs import code_digest, firecracker_input, inputs_of, module_input
from offmap.compare.running import stop_cells
from offmap.compare.spec import CellSpec
from offmap.compare.store import Store
from offmap.errors import OffmapError
from offmap.lab.kernel import HostKernel

LOSSES = 3
"""After so many lost workers, the cell itself is blamed: it is not run again."""

_LOOK_SECONDS = 30.0  # how often a cluster is asked whether it has any workers left


class Pool(Protocol):
    """A place where cells run."""

    @property
    def executor(self) -> Executor:
        """The executor that runs them."""

    @property
    def at_a_time(self) -> int:
        """How many cells run at the same time, at present."""

    def call(self, events: Events, /) -> Callable[[CellTask], CellResult]:
        """Make the function that the executor calls. If it can, it passes the events of a running cell to `events`."""

    def check(self) -> None:
        """Check that a worker is left. Raises OffmapError: none is left."""

    def stop(self, run: str) -> None:
        """End all cells of comparison `run`."""


class _Threads:
    """This machine: one thread for each running cell, which waits for the QEMU of its disposable host."""

    def __init__(self, executor: Executor, jobs: int, hosts: CellHosts) -> None:
        self.executor = executor
        self._hosts = hosts
        self.at_a_time = jobs

    def call(self, events: Events) -> Callable[[CellTask], CellResult]:
        def run(task: CellTask) -> CellResult:
            events(task.spec, CellEvent(begun=True))
            return run_cell(task, partial(events, task.spec), self._hosts)

        return run

    def check(self) -> None:
        pass

    def stop(self, run: str) -> None:
        stop_cells(run)


@contextmanager
def local_pool(jobs: int) -> Iterator[Pool]:
    """Run cells on this machine, `jobs` at a time."""
    with CellHosts() as hosts, ThreadPoolExecutor(jobs, thread_name_prefix="cell") as executor:
        yield _Threads(executor, jobs, hosts)


class Scheduler:
    """Runs one comparison.

    Args:
        store: keeps results and has those of earlier runs; with None, nothing is kept.
        settings: how cells are run.
        events: is called for each event.
    """

    def __init__(self, store: Store | None, settings: Settings, events: Events) -> None:
        self._store = store
        self._settings = settings
        self._events = events
        self.run_id = uuid.uuid4().hex

    def missing(self, specs: Sequence[CellSpec]) -> tuple[dict[CellSpec, CellResult], list[CellSpec]]:
        """Get all kernels, and sort the cells: (usable results of earlier runs, cells that are left to run).

        Raises:
            OffmapError: a kernel cannot be downloaded or built.
        """
        done: dict[CellSpec, CellResult] = {}
        to_run: list[CellSpec] = []
        known: dict[tuple[str, str], tuple[HostKernel, dict[str, str]]] = {}
        for spec in specs:
            names = (spec.host_kernel, spec.guest_kernel)
            if names not in known:
                host, guest = kernels_of(spec, partial(self._events, spec))
                known[names] = host, inputs_of(host, guest)
            host, inputs = known[names]
            own = {**module_input(spec, host), **firecracker_input(spec, self._settings.firecracker)}
            wanted = {**inputs, **own}
            found, why = None, ""
            if self._store is not None:
                found, why = self._store.done(spec, wanted, self._settings.deadline, self._settings.boots)
            if found is not None:
                done[spec] = found
                self._events(spec, CellEvent(skipped=True))
                continue
            if why:
                self._events(spec, CellEvent(again=why))
            to_run.append(spec)
        return done, to_run

    def run(self, specs: Sequence[CellSpec], pool: Pool) -> dict[CellSpec, CellResult]:
        """Start the cells in this order, and store each result as soon as it is ready.

        Raises:
            OffmapError: a result could not be kept, or no worker is left.
        """
        code = code_digest()
        call = pool.call(self._events)
        results: dict[CellSpec, CellResult] = {}
        losses = dict.fromkeys(specs, 0)
        futures: dict[Future[CellResult], CellSpec] = {}

        def submit(spec: CellSpec) -> None:
            futures[pool.executor.submit(call, CellTask(spec, self.run_id, self._settings))] = spec

        try:
            for spec in specs:
                submit(spec)
            while futures:
                ended, _ = wait(futures, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
                if not ended:
                    pool.check()
                for future in ended:
                    spec = futures.pop(future)
                    try:
                        result = future.result()
                    except (Exception, CancelledError) as error:
                        losses[spec] += 1
                        if not _is_loss(error):
                            raise
                        if losses[spec] < LOSSES and not _is_final(error):
                            pool.check()
                            self._events(spec, CellEvent(again=f"its worker was lost ({type(error).__name__})"))
                            submit(spec)
                            continue
                        result = _lost(spec, error)
                    if self._store is not None:
                        self._store.put(result)
                    results[spec] = result
                    self._events(spec, CellEvent(ended=result))
                    if self._store is not None and result.inputs.get("code", code) != code:
                        note = "the code was changed while it ran; the next comparison runs it again"
                        self._events(spec, CellEvent(note=note))
        except BaseException:
            for future in futures:
                future.cancel()
            pool.stop(self.run_id)
            raise
        return results


def _is_loss(error: BaseException) -> bool:
    """Whether the error means that a worker was lost. Any other error is a bug of offmap."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"CancelledError", "BrokenExecutor", "KilledWorker", "CommClosedError", "CellStopped"})


def _is_final(error: BaseException) -> bool:
    """Whether dask has already tried the cell on several workers (distributed.scheduler.allowed-failures)."""
    return any(cls.__name__ == "KilledWorker" for cls in type(error).__mro__)


def _lost(spec: CellSpec, error: BaseException) -> CellResult:
    reason = f"its worker was lost several times, the last time by {type(error).__name__}: {error}"
    return CellResult(spec=spec, outcome=CellOutcome.FAILED, reason=reason)


def first_failure(results: Sequence[CellResult]) -> OffmapError | None:
    """An error that names the first cell that failed; None if every cell came to a result."""
    failed = [result for result in results if result.outcome in {CellOutcome.FAILED, CellOutcome.DEADLINE}]
    if not failed:
        return None
    first = failed[0]
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    reason = first.reason.splitlines()[0] if first.reason else first.outcome.value
    return OffmapError(f"{first.spec.title}: {reason}{more}", "run it again: only what is missing is run")
