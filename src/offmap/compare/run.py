"""Run a comparison: what its folder has is kept, the rest is measured on this machine or on a dask cluster."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from offmap.compare.capacity import cells_at_a_time
from offmap.compare.cell_result import CellResult
from offmap.compare.cell_run import Settings
from offmap.compare.events import Events
from offmap.compare.inputs import code_digest
from offmap.compare.matrix import longest_first
from offmap.compare.probes.guest_program import guest_program
from offmap.compare.scheduler import Pool, Scheduler, local_pool
from offmap.compare.spec import NATIVE, CellSpec
from offmap.compare.store import Store
from offmap.errors import OffmapError
from offmap.lab.initramfs import busybox
from offmap.lab.qemu import find_qemu


def run_cells(
    specs: Sequence[CellSpec],
    out: Path,
    settings: Settings,
    events: Events,
    began: Callable[[int, int], None] = lambda _done, _at_a_time: None,
    *,
    jobs: int | None = None,
    dask: str | None = None,
) -> list[CellResult]:
    """Measure the cells that `out` has no result of; returns the results of all, in the order of `specs`.

    Args:
        events: takes what happens to each cell, from any thread.
        began: takes how many cells are done from before, and how many are run at a time.
        jobs: cells at a time; by default as many as processors and memory allow. Native ones run one by one.
        dask: the address of a cluster to run them on.

    Raises:
        OffmapError: a kernel or a tool is missing, `out` cannot be written, or there is no worker.
    """
    native = any(spec.host_kernel == NATIVE for spec in specs)
    if native and os.geteuid() != 0:
        raise OffmapError("measuring on the running kernel needs root", "run it with sudo")
    guest_program()  # without a compiler no cell can be measured
    jobs = 1 if native else jobs or cells_at_a_time()
    with ExitStack() as stack:
        scheduler = Scheduler(stack.enter_context(Store(out)), settings, events)
        done, to_run = scheduler.missing(specs)
        results = dict(done)
        if not to_run:
            began(len(done), jobs)
        else:
            pool: Pool
            if dask:
                from offmap.compare.cluster import cluster_pool  # needs distributed, which is optional

                kernels = tuple({name for spec in to_run for name in (spec.host_kernel, spec.guest_kernel)})
                pool = stack.enter_context(cluster_pool(dask, code_digest(), kernels))
            else:
                if not native:
                    find_qemu()
                    busybox()
                pool = stack.enter_context(local_pool(jobs))
            began(len(done), pool.at_a_time)
            results |= scheduler.run(longest_first(to_run), pool)
    return [results[spec] for spec in specs]
