"""Run one cell: start a disposable host, or take one that the cell may share, and run the measuring program in it.

An oops, a panic or a hang of the host ends the cell. It is a result, not an exception, and earlier answers are kept.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import msgspec.structs

from offmap.audit.host import utc_now
from offmap.compare.cell_host import FOLDER, CellHost, CellHosts, HostKind
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.events import CellEvent, Report
from offmap.compare.facts import this_machine
from offmap.compare.inputs import code_digest, firecracker_input, inputs_of, module_input
from offmap.compare.job import FULL, Job, Preset
from offmap.compare.kinds import Vmm, kind_of
from offmap.compare.knowledge import knowledge_of
from offmap.compare.libvirt_host import libvirt_packages
from offmap.compare.matrix import known_refusal
from offmap.compare.native import refusal_here, run_here
from offmap.compare.probes.guest_image import probe_initramfs
from offmap.compare.running import CellStopped, RunningCell, running_cell
from offmap.compare.spec import NATIVE, CellSpec
from offmap.compare.transcript import Said, Transcript
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.kmod.lab_build import lab_module
from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabError, LabPanic, LabTimeout
from offmap.lab.firecracker import released_firecracker
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.lab.vmlinux import vmlinux_of
from offmap.patience import scaled

DEADLINE = 900.0
"""Seconds for a cell, from the boot of its host, on an idle, fast machine. An emulated cell takes 100 to 250."""


def usual_deadline() -> float:
    """The default deadline in whole seconds: DEADLINE, and more on a slower or busy machine."""
    return float(round(scaled(DEADLINE)))


MEASURE = ("-m", "offmap.compare.measure")

_COMPLAINT = re.compile(r"WARNING: |BUG: |Call Trace|INFO: task .* blocked|rcu: INFO|soft lockup|Out of memory")
_COMPLAINT_LINES = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """How cells are run.

    Attributes:
        deadline: seconds from the boot of a cell's host.
        accel: of the disposable hosts: auto, tcg or kvm.
        boots: pairs of guests whose boots are timed (Job.boots).
        preset: how much is asked.
        initrd: the guests' initramfs; None to make one for each cell.
        modules: the host kernel's ``lib/modules/RELEASE`` folder, where it is a bzImage whose folder is elsewhere.
        firecracker: the program; None: the released one, which is fetched.
        libvirt: the folder of its unpacked packages; set for the cells that need it.
        program: Python's arguments for the measuring program (offmap.compare.job).
    """

    deadline: float = DEADLINE
    accel: str = "auto"
    boots: int = 1
    preset: Preset = FULL
    initrd: Path | None = None
    modules: Path | None = None
    firecracker: Path | None = None
    libvirt: Path | None = None
    program: tuple[str, ...] = MEASURE


@dataclass(frozen=True, slots=True)
class CellTask:
    """One cell to run, here or on another machine.

    Attributes:
        run: the name of its comparison, for `stop_cells`.
    """

    spec: CellSpec
    run: str
    how: Settings = Settings()


@dataclass(slots=True)
class _End:
    """How the cell ended, seen from the host. The program's own report is in the transcript."""

    outcome: CellOutcome | None = None
    reason: str = ""
    oops: str = ""
    console: str = ""
    accel: str = ""


def kernels_of(spec: CellSpec, report: Report, modules: Path | None = None) -> tuple[HostKernel, HostKernel]:
    """The host's and the guest's kernel. Raises LabError: there is no such kernel, or it cannot be had."""

    def say(line: str) -> None:
        report(CellEvent(stage=line))

    if spec.host_kernel == NATIVE:
        release = os.uname().release
        host = HostKernel(NATIVE, release, Path(f"/boot/vmlinuz-{release}"), Path("/lib/modules") / release)
    else:
        host = host_kernel(spec.host_kernel, modules, say)
    if spec.guest_kernel == spec.host_kernel:
        return host, host
    return host, host_kernel(spec.guest_kernel, say=say)


def run_cell(task: CellTask, report: Report = lambda _: None, hosts: CellHosts | None = None) -> CellResult:
    """Run one cell, and return its result, however it ended.

    Args:
        report: takes the cell's events, from any thread.
        hosts: those of the comparison, for a cell that may share one.

    Raises:
        CellStopped: `stop_cells` was called for its comparison.
    """
    began = time.monotonic()
    transcript = Transcript(report)
    end = _End()
    inputs: dict[str, str] = {}
    with running_cell(task.run) as cell:
        try:
            host, guest = kernels_of(task.spec, report, task.how.modules)
            inputs = {**inputs_of(host, guest), **module_input(task.spec, host)}
            inputs |= firecracker_input(task.spec, task.how.firecracker)
            module = _module(task.spec, host, report)
            task = _with_vmm(task, report)
            began = time.monotonic()  # the cell's time has no downloads and builds in it
            if task.spec.host_kernel == NATIVE:
                _run_native(task, host, guest, transcript, cell, end)
            else:
                how, preset = task.how, task.how.preset
                kind = HostKind(host, inputs["code"], how.program, preset.memory, preset.cmdline, how.accel)
                if _run_in_host(task, kind, guest, module, transcript, cell, end, report, hosts):
                    # Other cells leave their pages all over a host's memory, so that less of it can be unplugged.
                    report(CellEvent(again=f"its host had run other cells before; there: {end.reason}"))
                    report(CellEvent(begun=True))
                    transcript, end = Transcript(report), _End()
                    _run_in_host(task, kind, guest, module, transcript, cell, end, report, hosts, new=True)
        except CellStopped:
            raise
        except OffmapError as error:
            cell.check()  # if the comparison was stopped, a host that ended is no failure
            end.outcome, end.reason = _outcome_of(error, end, time.monotonic() - began >= task.how.deadline)
            end.oops = error.oops if isinstance(error, LabPanic) else ""
            if not end.console and isinstance(error, LabEnded):
                end.console = error.console
    if inputs and inputs["code"] != (now := code_digest()):
        inputs["code"] += f"-{now}"  # the code changed meanwhile: the host may have read both states
    return _result(task, transcript.said(), end, inputs, time.monotonic() - began)


def _outcome_of(error: OffmapError, end: _End, late: bool) -> tuple[CellOutcome, str]:
    if isinstance(error, LabPanic):
        return CellOutcome.OOPS, _first_line(error.oops)
    if isinstance(error, BackendRefused):
        return CellOutcome.REFUSED, str(error)
    if isinstance(error, LabTimeout) and late:
        return CellOutcome.DEADLINE, error.reason
    return CellOutcome.FAILED, str(error)


def _job(task: CellTask, host: HostKernel, guest: HostKernel, folder: str) -> Job:
    """The job of a cell. Its files go to `folder`, the guest's initramfs too."""
    initrd = task.how.initrd
    if initrd is None:
        initrd = Path(folder) / "guest.initramfs"
        initrd.write_bytes(probe_initramfs(guest.modules))
    job = Job(task.spec, str(guest.vmlinuz), str(initrd), folder, task.how.boots, task.how.preset)
    if task.how.firecracker:
        elf = str(vmlinux_of(guest.vmlinuz))
        job = msgspec.structs.replace(job, firecracker=str(task.how.firecracker), guest_vmlinux=elf)
    elif task.how.preset.unpacked and kind_of(task.spec.backend).vmm is Vmm.OFFMAP:
        with suppress(OffmapError):  # packed in a way that only its own code unpacks here
            job = msgspec.structs.replace(job, guest_vmlinux=str(vmlinux_of(guest.vmlinuz)))
    if task.how.libvirt:
        job = msgspec.structs.replace(job, libvirt=str(task.how.libvirt))
    if task.how.preset.questions and task.spec.backend not in task.how.preset.attacked:
        return job
    paths = Path(folder) / "host-kernel.json", Path(folder) / "guest-kernel.json"
    try:
        for path, kernel in zip(paths, (host, guest), strict=True):
            path.write_bytes(knowledge_of(kernel))
    except OffmapError as error:
        return msgspec.structs.replace(job, not_known=str(error))
    return msgspec.structs.replace(job, host_known=str(paths[0]), guest_known=str(paths[1]))


def _run_native(
    task: CellTask, host: HostKernel, guest: HostKernel, transcript: Transcript, cell: RunningCell, end: _End
) -> None:
    end.accel = "native"
    if why := refusal_here(task.spec):
        raise BackendRefused.from_line(why)
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        job = msgspec.json.encode(_job(task, host, guest, folder)).decode()
        argv = [sys.executable, *task.how.program, job]
        status, complaint = run_here(argv, transcript.feed, cell, task.how.deadline)
    _judge(status, complaint, transcript.said(), end)


def _run_in_host(
    task: CellTask,
    kind: HostKind,
    guest: HostKernel,
    module: Path | None,
    transcript: Transcript,
    cell: RunningCell,
    end: _End,
    report: Report,
    hosts: CellHosts | None,
    *,
    new: bool = False,
) -> bool:
    """Measure the cell in a host, a new one if that is asked for. Return whether another host may do better."""
    last = time.monotonic() + task.how.deadline
    console: Console | None = None
    shown = 0  # of the console, before this cell

    def launched(starting: LabHost) -> None:
        nonlocal console
        console = starting.console
        end.accel = starting.options.accel
        cell.ends_by(starting.kill)

    def start() -> CellHost:
        report(CellEvent(stage=f"booting a host, Linux {kind.kernel.release}"))
        return CellHost.start(kind, task.how.deadline, launched, fresh=task.how.preset.fresh)

    shared = None if task.how.preset.fresh else hosts
    try:
        with (
            nullcontext(shared) if shared is not None else CellHosts() as own,
            own.one(kind, start, new=new) as running,
        ):
            if console is None:
                launched(running.host)
                shown = len(running.host.console.text)
            cell.check()
            used = not running.is_new
            if module is not None:
                running.load(module)
            with tempfile.TemporaryDirectory(dir=running.folder) as folder:
                job = _job(task, kind.kernel, guest, folder)
                left = max(last - time.monotonic(), 1.0)
                try:
                    status, complaint = running.measure(job, transcript, left, last=shared is None)
                except LabTimeout:
                    raise LabTimeout(
                        f"it was not done after {task.how.deadline:g} s", "allow more with --deadline"
                    ) from None
            _judge(status, complaint, transcript.said(), end)
            again = used and end.outcome is not CellOutcome.BOOTED and not known_refusal(task.spec)
            if again or end.outcome is CellOutcome.FAILED:
                running.close()  # no other cell may find what this one left behind
            return again
    finally:
        if console is not None:
            booted = end.outcome in {CellOutcome.BOOTED, CellOutcome.REFUSED}
            end.console = _complaints(console.text[shown:]) if booted else console.tail(_COMPLAINT_LINES)


def _module(spec: CellSpec, kernel: HostKernel, report: Report) -> Path | None:
    if spec.host_kernel == NATIVE or not kind_of(spec.backend).backend.needs_module:
        return None
    report(CellEvent(stage="building the offmap module, unless that has been done"))
    try:
        return lab_module(kernel)
    except OffmapError as error:
        raise BackendRefused(f"there is no offmap module for {kernel.release}", error.reason, error.remedy) from None


def _with_vmm(task: CellTask, report: Report) -> CellTask:
    """The task with the VMM that it needs, if that is fetched: Firecracker, unless the user has one, or libvirt.

    Raises:
        BackendRefused: it cannot be had.
    """
    vmm, how = kind_of(task.spec.backend).vmm, task.how
    firecracker = libvirt = None
    if vmm is Vmm.FIRECRACKER:
        firecracker = how.firecracker or _fetched("Firecracker", released_firecracker, report)
    elif vmm is Vmm.LIBVIRT and task.spec.host_kernel != NATIVE:
        libvirt = _fetched("libvirt", libvirt_packages, report)
    return replace(task, how=replace(how, firecracker=firecracker, libvirt=libvirt))


def _fetched(what: str, fetch: Callable[[], Path], report: Report) -> Path:
    report(CellEvent(stage=f"fetching {what}, unless that has been done"))
    try:
        return fetch()
    except LabError as error:
        raise BackendRefused(f"there is no {what} here", error.reason, error.remedy) from None


def _judge(status: int, complaint: str, said: Said, end: _End) -> None:
    """Set the outcome from what the program printed and how it ended."""
    if said.complaint:
        end.outcome, end.reason = CellOutcome.FAILED, said.complaint
    elif said.outcome is None or status != ExitStatus.DONE:
        why = (complaint.strip().splitlines() or ["without a word on standard error"])[-1]
        end.outcome, end.reason = CellOutcome.FAILED, f"the measuring program ended with status {status}: {why}"
    else:
        end.outcome, end.reason = said.outcome, said.reason


def _result(task: CellTask, said: Said, end: _End, inputs: dict[str, str], seconds: float) -> CellResult:
    outcome = end.outcome or CellOutcome.FAILED
    return CellResult(
        spec=task.spec,
        outcome=outcome,
        reason=end.reason,
        oops=end.oops,
        asked="" if outcome is CellOutcome.BOOTED else said.question,
        answers=tuple(said.answers.values()),
        host=said.host,
        guest=said.guest,
        machine=this_machine(end.accel),
        inputs={**inputs, "deadline": f"{task.how.deadline:g}", "boots": str(task.how.boots)},
        seconds=round(seconds, 1),
        time=utc_now(),
        console=end.console,
    )


def _complaints(console: str) -> str:
    """The console from the kernel's first complaint on; empty if there was none."""
    lines = console.splitlines()
    first = next((number for number, line in enumerate(lines) if _COMPLAINT.search(line)), len(lines))
    return "\n".join(lines[first : first + _COMPLAINT_LINES])


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no text")
