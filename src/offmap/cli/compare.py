"""``offmap compare``: every way of hiding, on every kernel, and what works, hides, breaks and costs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offmap.cli.arguments import count, seconds
from offmap.cli.signals import ended_by_signals
from offmap.errors import ExitStatus, OffmapError
from offmap.log import Logger

if TYPE_CHECKING:
    from rich.console import Console

    from offmap.compare.cell_result import CellResult
    from offmap.compare.matrix import Axes
    from offmap.compare.spec import CellSpec

_NAMED_KERNELS = ("debian:", "patched:")
_KEYWORDS = ("running", "native")
BOOTS = 5  # pairs: offmap.compare.questions.MIN_PAIRS, which is not imported before a comparison is run


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``compare``."""
    parser = subparsers.add_parser(
        "compare",
        description="Run a matrix of cells, each a guest on one kind of RAM in a disposable host of its own. Then "
        "write one report of all cells in the output folder. Results are kept: a second run goes on where the first "
        "one ended. An option that names an axis of the matrix may be given several times.",
        epilog="Without an axis: every kind of RAM on debian:6.12, with one guest. Exit status: 0 if every cell came "
        "to a result, be it a refusal or an oops; 2 if one failed or was not done in time.",
    )
    axes = parser.add_argument_group("the matrix")
    axes.add_argument("--full", action="store_true", help="all host kernels, guest kernels, 1 and 2 vCPUs, both clocks")
    axes.add_argument(
        "--backend",
        action="append",
        metavar="RAM",
        help="a kind of guest RAM; another VMM on one: qemu-unplugged, libvirt-pool, firecracker-anon, …",
    )
    axes.add_argument(
        "--host-kernel",
        action="append",
        metavar="KERNEL",
        help="debian:6.1, debian:6.12, debian:7.3, patched:7.3, running, or the path of a bzImage (its modules are "
        "looked for in lib/modules/RELEASE beside it, above it, and where they are installed)",
    )
    axes.add_argument("--guest-kernel", action="append", metavar="KERNEL", help="the same, for the guests")
    axes.add_argument("--vcpus", action="append", type=int, metavar="N", help="of a guest")
    axes.add_argument("--kvm-clock", action="append", choices=("auto", "on", "off"), help="offer it to the guest")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--out", type=Path, default=Path("out/compare"), metavar="DIR", help="default: %(default)s")
    how.add_argument("--jobs", type=count, metavar="N", help="cells at a time (default: as cores and memory allow)")
    how.add_argument(
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        help="for a cell (default: 900, more on a slower or busy machine)",
    )
    how.add_argument(
        "--boots",
        type=count,
        default=BOOTS,
        metavar="N",
        help="pairs of guests to time the boot of, by turns (default: %(default)s; fewer give no ratio)",
    )
    how.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="of the disposable hosts")
    how.add_argument("--firecracker", type=Path, metavar="PATH", help="instead of the released one, which is fetched")
    where = how.add_mutually_exclusive_group()
    where.add_argument("--dask", metavar="ADDRESS", help="on the workers of that dask cluster: tcp://HOST:8786")
    where.add_argument(
        "--native",
        action="store_true",
        help="on this machine's own kernel, one cell at a time, no disposable host",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say which cells there are and how they stand; run none")
    what.add_argument("--report-only", action="store_true", help="write the report of what is done; run none")
    what.add_argument("--json-schema", action="store_true", help="print the JSON Schema of report.json; run none")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it.

    Raises:
        OffmapError: the matrix makes no sense, a kernel cannot be had, the folder cannot be written, a cell failed.
    """
    from rich.console import Console

    from offmap.compare.matrix import cells_of

    if args.json_schema:
        from offmap.compare.report.document import compare_schema

        print(compare_schema(), end="", flush=True)
        return ExitStatus.DONE
    specs = cells_of(axes_of(args))
    if args.list:
        _list(specs, args.out)
        return ExitStatus.DONE
    console = Console(stderr=True, highlight=False)
    if args.report_only:
        _report(args.out, _kept(specs, args))
        return ExitStatus.DONE
    with ended_by_signals():
        results = _run(args, specs, console)
    _report(args.out, _beside_others(results, args.out))
    from offmap.compare.scheduler import first_failure

    if failure := first_failure(results):
        raise failure
    return ExitStatus.DONE


def axes_of(args: argparse.Namespace) -> "Axes":
    """The matrix that the command line asks for. Raises OffmapError: an axis cannot have that value."""
    from offmap.compare.matrix import DEFAULT_AXES, FULL_AXES
    from offmap.compare.spec import NATIVE

    hosts = [_kernel(name) for name in args.host_kernel or ()]
    if args.native:
        if hosts and hosts != [NATIVE]:
            raise OffmapError("--native measures on the running kernel", "leave out --host-kernel")
        hosts = [NATIVE]
    elif NATIVE in hosts:
        raise OffmapError("native is not the kernel of a disposable host", "give --native for the running one itself")
    base = FULL_AXES if args.full else DEFAULT_AXES
    guests = [_kernel(name) for name in args.guest_kernel or ()]
    if NATIVE in guests:
        raise OffmapError("a guest cannot be native", "give --guest-kernel running for the running kernel")
    return base.narrowed(args.backend, hosts, guests, args.vcpus, args.kvm_clock)


def _kernel(name: str) -> str:
    """The kernel's name; a path is made absolute, as it names cells wherever they are run from."""
    if name.startswith(_NAMED_KERNELS) or name in _KEYWORDS:
        return name
    return str(Path(name).absolute())


def _run(args: argparse.Namespace, specs: "Sequence[CellSpec]", console: "Console") -> "list[CellResult]":
    from offmap.cli.compare_progress import CompareProgress
    from offmap.compare.cell_run import Settings, usual_deadline
    from offmap.compare.run import run_cells
    from offmap.lab.firecracker import own_firecracker

    settings = Settings(
        deadline=args.deadline or usual_deadline(),
        accel=args.accel,
        boots=args.boots,
        firecracker=own_firecracker(args.firecracker),
    )
    with CompareProgress(console, len(specs)) as progress:
        return run_cells(specs, args.out, settings, progress.event, progress.began, jobs=args.jobs, dask=args.dask)


def _list(specs: "Sequence[CellSpec]", out: Path) -> None:
    from offmap.compare.inputs import code_digest
    from offmap.compare.store import read_cell

    for spec in specs:
        path = out / "cells" / f"{spec.key}.json"
        try:
            result = read_cell(path)
        except FileNotFoundError:
            state = "not run"
        except ValueError as error:
            state = f"damaged ({error})"
        else:
            state = f"{result.outcome.value}, {result.time}"
            if result.inputs.get("code") != code_digest():
                state += ", of other code"
        print(f"{spec.title}: {state}")
    print(f"{len(specs)} cells")


def _found(out: Path) -> "dict[CellSpec, CellResult]":
    """Every cell that the folder has."""
    from offmap.compare.store import read_cell

    found = {}
    for path in sorted((out / "cells").glob("*.json")):
        try:
            result = read_cell(path)
        except ValueError as error:
            Logger("offmap.cli.compare").warning("%s is left out: %s", path, error)
            continue
        found[result.spec] = result
    return found


def _beside_others(results: "Sequence[CellResult]", out: Path) -> "list[CellResult]":
    """These results, and those of earlier runs in the folder, so that a report shows all kernels side by side.

    Earlier cells may be of other code, kernels or machines: the report's notes (offmap.compare.report.notes) say so.
    """
    from offmap.compare.report.repeat import in_order

    return in_order([*(_found(out) | {result.spec: result for result in results}).values()])


def _kept(specs: "Sequence[CellSpec]", args: argparse.Namespace) -> "list[CellResult]":
    """The results in the folder: of the cells that were named, or of all if none were."""
    from offmap.compare.report.repeat import in_order

    found = _found(args.out)
    named = (
        args.full or args.native or any((args.backend, args.host_kernel, args.guest_kernel, args.vcpus, args.kvm_clock))
    )
    chosen = [found[spec] for spec in specs if spec in found] if named else [*found.values()]
    if not chosen:
        raise OffmapError(f"there is nothing in {args.out} to report", "run it without --report-only")
    return in_order(chosen)


def _report(out: Path, results: "Sequence[CellResult]") -> None:
    from offmap.compare.report.write import write_reports

    for path in write_reports(out, results):
        print(path)
