"""The library's functions that put several parts of offmap together (docs/library.md). None prints or exits."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offmap.audit.audit import Snapshot, audit_process, snapshot_processes
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import EveryVm
from offmap.audit.vms import VmProcess, audit_every_vm
from offmap.compare.cell_result import CellResult
from offmap.compare.events import CellEvent
from offmap.compare.matrix import DEFAULT_AXES
from offmap.compare.spec import CellSpec
from offmap.doctor import Diagnosis, examine
from offmap.errors import OffmapError
from offmap.hide import Vet
from offmap.lab.host import LabHost
from offmap.log import Logger

_log = Logger("offmap.library")


def list_backends() -> list[Diagnosis]:
    """Try each kind of RAM on this host: get some, run a tiny guest in it, audit it, give it back. Takes seconds."""
    return list(examine())


def audit_host() -> EveryVm:
    """Audit each process of this host that holds a KVM VM. Its `exit_status` is that of the worst verdict."""
    found: dict[int, Snapshot | OffmapError] = {}

    def audit(vm: VmProcess) -> Snapshot:
        one = found[vm.pid]
        if isinstance(one, OffmapError):
            raise one
        return one

    return audit_every_vm(audit, lambda vms: found.update(snapshot_processes([vm.pid for vm in vms])))


@dataclass(frozen=True, slots=True)
class JobResult:
    """A command that ended in a guest.

    Attributes:
        status: its exit status, 0 to 255; 128 and more where a signal ended it.
        audit: of the guest's RAM, right after the command's end; None if none was asked for.
    """

    status: int
    stdout: bytes
    stderr: bytes
    audit: AuditResult | None


def run_job(
    command: str,
    *,
    memory: str,
    image: str = "debian",
    stdin: bytes = b"",
    memory_size: int = 256 << 20,
    vcpus: int = 1,
    audit: bool = True,
    sandbox: bool = True,
) -> JobResult:
    """Boot a guest in a process of its own, run one command in it, audit its RAM, and take it apart.

    Args:
        command: for the guest's /bin/sh.
        memory: the kind of RAM, as ``--memory`` takes it, like ``unplugged`` or ``unplugged,node=1``.
        image: of ``offmap image build``, by its name or its folder.
        memory_size: bytes, whole pages.
        sandbox: confine the guest's process. For hosts that cannot, and guests that are trusted: False.

    Raises:
        BackendRefused: this host cannot give such RAM.
        OffmapError: there is no such image, the process cannot be confined, or the guest ended before its command did.
        Undetermined: the command ended, and its guest's RAM could not be audited.
    """
    from offmap.guests.image import find_image
    from offmap.guests.job_process import JobProcess
    from offmap.memory.backend import parse_backend
    from offmap.vmm.config import MachineConfig

    found = find_image(image)
    source, drive = found.boot("console=ttyS0 quiet", attended=False)
    config = MachineConfig(
        source=source,
        backend=parse_backend(memory),
        memory_size=memory_size,
        vcpus=vcpus,
        devices=[drive],
        vetting=Vet(),
    )
    audits: list[AuditResult | OffmapError] = []

    def audit_guest(pid: int) -> None:
        try:
            audits.append(audit_process(pid))
        except OffmapError as error:
            audits.append(error)  # the machine is taken apart first

    with ExitStack() as stack:
        stdin_file, stdout, stderr = files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        stdin_file.write(stdin)
        stdin_file.seek(0)
        fds = stdin_file.fileno(), stdout.fileno(), stderr.fileno()
        job = stack.enter_context(JobProcess(command, fds, config, say=_log.info, waits=audit, sandbox=sandbox))
        status = job.run(audit_guest)
        for file in files:
            file.seek(0)
        outcome = audits[0] if audits else None
        if isinstance(outcome, OffmapError):
            raise outcome
        return JobResult(status, stdout.read(), stderr.read(), outcome)


@contextmanager
def lab_host(
    kernel: str | None = None,
    *,
    memory: str = "2G",
    cmdline: str = "",
    load_module: bool = False,
    out: Path | None = None,
    fresh: bool = False,
) -> Iterator[LabHost]:
    """Boot a disposable host under QEMU, and end it on leaving.

    Args:
        kernel: ``debian:6.12``, ``patched:7.3``, ``running``, or the path of a bzImage; by default debian:6.12 where
            apt is.
        memory: its RAM, like ``2G``.
        cmdline: added to its kernel's command line.
        load_module: build the offmap module for it, and load it.
        out: a folder that its commands may write to, at the same path.
        fresh: boot in full, and not from a snapshot of a booted host (docs/lab.md).

    Raises:
        OffmapError: the kernel cannot be had, the host does not boot, or it does not load the module.
    """
    from offmap.kmod.lab_build import lab_module, load
    from offmap.lab.provision import host_kernel

    chosen = host_kernel(kernel, say=_log.info)
    module = lab_module(chosen) if load_module else None
    with LabHost.start(chosen, memory=memory, cmdline=cmdline, out=out, fresh=fresh) as host:
        if module is not None and (why := load(host, module)):
            raise OffmapError(f"the disposable host does not load {module}", why=why)
        yield host


def run_matrix(
    out: Path,
    *,
    backends: Sequence[str] | None = None,
    host_kernels: Sequence[str] | None = None,
    guest_kernels: Sequence[str] | None = None,
    jobs: int | None = None,
    boots: int = 1,
    deadline: float | None = None,
) -> list[CellResult]:
    """Measure each kind of RAM on each kernel in disposable hosts. What `out` has from before is not measured again.

    Args:
        backends, host_kernels, guest_kernels: the matrix; by default each kind of RAM on debian:6.12.
        jobs: cells at a time; by default as many as processors and memory allow.
        boots: pairs of guests whose boot is timed; fewer than 5 give no ratio.
        deadline: seconds for a cell; by default 900, more on a slower or busy machine.

    Raises:
        OffmapError: there is no such kind or kernel, a tool is missing, or `out` cannot be written.
    """
    from offmap.compare.cell_run import Settings, usual_deadline
    from offmap.compare.matrix import cells_of
    from offmap.compare.run import run_cells

    specs = cells_of(DEFAULT_AXES.narrowed(backends, host_kernels, guest_kernels))
    seconds = usual_deadline() if deadline is None else deadline
    return run_cells(specs, out, Settings(deadline=seconds, boots=boots), _log_event, jobs=jobs)


def _log_event(spec: CellSpec, event: CellEvent) -> None:
    if event.ended is not None:
        _log.info("%s: %s", spec.title, event.ended.outcome.value)
    elif event.stage:
        _log.debug("%s: %s", spec.title, event.stage)
