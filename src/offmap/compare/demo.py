"""The demonstration: one disposable host, a guest on each kind of RAM, and what the host kernel can reach of each."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offmap import __version__
from offmap.audit.verdict import Verdict
from offmap.compare.cell import Cell, Outcome
from offmap.compare.guest import guest_initramfs
from offmap.compare.vm_process import QEMU
from offmap.errors import ExitStatus, OffmapError
from offmap.kmod.lab_module import lab_module
from offmap.lab.errors import LabError, LabPanic
from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel

__all__ = ["BACKENDS", "HIDING", "Demo", "DemoResult", "Surprise", "check", "run_demo"]

SCHEMA = "offmap-demo/1"
PLAIN = ("anon", "memfd")
"""The positive control."""
OF_THE_MODULE = ("unplugged", "secretmem-bridge", QEMU)
"""Need offmap.ko in the host."""
HIDING = ("reserved", *OF_THE_MODULE)
REFUSED = ("secretmem",)
"""By every stock kernel's GUP."""
BACKENDS = (*PLAIN, *HIDING, *REFUSED)
CANARIES = 64

_MEMORY_SIZE = "256M"
_HOST_MEMORY = "1536M"
_HOST_CMDLINE = "memmap=256M$0x40000000"  # 256 MiB at 1 GiB, for `reserved`
_DEADLINE = 600.0

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Surprise:
    """Something that did not come out as the demonstration claims."""

    backend: str
    what: str
    exit_status: ExitStatus


@dataclass(frozen=True, slots=True)
class Demo:
    """Where and how to run it.

    Attributes:
        out: folder for the report and the guest's initramfs.
        kernel_spec: the host kernel (offmap.lab.provision.host_kernel), which is the guest's too.
        accel: of the disposable host: auto, tcg or kvm.
        backends: which to try, in order.
    """

    out: Path
    kernel_spec: str | None = None
    modules: Path | None = None
    accel: str = "auto"
    backends: tuple[str, ...] = BACKENDS


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
    kernel = host_kernel(demo.kernel_spec, demo.modules)
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

    backends = demo.backends
    left_out = ""
    module: Path | None = None
    if set(backends) & set(OF_THE_MODULE):
        report({"stage": "building the offmap module for it"})
        try:
            module = lab_module(kernel)
        except OffmapError as error:
            backends = tuple(b for b in backends if b not in OF_THE_MODULE)
            left_out = f"{', '.join(b for b in demo.backends if b in OF_THE_MODULE)} left out: {error}"
    report({"stage": f"booting a disposable host, Linux {kernel.release}"})
    try:
        with LabHost.start(kernel, memory=_HOST_MEMORY, cmdline=_HOST_CMDLINE, out=out, accel=demo.accel) as lab:
            if module is not None and lab.run(["insmod", str(module)], stdout=2) != 0:
                raise LabError(f"the disposable host does not load {module}", "see why on its console")
            argv: list[str] = [
                *(sys.executable, "-m", "offmap.compare.trial", "--kernel", str(kernel.vmlinuz)),
                *("--initrd", str(initrd), "--memory-size", _MEMORY_SIZE, "--canaries", str(CANARIES)),
                *backends,
            ]
            lines = _Lines(event)
            errors = bytearray()
            status = lab.run(argv, stdout=lines.feed, stderr=errors.extend, timeout=_DEADLINE)
            if status != ExitStatus.DONE:
                last = errors.decode(errors="replace").strip().splitlines()[-1:]
                raise LabError(f"the trial ended with status {status} in the disposable host: {''.join(last)}")
    except LabPanic as panic:
        # The oops is a result: of the backend that was being tried.
        if not tried:
            raise
        event(
            {
                "cell": Cell(
                    backend=tried[-1],
                    host_kernel=kernel.release,
                    guest_kernel="",
                    outcome=Outcome.OOPS,
                    reason=panic.oops,
                ).to_json()
            }
        )
    surprises = tuple(check(cells, backends))
    cells = without_control(cells)
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


class _Lines:
    """Turns a stream of bytes into events, a line of JSON each."""

    def __init__(self, event: Report) -> None:
        self._event = event
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise LabError(f"the trial in the disposable host said {line[:80]!r}, which is no event")
            self._event(event)


def check(cells: Iterable[Cell], backends: Iterable[str] = BACKENDS) -> Iterable[Surprise]:
    """Hold what was measured against what is claimed: of each kind of RAM, on a stock kernel.

    The plain kinds are the positive control: where their canaries are not found, nothing that was not found counts.
    """
    by_backend = {cell.backend: cell for cell in cells}
    for backend in backends:
        cell = by_backend.get(backend)
        if cell is None:
            yield Surprise(backend, "was not tried", ExitStatus.FAILED)
        elif backend in REFUSED:
            if cell.outcome is not Outcome.REFUSED or "GUP" not in cell.reason:
                text = f"was to be refused by GUP, but {cell.outcome.value}: {_first_line(cell.reason)}"
                yield Surprise(backend, text, ExitStatus.FAILED)
        elif backend in HIDING and (cell.verdict is Verdict.EXPOSED or cell.canaries_found):
            yield from _check_hidden(cell)  # graver than whatever else went wrong
        elif cell.outcome is not Outcome.BOOTED:
            yield Surprise(backend, f"{cell.outcome.value}: {_first_line(cell.reason)}", ExitStatus.FAILED)
        elif cell.canaries_planted != CANARIES:
            yield Surprise(backend, f"planted {cell.canaries_planted} canaries, not {CANARIES}", ExitStatus.FAILED)
        elif backend in HIDING:
            yield from _check_hidden(cell)
        elif cell.verdict is not Verdict.EXPOSED or cell.canaries_found != CANARIES:
            text = f"the positive control failed: {cell.verdict and cell.verdict.value}, {cell.canaries_found} canaries"
            yield Surprise(backend, text, ExitStatus.UNDETERMINED)


def _check_hidden(cell: Cell) -> Iterable[Surprise]:
    if cell.verdict is Verdict.EXPOSED or cell.canaries_found:
        text = f"is exposed: {cell.direct_map_pages} pages in the direct map, {cell.alias_pages} aliased, "
        yield Surprise(cell.backend, text + f"{cell.canaries_found} canaries found", ExitStatus.EXPOSED)
    elif cell.verdict is not Verdict.HIDDEN or cell.canaries_found is None:
        text = f"cannot be said to be hidden: {_first_line(cell.reason)}"
        yield Surprise(cell.backend, text, ExitStatus.UNDETERMINED)


def without_control(cells: Iterable[Cell]) -> list[Cell]:
    """`cells`, where nothing is called hidden unless the same means found all of a plain guest's canaries."""
    cells = list(cells)
    controls = [cell for cell in cells if cell.backend in PLAIN and cell.outcome is Outcome.BOOTED]
    if controls and all(c.verdict is Verdict.EXPOSED and c.canaries_found == c.canaries_planted for c in controls):
        return cells
    reason = "the positive control failed, so what was not found proves nothing"
    return [
        replace(cell, verdict=Verdict.UNKNOWN, reason=reason) if cell.verdict is Verdict.HIDDEN else cell
        for cell in cells
    ]


def _first_line(reason: str) -> str:
    return next(iter(reason.splitlines()), "no reason given")
