"""``offmap lab selftests``: the kernel's own tests on a host kernel, compared with the stock kernel's run."""

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from offmap.cli.arguments import seconds
from offmap.cli.lab_options import add_machine_options, console_file
from offmap.cli.log import quiet_in_a_file
from offmap.errors import OffmapError
from offmap.log import Logger

if TYPE_CHECKING:
    from offmap.lab.host import LabHost
    from offmap.lab.kernel import HostKernel
    from offmap.lab.selftests_run import Comparison, Result

_log = Logger("offmap.cli")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``offmap lab selftests``."""
    parser = commands.add_parser(
        "selftests",
        help="run the kernel's own tests on a host kernel, and compare with the stock kernel's run",
        description="Build tests of the host kernel's source (tools/testing/selftests: memory-hotplug, mm, kvm), run "
        "them in disposable hosts with this kernel and with Debian's of the same series, and print how each ended. The "
        "status is 1 if one that passes on the stock kernel fails.",
    )
    parser.add_argument(
        "--host-kernel",
        metavar="KERNEL",
        help="patched:7.3, patched:7.3+debug or debian:7.3, … (default: the newest patched kernel)",
    )
    add_machine_options(parser)
    parser.add_argument("--timeout", type=seconds, metavar="S", help="end a test after S seconds (default: 2 minutes)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, with each test's cases")
    parser.add_argument(
        "test",
        nargs="*",
        metavar="NAME",
        help="mm/memfd_secret, or kvm for all of a collection (default: a short set)",
    )
    parser.set_defaults(run=run_selftests)


def run_selftests(args: argparse.Namespace) -> int:
    """Run ``offmap lab selftests``; the status is 1 if a test that passes on the stock kernel fails."""
    import msgspec

    from offmap.lab.provision import host_kernel
    from offmap.lab.selftests import DEFAULT, selftests, stock_of
    from offmap.lab.selftests_run import Comparison, Result, Runner, compare
    from offmap.lab.series import newest_series

    spec = args.host_kernel or newest_series().spec
    say = quiet_in_a_file(_log)
    stock = stock_of(spec)
    tests = selftests(spec, say)
    names = tests.names(args.test or DEFAULT)
    if unbuilt := tests.build(names, say):
        _log.info("these do not build here, and are left out: %s (see %s)", ", ".join(unbuilt), tests.log)
        names = [name for name in names if name not in unbuilt]
    if not names:
        raise OffmapError("none of these tests can be built here", f"see {tests.log}")
    found: list[tuple[str, dict[str, Result]]] = []
    with ExitStack() as stack:
        console = console_file(args.console, stack)
        for which in [*([stock] if stock else []), spec]:
            kernel = host_kernel(which, say=say)
            runner = Runner(partial(_start, kernel, args, console), tests.folder, args.timeout)
            found.append((kernel.release, runner.run(names, say)))
    (stock_release, before), (release, now) = found if stock else [("", {}), *found]
    result = Comparison(release, stock_release, [compare(name, before.get(name), now[name]) for name in names])
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
    else:
        _print(result)
    return 1 if result.worse else 0


def _start(kernel: "HostKernel", args: argparse.Namespace, console: BinaryIO | None) -> "LabHost":
    from offmap.lab.host import LabHost

    host = LabHost.start(kernel, args.memory, args.host_cmdline, accel=args.accel, console=console, nodes=args.nodes)
    # Built into a patched kernel. Tests of memory that fails give it back by this.
    host.output(["modprobe", "hwpoison_inject"])
    return host


def _print(result: "Comparison") -> None:
    """Print the table, then what got worse."""
    columns = [*([result.stock] if result.stock else []), result.kernel]
    rows = [["test", *columns]]
    for test in result.tests:
        runs = [*([test.stock] if test.stock else []), test.kernel]
        rows.append([test.name, *map(_cell, runs), "WORSE" if test.worse else ""])
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns) + 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=False)).rstrip())
    for line in result.worse:
        print(f"worse: {line}")
    for test in result.tests:
        if test.kernel.outcome != "ok" and not test.worse:
            print(f"{test.name}: {test.kernel.why}")


def _cell(run: "Result") -> str:
    """``ok (12 ok, 1 skip)``."""
    counts = [f"{count} {outcome}" for outcome in type(run.outcome) if (count := run.count(outcome))]
    return str(run.outcome) + (f" ({', '.join(counts)})" if counts else "")
