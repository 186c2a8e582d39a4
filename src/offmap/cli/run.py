"""``offmap run``: one guest, its console on standard input and output, everything else on standard error."""

import argparse
import signal
import time

from offmap import __version__
from offmap.cli.boot_options import add_boot_options, boot_of, file_name
from offmap.cli.devices import add_device_options, device_specs
from offmap.cli.populate_progress import PopulateProgress
from offmap.cli.self_audit import SelfAudit
from offmap.errors import ExitStatus, OffmapError
from offmap.hide import Vet
from offmap.log import Logger
from offmap.memory.backend import BACKENDS, parse_backend
from offmap.units import format_size, parse_size
from offmap.vmm.config import MAX_VCPUS, MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.session import Session
from offmap.vmm.vcpu_loop import ExitCounts


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``run``."""
    parser = subparsers.add_parser(
        "run",
        help="run a guest on RAM of the kind you choose",
        description="Run a guest. Its console is on standard input and output; Ctrl-A x quits.",
    )
    add_boot_options(parser)
    parser.add_argument(
        "--memory",
        default="anon",
        metavar="BACKEND[,option=value…]",
        help=f"where the RAM comes from: {', '.join(BACKENDS)} (default: %(default)s)",
    )
    parser.add_argument("--memory-size", default="256M", metavar="SIZE", help="bytes of RAM (default: %(default)s)")
    parser.add_argument("--vcpus", type=int, default=1, metavar="N", help=f"1 to {MAX_VCPUS} (default: %(default)s)")
    parser.add_argument(
        "--kvm-clock",
        choices=("auto", "on", "off"),
        default="auto",
        help="offer kvm-clock (auto: unless RAM is hidden)",
    )
    parser.add_argument(
        "--audit",
        nargs="?",
        choices=("once", "watch"),
        const="once",
        help="once the guest is up, audit this process and print the verdict on standard error; watch: again and again",
    )
    parser.add_argument("--stats", action="store_true", help="at the end, print times and VM exits on standard error")
    parser.add_argument(
        "--report", type=file_name, metavar="FILE", help="at the end, write what was measured to FILE (JSON)"
    )
    add_device_options(parser)
    parser.set_defaults(run=run)


_say = Logger("offmap.cli.run").info


def run(args: argparse.Namespace) -> int:
    """Run it.

    Returns:
        0 when the guest powered off, rebooted, or was quit from the terminal; with --audit, the audit's status in
        these cases. With --exec, the command's status.

    Raises:
        OffmapError: it could not be started, or it failed.
    """
    backend = parse_backend(args.memory)
    source, devices = boot_of(args)
    config = MachineConfig(
        source=source,
        backend=backend,
        memory_size=parse_size(args.memory_size),
        vcpus=args.vcpus,
        vetting=Vet(),
        kvm_clock={"auto": None, "on": True, "off": False}[args.kvm_clock],
        count_exits=args.stats or args.report is not None,
        devices=[*devices, *device_specs(args)],
        virtio_mmio_cmdline=args.virtio_mmio_cmdline,
    )
    progress = PopulateProgress(f"{format_size(config.memory_size)} of {backend.name} memory")
    backend.progress = progress
    # SIGPIPE would kill us without giving the memory back; Python ignores it unless somebody changed that.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    audit = SelfAudit(watch=args.audit == "watch")
    started = time.monotonic()
    up_after: list[float] = []

    def on_up(machine: Machine) -> None:
        up_after.append(time.monotonic() - started)
        if args.audit:
            audit.start()

    def on_end(machine: Machine) -> None:
        # Before there is no guest RAM left to look at. A job may be done long before its audit is.
        audit.finish(wait=args.exec is not None)
        if args.stats:
            _print_stats(machine, up_after[0] if up_after else None)
        if args.report is not None:
            _write_report(args.report, machine, up_after[0] if up_after else None)

    command_status: int | None = None
    error: OffmapError | None = None
    try:
        if args.exec is None:
            hvc = args.console == "virtio"
            error = Session(config, hvc=hvc, say=_say, on_up=on_up, on_end=on_end).run().error
        else:
            from offmap.guests.job import Job

            with Job(args.exec) as job:
                command_status = job.run(config, say=_say, on_up=on_up, on_end=on_end)
    finally:
        progress.clear()
        audited = audit.finish()
    if error is not None:
        raise error
    if command_status is not None:
        if args.audit and audited != ExitStatus.DONE:
            raise OffmapError(f"the command ended with status {command_status}, but its guest was not found hidden")
        return command_status
    if args.audit:
        if audited is None:
            _say("the guest ended before its audit did: no verdict")
            return ExitStatus.UNDETERMINED
        return audited
    return ExitStatus.DONE


def _write_report(path: str, machine: Machine, up_after: float | None) -> None:
    """What was measured of one run.

    `init_seconds` is from the start of the command to the guest's init; `nested_pages` counts the entries of each size
    in KVM's nested page tables at the end, null where KVM does not tell.
    """
    import json

    counts = machine.exit_counts or ExitCounts()
    mapped = machine.mapped_pages()
    report = {
        "schema": "offmap-run/1",
        "offmap": __version__,
        "backend": machine.config.backend.name,
        "ram_bytes": machine.ram.memory.size,
        "vcpus": machine.config.vcpus,
        "kvm_clock": machine.config.offers_kvm_clock,
        "outcome": machine.stopped.outcome.value if machine.stopped else None,
        **machine.ram.to_json(),
        "populate_seconds": round(machine.ram.populate_seconds, 4),
        "init_seconds": None if up_after is None else round(up_after, 4),
        "nested_pages": mapped and mapped.by_size(),
        "exits": {" ".join((kind, f"{where:#x}", way)).strip(): n for (kind, where, way), n in counts.most_common()},
    }
    try:
        with open(path, "w") as file:  # noqa: PTH123 - nothing of a run imports pathlib
            file.write(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise OffmapError(f"cannot write the report {path}: {error.strerror}", "give another file") from None


def _print_stats(machine: Machine, up_after: float | None) -> None:
    _say(f"{format_size(machine.ram.memory.size)} of RAM ready in {machine.ram.populate_seconds:.3f} s")
    if up_after is not None:
        _say(f"init after {up_after:.3f} s")
    _say(f"nested page tables: {machine.mapped_pages() or 'this KVM does not tell'}")
    counts = machine.exit_counts or ExitCounts()
    _say(f"{sum(counts.values())} exits to user space")
    for (kind, where, direction), count in sorted(counts.items(), key=lambda item: -item[1])[:20]:
        _say(f"{count:>9} {kind} {where:#x} {direction}")
