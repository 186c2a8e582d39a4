"""``offmap demo``: guests on plain and on hidden RAM, in disposable hosts."""

import argparse
import sys
from pathlib import Path

from offmap.cli.signals import ended_by_signals
from offmap.errors import ExitStatus


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        description="Boot a real guest on each kind of RAM, in disposable hosts. Each guest plants secrets in "
        "its RAM; the audit then walks the host kernel's page tables and reads all that they map.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--host-kernel",
        metavar="KERNEL",
        help="debian:6.12, running, or a bzImage; patched:7.3: the kinds of RAM that need its patches",
    )
    parser.add_argument("--modules", type=Path, metavar="DIR", help="lib/modules/RELEASE folder of a bzImage")
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto", help="of the disposable host")
    parser.add_argument(
        "--firecracker", type=Path, metavar="PATH", help="instead of the released one, which is fetched"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it.

    Returns:
        0 if every kind of RAM came out as claimed; see DemoResult.exit_status.
    """
    from offmap.cli.demo_progress import DemoProgress
    from offmap.compare.demo import claims_of, run_demo
    from offmap.compare.report.demo import PipedConsole, attack_lines, cells_table
    from offmap.lab.firecracker import own_firecracker
    from offmap.lab.provision import default_spec

    console = PipedConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
    kernel, firecracker = args.host_kernel or default_spec(), own_firecracker(args.firecracker)
    with ended_by_signals(), DemoProgress(console, len(claims_of(kernel))) as progress:
        result = run_demo(args.out, kernel, args.modules, args.accel, progress.event, progress.line, firecracker)
    console.print()
    facts = result.host
    console.print(f"On Linux {facts.kernel or '?'}, {facts.memory_bytes >> 20} MiB, {facts.cpu or '?'}:")
    console.print()
    console.print(cells_table(result.cells))
    for line in attack_lines(result.cells):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    for cell in result.cells:
        if cell.outcome.value != "booted":
            console.print(f"{cell.name} {cell.outcome.value}: {cell.reason}", markup=False, soft_wrap=True)
    if result.left_out:
        console.print(result.left_out, markup=False, soft_wrap=True)
    for mismatch in result.mismatches:
        console.print(f"not as claimed: {mismatch.row} {mismatch.what}", markup=False, soft_wrap=True)
    if result.exit_status is ExitStatus.DONE:
        console.print("All as claimed: what was to be found was found, and nothing of what was to be hidden.")
    console.print(f"Report: {args.out / 'report.json'}", markup=False)
    return result.exit_status
