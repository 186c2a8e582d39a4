"""The demonstration: one disposable host, a guest on each kind of RAM, and what the host kernel can reach of each."""

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offmap import __version__
from offmap.compare.cell import Cell, Outcome, parse_guest_name
from offmap.compare.claims import CANARIES, PATCHED, STOCK, Row, Surprise, check, without_control
from offmap.compare.events import EventLines, Report
from offmap.compare.guest import guest_initramfs
from offmap.compare.vm_process import QEMU
from offmap.errors import ExitStatus, OffmapError
from offmap.kmod.lab_module import lab_module
from offmap.lab.errors import LabError, LabPanic
from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel

__all__ = ["Demo", "DemoResult", "claimed_rows", "run_demo"]

SCHEMA = "offmap-demo/1"
OF_THE_MODULE = ("unplugged", "secretmem-bridge", QEMU)
"""Need offmap.ko in the host."""

_MEMORY_SIZE = "256M"
_HOST_MEMORY = "1536M"
_HOST_CMDLINE = "memmap=256M$0x40000000"  # 256 MiB at 1 GiB, for `reserved`
_DEADLINE = 600.0


def claimed_rows(kernel_spec: str | None) -> tuple[Row, ...]:
    """Which guests to try on a host kernel (offmap.lab.provision.host_kernel), and what is claimed of each."""
    return PATCHED if (kernel_spec or "").startswith("patched:") else STOCK


@dataclass(frozen=True, slots=True)
class Demo:
    """Where and how to run it.

    Attributes:
        out: folder for the report and the guest's initramfs.
        kernel_spec: the host kernel (offmap.lab.provision.host_kernel). A stock one is the guest's too; the guest of a
            patched one is stock.
        accel: of the disposable host: auto, tcg or kvm.
    """

    out: Path
    kernel_spec: str | None = None
    modules: Path | None = None
    accel: str = "auto"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All cells, the facts of the host they ran on, and what did not come out as claimed.

    `left_out` says what could not be tried here and why, or is empty.
    """

    host: dict[str, Any]
    cells: tuple[Cell, ...]
    surprises: tuple[Surprise, ...]
    report: Path
    left_out: str = ""

    @property
    def exit_status(self) -> ExitStatus:
        """0 only if all came out as claimed; else the gravest surprise's: exposed before failed before unknown."""
        found = {surprise.exit_status for surprise in self.surprises}
        order = (ExitStatus.EXPOSED, ExitStatus.FAILED, ExitStatus.UNDETERMINED)
        return next((status for status in order if status in found), ExitStatus.DONE)


def run_demo(demo: Demo, report: Report) -> DemoResult:
    """Run it.

    Args:
        report: takes each event: ``{"stage": …}``, ``{"backend": …}``, ``{"host": …}``, ``{"cell": …}``.

    Raises:
        OffmapError: the disposable host could not be made, or the report not be written.
    """
    report({"stage": "getting the host kernel"})
    rows = claimed_rows(demo.kernel_spec)
    kernel = host_kernel(demo.kernel_spec, demo.modules, lambda line: report({"stage": line}))
    guest_kernel = host_kernel() if rows is PATCHED else kernel
    out = demo.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        initrd = out / "guest.initramfs"
        initrd.write_bytes(guest_initramfs())
        path = out / "report.json"
        path.unlink(missing_ok=True)  # an earlier run's, which would outlive an interrupted one
    except OSError as error:
        raise OffmapError(f"cannot write to {out}: {error.strerror}", "give another folder with --out") from None

    host: dict[str, Any] = {}
    cells: list[Cell] = []
    tried: list[str] = []

    def event(data: dict[str, Any]) -> None:
        if "host" in data:
            host.update(data["host"])
        if "backend" in data:
            tried.append(data["backend"])
        if "cell" in data:
            cells.append(Cell.from_json(data["cell"]))
        report(data)

    left_out = ""
    module: Path | None = None
    of_the_module = [row for row in rows if row.backend in OF_THE_MODULE]
    if of_the_module:
        report({"stage": "building the offmap module for it"})
        try:
            module = lab_module(kernel)
        except OffmapError as error:
            rows = tuple(row for row in rows if row not in of_the_module)
            left_out = f"{', '.join(row.name for row in of_the_module)} left out: {error}"
    report({"stage": f"booting a disposable host, Linux {kernel.release}"})
    try:
        with LabHost.start(kernel, memory=_HOST_MEMORY, cmdline=_HOST_CMDLINE, out=out, accel=demo.accel) as lab:
            if module is not None and lab.run(["insmod", str(module)], stdout=2) != 0:
                raise LabError(f"the disposable host does not load {module}", "see why on its console")
            argv: list[str] = [
                *(sys.executable, "-m", "offmap.compare.trial", "--kernel", str(guest_kernel.vmlinuz)),
                *("--initrd", str(initrd), "--memory-size", _MEMORY_SIZE, "--canaries", str(CANARIES)),
                *(row.name for row in rows),
            ]
            lines = EventLines(event)
            errors = bytearray()
            status = lab.run(argv, stdout=lines.feed, stderr=errors.extend, timeout=_DEADLINE)
            if status != ExitStatus.DONE:
                last = errors.decode(errors="replace").strip().splitlines()[-1:]
                raise LabError(f"the trial ended with status {status} in the disposable host: {''.join(last)}")
    except LabPanic as panic:
        # The oops is a result: of the backend that was being tried.
        if not tried:
            raise
        backend, kvm_clock = parse_guest_name(tried[-1])
        event(
            {
                "cell": Cell(
                    backend=backend,
                    kvm_clock=kvm_clock,
                    host_kernel=kernel.release,
                    guest_kernel="",
                    outcome=Outcome.OOPS,
                    reason=panic.oops,
                ).to_json()
            }
        )
    surprises = tuple(check(cells, rows))
    cells = without_control(cells, rows)
    result = {
        "schema": SCHEMA,
        "offmap": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host,
        "cells": [cell.to_json() for cell in cells],
        "left_out": left_out,
        "surprises": [{"backend": s.backend, "what": s.what} for s in surprises],
    }
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise OffmapError(f"cannot write {path}: {error.strerror}", "give another folder with --out") from None
    return DemoResult(host, tuple(cells), surprises, path, left_out)
