"""Try one backend on the host this runs on: boot a guest, have it plant canaries, audit it while it lives, end it.

Runs inside the disposable host (``python -m offmap.compare.trial``), and reports each step as a line of JSON on
standard output: ``{"backend": …}`` at the beginning of each guest, ``{"stage": …, "share": …}`` as it goes, and
``{"cell": …}`` at its end.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmap.audit.audit import AuditResult, Stage, audit_process
from offmap.audit.canary import CanaryKey, new_key
from offmap.audit.guest_ram import RamRange
from offmap.audit.host import host_facts
from offmap.audit.verdict import Verdict
from offmap.compare.cell import Cell, Outcome, guest_name, parse_guest_name
from offmap.compare.claims import KVM_CLOCK
from offmap.compare.guest import CLOCKSOURCE, PLANTED, READY, canary_parameters
from offmap.compare.vm_process import QEMU, Boot, VmProcess, device_ranges, offmap_command, qemu_command
from offmap.errors import ExitStatus, OffmapError, Undetermined

__all__ = ["Trial", "main"]

_BOOT_DEADLINE = 120.0  # seconds; a guest under emulation takes 3 to 20
_READY = re.compile(re.escape(READY) + r", Linux (\S+)\r?\n")
_PLANTED = re.compile(PLANTED.format(r"(\d+)") + r"\r?\n")
_CLOCKSOURCE = re.compile(re.escape(CLOCKSOURCE) + r" (\S+)\r?\n")

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """What to boot.

    Attributes:
        canaries: how many the guest plants.
        kvm_clock: on, off, or auto, as ``offmap run`` takes it.
    """

    kernel: Path
    initrd: Path
    memory_size: str
    canaries: int
    kvm_clock: str = "auto"

    def run(self, backend: str, report: Report) -> Cell:
        """Try `backend` and say how it went; whatever fails is the cell's outcome, not an exception."""
        before = _direct_map_4k_kib()
        key = new_key()
        with tempfile.TemporaryDirectory() as folder:
            command_line = f"console=ttyS0 quiet {canary_parameters(key, self.canaries)}"
            if self.kvm_clock != "auto":
                # A guest that has both may prefer the TSC: what it uses shall tell what it has.
                command_line += f" clocksource={KVM_CLOCK}"
            boot = Boot(self.kernel, self.initrd, self.memory_size, command_line, self.kvm_clock)
            argv = qemu_command(boot) if backend == QEMU else offmap_command(boot, backend, Path(folder))
            guest = VmProcess(argv, Path(folder))
            with guest:
                report({"stage": "booting"})
                console = guest.wait_for(_READY, _BOOT_DEADLINE)
                booted = _READY.search(console)
                if booted is None:
                    return self._not_booted(backend, guest)
                boot_seconds = time.monotonic() - guest.started
                planted = _PLANTED.search(console)
                clocksource = _CLOCKSOURCE.search(console)
                ranges = device_ranges(guest.pid) if backend == QEMU else None
                audit, blind = self._audit(guest.pid, key, ranges, report)
                report({"stage": "ending"})
                status = guest.power_off()
            measured = guest.measured()
            complaint = guest.complaint()
        facts: dict[str, Any] = {}
        if audit is not None:
            pages = audit.pages
            facts = {
                "verdict": audit.verdict,
                "ram_pages": pages.ram_pages,
                "pages_populated": pages.pages_populated,
                "direct_map_pages": pages.direct_map_pages,
                "alias_pages": pages.alias_pages,
                "unknown_pages": pages.unknown_pages,
                "excluded_pages": pages.excluded_pages,
                "canaries_found": audit.canaries_found,
                "scanned_bytes": audit.scan.bytes_scanned if audit.scan else None,
                "walk_seconds": round(audit.mappings.seconds, 3),
                "scan_seconds": round(audit.scan.seconds, 3) if audit.scan else None,
            }
        reason = blind
        if status != ExitStatus.DONE:
            reason = f"the VMM ended with status {status}: {complaint}"
        return Cell(
            backend=backend,
            host_kernel=platform.release(),
            guest_kernel=booted[1],
            outcome=Outcome.BOOTED if status == ExitStatus.DONE else Outcome.FAILED,
            kvm_clock=self.kvm_clock,
            clocksource=clocksource[1] if clocksource else None,
            reason=reason,
            canaries_planted=int(planted[1]) if planted else 0,
            populate_seconds=measured.get("populate_seconds"),
            boot_seconds=round(boot_seconds, 3),
            direct_map_4k_delta_kib=_direct_map_4k_kib() - before,
            **({"verdict": Verdict.UNKNOWN} | facts),
        )

    def _audit(
        self, pid: int, key: CanaryKey, ranges: list[RamRange] | None, report: Report
    ) -> tuple[AuditResult | None, str]:
        def progress(stage: Stage, share: float) -> None:
            report({"stage": stage.value, "share": round(share, 3)})

        try:
            result = audit_process(pid, scan=key, ranges=ranges, progress=progress)
        except Undetermined as error:
            return None, str(error)
        return result, "; ".join(result.notes)

    def _not_booted(self, backend: str, guest: VmProcess) -> Cell:
        status = guest.status()
        complaint = guest.complaint()
        refused = status == ExitStatus.FAILED and complaint.startswith("refused: ")
        if status is None:
            reason = f"the guest did not say it was ready within {_BOOT_DEADLINE:.0f} s"
        else:
            reason = complaint.removeprefix("refused: ") or f"the VMM ended with status {status}"
        return Cell(
            backend=backend,
            host_kernel=platform.release(),
            guest_kernel="",
            outcome=Outcome.REFUSED if refused else Outcome.FAILED,
            kvm_clock=self.kvm_clock,
            reason=reason,
        )


def _direct_map_4k_kib() -> int:
    match = re.search(r"^DirectMap4k:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Try each backend in turn; see the module's own text."""
    parser = argparse.ArgumentParser(prog="offmap.compare.trial")
    parser.add_argument("--kernel", type=Path, required=True)
    parser.add_argument("--initrd", type=Path, required=True)
    parser.add_argument("--memory-size", required=True)
    parser.add_argument("--canaries", type=int, required=True)
    parser.add_argument("--kvm-clock", choices=("auto", "on", "off"), default="auto", help="where a guest names none")
    parser.add_argument("guests", nargs="+", type=parse_guest_name, metavar="BACKEND[:kvm-clock=on]")
    args = parser.parse_args(argv)

    def report(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    report({"host": host_facts().to_json()})
    for backend, named in args.guests:
        clock = args.kvm_clock if named == "auto" else named
        report({"backend": guest_name(backend, clock)})
        try:
            trial = Trial(args.kernel, args.initrd, args.memory_size, args.canaries, clock)
            cell = trial.run(backend, report)
        except OffmapError as error:
            cell = Cell(
                backend=backend,
                host_kernel=platform.release(),
                guest_kernel="",
                outcome=Outcome.FAILED,
                kvm_clock=clock,
                reason=str(error),
            )
        report({"cell": cell.to_json()})
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
