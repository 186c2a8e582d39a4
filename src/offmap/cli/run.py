"""``offmap run``: one guest, its console on standard input and output, everything else on standard error."""

import atexit
import contextlib
import os
import signal
import time

from offmap import __version__
from offmap.cli.boot_options import add_boot_options, boot_of, file_name
from offmap.cli.devices import add_device_options, device_specs
from offmap.cli.log import draws
from offmap.cli.populate_progress import PopulateProgress
from offmap.cli.self_audit import SelfAudit
from offmap.errors import ExitStatus, OffmapError
from offmap.hide import Vet
from offmap.log import Logger
from offmap.memory.backend import BACKENDS, parse_backend
from offmap.typed import TYPE_CHECKING
from offmap.units import format_size, parse_size
from offmap.vmm.config import MAX_VCPUS, MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.session import Session
from offmap.vmm.vcpu_loop import ExitCounts

if TYPE_CHECKING:
    import argparse

    from offmap.vmm.confinement import Confinement


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``run``."""
    parser = subparsers.add_parser(
        "run",
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
        "--no-sandbox", action="store_true", help="do not confine this process; for machines where that cannot be"
    )
    parser.add_argument(
        "--report", type=file_name, metavar="FILE", help="at the end, write what was measured to FILE (JSON)"
    )
    add_device_options(parser)
    parser.set_defaults(run=run)


_say = Logger("offmap.cli.run").info


def run(args: "argparse.Namespace") -> int:
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
    report = _Report(args.report) if args.report is not None else None
    confinement: Confinement | None = None
    if args.no_sandbox:
        red, plain = ("\x1b[31m", "\x1b[0m") if draws() else ("", "")
        _say(f"{red}no sandbox: a guest that breaks into this process has all that it may do on this host{plain}")
    else:
        from offmap.vmm import confinement as confining

        opened = report.open if report else _nothing
        start_audit = audit.start if args.audit else lambda _pid: None
        confinement = confining.Confinement(start_audit, lambda wait: audit.finish(wait=wait), opened)
        atexit.register(confinement.close)
        backend.keeper = confinement.broker
    started = time.monotonic()
    up_after: list[float] = []

    def on_up(machine: Machine) -> None:
        up_after.append(time.monotonic() - started)
        if args.audit and confinement is not None:
            confinement.broker.audit()
        elif args.audit:
            audit.start()

    def verdict(*, wait: bool) -> int | None:
        if confinement is None:
            return audit.finish(wait=wait)
        return confinement.broker.verdict(wait=wait) if args.audit else None

    def on_end(machine: Machine) -> None:
        # Before there is no guest RAM left to look at. A job may be done long before its audit is.
        verdict(wait=args.exec is not None)
        if args.stats:
            _print_stats(machine, up_after[0] if up_after else None)
            _say(f"sandbox: {confinement or 'none'}")
        if report is not None:
            report.write(machine, up_after[0] if up_after else None, confinement)

    command_status: int | None = None
    error: OffmapError | None = None
    try:
        if args.exec is None:
            hvc = args.console == "virtio"
            session = Session(config, hvc=hvc, say=_say, on_up=on_up, on_end=on_end, confinement=confinement)
            error = session.run().error
        else:
            from offmap.guests.job import Job

            with Job(args.exec) as job:
                command_status = job.run(config, say=_say, on_up=on_up, on_end=on_end, confinement=confinement)
    finally:
        progress.clear()
        audited = verdict(wait=False)
    if error is not None:
        raise error
    if command_status is not None:
        if args.audit and audited != ExitStatus.DONE:
            raise OffmapError(
                f"the command ended with status {command_status}, but its guest was not found hidden",
                "see the audit's own lines above",
            )
        return command_status
    if args.audit:
        if audited is None:
            _say("the guest ended before its audit did: no verdict")
            return ExitStatus.UNDETERMINED
        return audited
    return ExitStatus.DONE


def _nothing() -> None:
    pass


class _Report:
    """The file of ``--report``, opened while this process still may.

    Args:
        path: of the file, which is not touched before there is a guest to report of.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def open(self) -> None:
        """Open the file, and import what writing to it needs."""
        import json  # noqa: F401

        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from None

    def write(self, machine: Machine, up_after: float | None, confinement: "Confinement | None") -> None:
        """Write what was measured. Raises OffmapError: it cannot be written."""
        if self._fd < 0:
            self.open()
        try:
            with contextlib.suppress(OSError):  # what is no regular file has no length
                os.ftruncate(self._fd, 0)
            data = _report(machine, up_after, confinement).encode()
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> OffmapError:
        return OffmapError(f"cannot write the report {self._path}: {error.strerror}", "give another file")


def _report(machine: Machine, up_after: float | None, confinement: "Confinement | None") -> str:
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
        **({"sandbox": None} if confinement is None else confinement.to_json()),
        "populate_seconds": round(machine.ram.populate_seconds, 4),
        "init_seconds": None if up_after is None else round(up_after, 4),
        "nested_pages": mapped and mapped.by_size(),
        "exits": {" ".join((kind, f"{where:#x}", way)).strip(): n for (kind, where, way), n in counts.most_common()},
    }
    return json.dumps(report, indent=2) + "\n"


def _print_stats(machine: Machine, up_after: float | None) -> None:
    _say(f"{format_size(machine.ram.memory.size)} of RAM ready in {machine.ram.populate_seconds:.3f} s")
    if up_after is not None:
        _say(f"init after {up_after:.3f} s")
    _say(f"nested page tables: {machine.mapped_pages() or 'this KVM does not tell'}")
    counts = machine.exit_counts or ExitCounts()
    _say(f"{sum(counts.values())} exits to user space")
    for (kind, where, direction), count in sorted(counts.items(), key=lambda item: -item[1])[:20]:
        _say(f"{count:>9} {kind} {where:#x} {direction}")
