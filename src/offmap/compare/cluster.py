"""Runs cells on the workers of an existing dask.distributed cluster, through its executor interface.

A worker needs what this machine needs to run cells: offmap from the same checkout (``pip install 'offmap[dask]'``),
QEMU, busybox, and a cache for kernels. The worker fills that cache from its own mirror. It may be on this machine or on
another. Results come back through the cluster; workers share no files.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offmap.compare.cell_result import CellResult
from offmap.compare.cell_run import CellTask, run_cell
from offmap.compare.events import Events
from offmap.compare.running import stop_cells
from offmap.errors import OffmapError
from offmap.lab.installed import boot_id

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_SECONDS = "10s"


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker reports about itself.

    Attributes:
        reason: why it cannot run cells, and what to do; empty if it can.
        machine: the boot id of its machine.
        cells: how many cells its machine can run at a time.
    """

    reason: str
    machine: str
    cells: int


def worker_facts(code: str, kernels: tuple[str, ...]) -> WorkerFacts:
    """Report on the worker that runs this function.

    Args:
        code: the digest that its code must have.
        kernels: the kernels that cells will need, as CellSpec names them.
    """
    from offmap.compare.capacity import cells_at_a_time
    from offmap.compare.inputs import code_digest
    from offmap.compare.probes.guest_program import guest_program
    from offmap.lab.apt import have_apt
    from offmap.lab.cache import cache_folder
    from offmap.lab.initramfs import busybox
    from offmap.lab.qemu import find_qemu

    reason = ""
    try:
        find_qemu()
        busybox()
        cache_folder()
        guest_program()
        if code_digest() != code:
            raise OffmapError("its offmap is not the one here", "give it the same checkout")
        for kernel in kernels:
            if "/" in kernel and not os.access(kernel, os.R_OK):
                raise OffmapError(f"it has no {kernel}", "put the kernel on all machines at the same path")
            kept = cache_folder("kernels") / kernel.replace(":", "-") / "tree"
            if kernel.startswith("debian:") and not kept.is_dir() and not have_apt():
                raise OffmapError(f"it has no {kernel} in its cache, and no apt-get to get it", "run it on Debian")
    except OffmapError as error:
        reason = str(error)
    return WorkerFacts(reason, boot_id(), cells_at_a_time())


def unfit(facts: Mapping[str, object], threads: Mapping[str, int]) -> str:
    """Why these workers cannot run the cells, in one line; empty if they can.

    Args:
        facts: for the address of each worker, what `worker_facts` returned there, or the error that it ended in.
        threads: for the address of each worker, how many tasks it takes at a time.
    """
    at_a_time: dict[str, int] = {}
    fit: dict[str, WorkerFacts] = {}
    for address, told in facts.items():
        if not isinstance(told, WorkerFacts):
            return f"{address} cannot run cells: it has no offmap that answers ({_one_line(told)})"
        if told.reason:
            return f"{address} cannot run cells: {told.reason}"
        at_a_time[told.machine] = at_a_time.get(told.machine, 0) + threads.get(address, 1)
        fit[address] = told
    for address, told in fit.items():
        wanted = at_a_time[told.machine]
        if wanted > told.cells:
            return (
                f"the workers on the machine of {address} take {wanted} cells at a time, and it has processors and "
                f"memory for {told.cells}"
            )
    return ""


def _one_line(thing: object) -> str:
    return next(iter(str(thing).strip().splitlines()), type(thing).__name__)


class _Cluster:
    def __init__(self, client: "Client", executor: Executor) -> None:
        self._client = client
        self.executor = executor

    @property
    def at_a_time(self) -> int:
        return sum(self._client.nthreads().values())

    def call(self, _events: Events) -> Callable[[CellTask], CellResult]:
        return run_cell  # sent by its name: each worker calls its own copy. A worker sends no events back

    def check(self) -> None:
        workers: object = None
        with suppress(OSError):
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise OffmapError(
                "the cluster has no workers any more", "start some, and run it again: what is done is kept"
            )

    def stop(self, run: str) -> None:
        # Running tasks cannot be cancelled from outside; their hosts can be ended.
        with suppress(OSError, TimeoutError):
            self._client.run(stop_cells, run, on_error="ignore")


@contextmanager
def cluster_pool(address: str, code: str, kernels: tuple[str, ...] = ()) -> Iterator[_Cluster]:
    """Connect to the cluster whose scheduler is at `address`. Each of its workers must be able to run cells.

    Args:
        code: `code_digest` of this machine.
        kernels: the kernels that cells will need, as CellSpec names them.

    Raises:
        OffmapError: dask is not installed, there is no such cluster, or a worker cannot run cells.
    """
    try:
        from distributed import Client
    except ImportError:
        raise OffmapError("dask.distributed is not installed", "run: pip install 'offmap[dask]'") from None
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise OffmapError(
            f"there is no dask scheduler at {address} ({_one_line(error)})", "write it as tcp://HOST:8786"
        ) from None
    with client:
        threads = client.nthreads()
        if not threads:
            raise OffmapError(f"the cluster at {address} has no workers", "start some: dask worker ADDRESS")

        def ask() -> WorkerFacts:  # pickled whole: a worker without offmap can still say so
            from offmap.compare.cluster import worker_facts

            return worker_facts(code, kernels)

        if why := unfit(client.run(ask, on_error="return"), dict(threads)):
            raise OffmapError(why, "mend or stop that worker, and run it again")
        # pure=False: a cell that is run again is a new measurement.
        executor = client.get_executor(pure=False)
        try:
            yield _Cluster(client, executor)
        finally:
            executor.shutdown(wait=False)
