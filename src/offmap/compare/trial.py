"""Try one backend on the host this runs on: boot a guest, have it plant canaries, audit it while it lives, end it.

Runs inside the disposable host (``python -m offmap.compare.trial``), and reports each step as a line of JSON on
standard output: ``{"stage": …, "share": …}`` as it goes, ``{"cell": …}`` at the end of each backend.
"""

import argparse
import json
import os
import platform
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmap.audit.audit import AuditResult, Stage, audit_process
from offmap.audit.canary import CanaryKey, new_key
from offmap.audit.host import host_facts
from offmap.audit.verdict import Verdict
from offmap.compare.cell import Cell, Outcome
from offmap.compare.guest import PLANTED, READY, canary_parameters
from offmap.errors import ExitStatus, OffmapError, Undetermined

__all__ = ["Trial", "main"]

_BOOT_DEADLINE = 120.0  # seconds; a guest under emulation takes 3 to 20
_POWER_OFF_DEADLINE = 30.0
_READY = re.compile(re.escape(READY) + r", Linux (\S+)")
_NOTHING = re.compile(r"(?!)")
_PLANTED = re.compile(PLANTED.format(r"(\d+)"))

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """What to boot.

    Attributes:
        canaries: how many the guest plants.
    """

    kernel: Path
    initrd: Path
    memory_size: str
    canaries: int

    def run(self, backend: str, report: Report) -> Cell:
        """Try `backend` and say how it went; whatever fails is the cell's outcome, not an exception."""
        before = _direct_map_4k_kib()
        key = new_key()
        with tempfile.TemporaryDirectory() as folder:
            guest = _Guest(self, backend, key, Path(folder))
            with guest:
                report({"stage": "booting"})
                console = guest.wait_for(_READY, _BOOT_DEADLINE)
                booted = _READY.search(console)
                if booted is None:
                    return self._not_booted(backend, guest)
                boot_seconds = time.monotonic() - guest.started
                planted = _PLANTED.search(console)
                audit, blind = self._audit(guest.pid, key, report)
                report({"stage": "ending"})
                status = guest.power_off()
            measured = guest.measured()
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
            reason = f"the VMM ended with status {status}: {guest.complaint()}"
        return Cell(
            backend=backend,
            host_kernel=platform.release(),
            guest_kernel=booted[1],
            outcome=Outcome.BOOTED if status == ExitStatus.DONE else Outcome.FAILED,
            reason=reason,
            canaries_planted=int(planted[1]) if planted else 0,
            populate_seconds=measured.get("populate_seconds"),
            boot_seconds=round(boot_seconds, 3),
            direct_map_4k_delta_kib=_direct_map_4k_kib() - before,
            **({"verdict": Verdict.UNKNOWN} | facts),
        )

    def _audit(self, pid: int, key: CanaryKey, report: Report) -> tuple[AuditResult | None, str]:
        def progress(stage: Stage, share: float) -> None:
            report({"stage": stage.value, "share": round(share, 3)})

        try:
            result = audit_process(pid, scan=key, progress=progress)
        except Undetermined as error:
            return None, str(error)
        return result, "; ".join(result.notes)

    def _not_booted(self, backend: str, guest: "_Guest") -> Cell:
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
            reason=reason,
        )


class _Guest:
    """``offmap run`` as a process of its own, its console on pipes; a context manager that leaves none behind."""

    def __init__(self, trial: Trial, backend: str, key: CanaryKey, folder: Path) -> None:
        self._errors = folder / "stderr"
        self._report = folder / "report.json"
        command_line = f"console=ttyS0 quiet {canary_parameters(key, trial.canaries)}"
        self._argv = [
            *(sys.executable, "-m", "offmap", "run"),
            *("--kernel", str(trial.kernel), "--initrd", str(trial.initrd), "--cmdline", command_line),
            *("--memory", backend, "--memory-size", trial.memory_size, "--report", str(self._report)),
        ]
        self._console = bytearray()

    def __enter__(self) -> "_Guest":
        with self._errors.open("wb") as errors:
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_POWER_OFF_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: re.Pattern[str], seconds: float) -> str:
        """Read the console until it matches, ends, or `seconds` have passed; returns all it said so far."""
        deadline = time.monotonic() + seconds
        console = self._process.stdout
        if console is None:
            return ""
        with selectors.DefaultSelector() as selector:
            selector.register(console, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0 and selector.select(left):
                data = os.read(console.fileno(), 65536)
                self._console += data
                if not data:
                    self._process.wait()
                    break
                if pattern.search(self._text()):
                    break
        return self._text()

    def _text(self) -> str:
        return self._console.decode(errors="replace")

    def power_off(self) -> int | None:
        """Ask the guest's shell to; the VMM's exit status, or None if it did not end in time."""
        if self._process.stdin is not None:
            self._process.stdin.write(b"poweroff -f\n")
        self.wait_for(_NOTHING, _POWER_OFF_DEADLINE)  # to the end of the console
        return self._process.poll()

    def status(self) -> int | None:
        return self._process.poll()

    def complaint(self) -> str:
        """The VMM's last line on standard error, without the command's name."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("offmap run: ") if lines else ""

    def measured(self) -> dict[str, Any]:
        """What the VMM wrote down at its end."""
        try:
            data: dict[str, Any] = json.loads(self._report.read_text())
        except (OSError, ValueError):
            return {}
        return data


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
    parser.add_argument("backends", nargs="+")
    args = parser.parse_args(argv)

    def report(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    report({"host": host_facts().to_json()})
    trial = Trial(args.kernel, args.initrd, args.memory_size, args.canaries)
    for backend in args.backends:
        report({"backend": backend})
        try:
            cell = trial.run(backend, report)
        except OffmapError as error:
            cell = Cell(
                backend=backend,
                host_kernel=platform.release(),
                guest_kernel="",
                outcome=Outcome.FAILED,
                reason=str(error),
            )
        report({"cell": cell.to_json()})
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
