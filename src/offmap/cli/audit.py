"""``offmap audit``: which pages of a VM can the host kernel reach."""

import argparse
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from offmap.cli.audit_evidence import EvidenceOutput, add_evidence_options, add_verify, run_verify
from offmap.cli.audit_output import Output, add_output_options, add_without_audit, merge, print_schema
from offmap.cli.log import draws
from offmap.errors import OffmapError
from offmap.uapi.page import PAGE_SIZE
from offmap.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from offmap.audit.audit import Snapshot, Stage
    from offmap.audit.guest_ram import RamRange
    from offmap.audit.oracle import Sample
    from offmap.audit.scan import Wanted

_MOST_THREADS = 64
_LONGEST_WATCH = 86400 * 365  # time.sleep() does not take just any number


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "audit",
        description="Find which pages of a VM's RAM the host kernel has mapped, in its direct map or anywhere else.",
        epilog="Exit status: 0 hidden, 1 exposed, 2 it failed or was used wrongly, 3 cannot be determined.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("pid", type=int, metavar="PID", nargs="?", help="the VMM's process")
    which.add_argument("--all", action="store_true", help="audit every process of this host that holds a KVM VM")
    add_without_audit(which)
    add_verify(which)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--scan",
        metavar="WHAT",
        help="also read all that the kernel has mapped, and say where these 8 to 4096 bytes stand: file:PATH, - for "
        "standard input, hex:DIGITS or text:WORDS (the last two leave copies in the shell that they are typed in)",
    )
    what.add_argument(
        "--canary", metavar="KEY", help="the same for all canaries that were made with this key (32 hex digits)"
    )
    parser.add_argument(
        "--scan-threads",
        type=int,
        metavar="N",
        help="threads that read at once (default: 2; on one processor 1)",
    )
    parser.add_argument(
        "--oracle",
        choices=["drgn"],
        help="ask drgn, too, about a random sample of pages and kernel addresses, and fail if it says something else",
    )
    parser.add_argument(
        "--oracle-sample",
        metavar="N[:SEED]",
        help="how many guest pages, kernel mappings and gaps to ask about (default: 256), and which (default: others "
        "each time)",
    )
    parser.add_argument(
        "--range",
        action="append",
        metavar="VA:LENGTH",
        help="audit these addresses of the process instead of its guest RAM (may be given several times)",
    )
    parser.add_argument(
        "--sharers",
        action="store_true",
        help="name the other processes that map the guest's pages too",
    )
    parser.add_argument(
        "--for",
        dest="seconds",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="walk the page tables again and again at random moments of so many seconds, at least 20 times (default: "
        "1); a mapping that was seen once is enough",
    )
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="audit again every SECONDS until the process ends, and report what changes; the exit status is the worst",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="with --watch: also trace what maps memory, so that a mapping is reported that lives between two audits",
    )
    parser.add_argument(
        "--remember",
        type=Path,
        metavar="FILE",
        help="keep in this file how often KVM saw the memory under each VM's slots exchanged, and compare it with what "
        "the last audit kept there: a VMM that exchanges it when an audit comes is found out",
    )
    add_output_options(parser)
    add_evidence_options(parser)
    parser.add_argument("--no-progress", action="store_true", help="show no progress, even on a terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Audit one process, or all that hold VMs; the exit status is that of the worst verdict."""
    output = Output(args)
    if args.json_schema:
        return print_schema()
    if args.verify is not None:
        return run_verify(args)
    # What keeps an audit from beginning must not leave an older verdict in the files either.
    with output.recording_failure():
        evidence = EvidenceOutput(args)
    if args.merge:
        return merge(args.merge, output)
    with ExitStack() as stack:
        with output.recording_failure():
            _check_options(args)
            ranges = [parse_range(text) for text in args.range] if args.range else None
            sample = parse_sample(args.oracle_sample) if args.oracle else None
            wanted = stack.enter_context(what_to_scan(args))
        return _audit(args, output, evidence, wanted, ranges, sample)


def _check_options(args: argparse.Namespace) -> None:
    """Make sure that the options go together. Raises OffmapError: they do not."""
    if args.watch is not None and not 0 < args.watch <= _LONGEST_WATCH:
        raise OffmapError(f"--watch takes seconds above 0, at most {_LONGEST_WATCH}", "give seconds, like --watch 10")
    if args.trace and args.watch is None:
        raise OffmapError("--trace is for the time between two audits", "add --watch SECONDS")
    if not 0 < args.seconds <= _LONGEST_WATCH:
        raise OffmapError(f"--for takes seconds above 0, at most {_LONGEST_WATCH}", "give seconds, like --for 10")
    if args.all and (args.range or args.watch is not None):
        raise OffmapError("--range and --watch are for one process", "give its PID instead of --all")
    if args.oracle_sample is not None and args.oracle is None:
        raise OffmapError("--oracle-sample is of use only to an oracle", "add --oracle drgn")


def _audit(
    args: argparse.Namespace,
    output: Output,
    evidence: EvidenceOutput,
    wanted: "Wanted | None",
    ranges: "list[RamRange] | None",
    sample: "Sample | None",
) -> int:
    """Audit what the options name; the exit status is that of the worst verdict."""
    from offmap.audit.audit import snapshot_processes
    from offmap.audit.process import own_start
    from offmap.audit.seen import Seen, SeenVm, seen_at
    from offmap.audit.vms import audit_every_vm
    from offmap.cli.audit_watch import watch

    shows = draws() and not args.no_progress

    since, kept = own_start(), Seen(args.remember)
    now: list[SeenVm] = []

    def audit_all(pids: "Sequence[int]") -> "dict[int, Snapshot | OffmapError]":
        nonlocal since
        began, after = time.monotonic_ns(), since
        try:
            snapshots = snapshot_processes(
                pids,
                since=after,
                seen=kept.vms,
                seconds=args.seconds,
                scan=wanted,
                ranges=ranges,
                progress=_show_progress if shows else None,
                threads=args.scan_threads,
                oracle=sample,
                sharers=args.sharers,
            )
            for one in snapshots.values():
                now.extend(() if isinstance(one, OffmapError) else seen_at(began, one.ram.vms))
            return snapshots
        finally:
            if args.watch is not None:
                since = began  # what changed before was told then
                kept.keep(now)
                now.clear()
            if shows:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def audit(pid: int) -> "Snapshot":
        if pid not in found:
            found.update(audit_all([pid]))
        one = found.pop(pid)
        if isinstance(one, OffmapError):
            raise one
        return one

    found: dict[int, Snapshot | OffmapError] = {}
    if args.watch is not None:
        return watch(args.pid, args.watch, lambda: audit(args.pid), output, args.trace)
    with output.recording_failure():
        if args.all:
            every = audit_every_vm(
                lambda vm: audit(vm.pid), lambda vms: found.update(audit_all([vm.pid for vm in vms]))
            )
            document, status = every.to_json(), every.exit_status
        else:
            result = audit(args.pid).audit
            document, status = result.to_json(), result.verdict.exit_status
    output.show(document, evidence.write)
    kept.keep(now)
    return int(status)


@contextmanager
def what_to_scan(args: argparse.Namespace) -> "Iterator[Wanted | None]":
    """What ``--scan`` or ``--canary`` asks for; a secret is wiped at the end.

    Raises:
        OffmapError: it cannot be scanned for.
    """
    from offmap.audit.canary import parse_key
    from offmap.audit.secret import parse_secret

    if args.scan_threads is not None and not 1 <= args.scan_threads <= _MOST_THREADS:
        raise OffmapError(f"{args.scan_threads} threads cannot scan", f"give 1 to {_MOST_THREADS}")
    if args.scan is not None:
        with parse_secret(args.scan) as secret:
            yield secret
    else:
        yield None if args.canary is None else parse_key(args.canary)


def parse_range(text: str) -> "RamRange":
    """``VA:LENGTH`` as whole pages. Raises OffmapError: malformed, empty or not made of pages."""
    from offmap.audit.guest_ram import RamRange
    from offmap.audit.result import Source

    try:
        address, length = text.split(":", 1)
        va = int(address, 16)
    except ValueError:
        raise OffmapError(f"{text!r} is not a range", "write VA:LENGTH, like 0x7f0000000000:256M") from None
    size = parse_size(length)
    # The user half of 5-level page tables ends at 2^56 (Documentation/arch/x86/x86_64/mm.rst).
    if va < 0 or size <= 0 or (va | size) % PAGE_SIZE or va + size > 1 << 56:
        raise OffmapError(
            f"{text!r} is not a range of whole pages of a process",
            "give an address below 2^56 and a length above 0, both multiples of 4096",
        )
    return RamRange(va, size, Source.REQUESTED)


def parse_sample(text: str | None) -> "Sample":
    """``N[:SEED]``, or the default. Raises OffmapError: not that."""
    from offmap.audit.oracle import Sample

    if text is None:
        return Sample()
    number, colon, seed = text.partition(":")
    if not (number.isascii() and number.isdigit() and int(number)) or (
        colon and not (seed.isascii() and seed.isdigit())
    ):
        raise OffmapError(f"{text!r} is no sample", "write how many, above 0, and a seed, like 1000 or 1000:42")
    return Sample(int(number), int(seed) if colon else None)


def _show_progress(stage: "Stage", share: float) -> None:
    """One line on a terminal's stderr, rewritten as the audit goes on."""
    print(f"\r\x1b[K{stage.value} {share:4.0%}", end="", file=sys.stderr, flush=True)
