"""All VMs of a host: which processes hold them, and an audit of each.

They are found by the descriptors in /proc/PID/fd, and counted by KVM's own list in debugfs.

KVM names its descriptors ``anon_inode:kvm-vm`` and ``anon_inode:kvm-vcpu:N`` (``virt/kvm/kvm_main.c``), and makes a
folder ``kvm/PID-FD`` in debugfs for each VM. What the VMM calls itself is a label for people.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import offmap
from offmap.audit.guest_ram import KVM_VCPU_LINK, MEMSLOTS_LINK
from offmap.audit.host import host_facts, utc_now
from offmap.audit.kvm_slots import KVM_VM_LINK
from offmap.audit.oracle import OracleDisagrees
from offmap.audit.process import NoSuchProcess, Process, ProcessEnded, process_ids
from offmap.audit.reach import VmmFacts
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import EveryVm, NotAudited
from offmap.errors import ExitStatus, OffmapError, Undetermined

_DEBUGFS = Path("/sys/kernel/debug/kvm")
_DEBUGFS_VM = re.compile(r"\d+-\d+")

_GRAVITY = (ExitStatus.DONE, ExitStatus.FAILED, ExitStatus.UNDETERMINED, ExitStatus.EXPOSED)

_NAMES = (
    ("qemu", "QEMU"),  # qemu-system-x86_64, qemu-kvm
    ("firecracker", "Firecracker"),
    ("cloud-hyperviso", "cloud-hypervisor"),  # comm is cut to 15 characters
    ("crosvm", "crosvm"),
    ("lkvm", "kvmtool"),
    ("kvmtool", "kvmtool"),
    ("offmap", "offmap"),
)


class VmProcess(NamedTuple):
    """A process that holds at least one KVM VM."""

    pid: int
    name: str
    facts: VmmFacts


def recognise(comm: str, executable: str, arguments: str, has_memslots: bool) -> str:
    """What this VMM is, by its names; empty if it is not known."""
    for text in (comm, executable.rpartition("/")[2]):
        for start, name in _NAMES:
            if text.startswith(start):
                return name
    # Ours runs in an interpreter, whose name it has.
    if has_memslots and re.search(r"(^|[/\0])offmap(\0|$|\.)", arguments):
        return "offmap"
    return ""


def vmm_facts(process: Process, links: Mapping[int, str] | None = None) -> VmmFacts:
    """What a process says of itself, and what it holds.

    Raises:
        Undetermined: its descriptors may not be read, or it has ended.
    """
    links = process.descriptors() if links is None else links
    executable = process.link("exe")
    arguments = process.read("cmdline").decode("utf-8", "replace")
    return VmmFacts(
        vmm=recognise(process.name(), executable, arguments, MEMSLOTS_LINK in links.values()),
        executable=executable,
        vms=sum(link == KVM_VM_LINK for link in links.values()),
        vcpus=len({link for link in links.values() if KVM_VCPU_LINK.fullmatch(link)}),
    )


def find_vms() -> tuple[list[VmProcess], list[str]]:
    """All processes that hold a VM, in order of their PIDs, and why there may be more of them."""
    found: list[VmProcess] = []
    unreadable = headless = 0
    for pid in process_ids():
        try:
            with Process(pid) as process:
                links = process.descriptors()
                if not links and not process.running():
                    headless += _held_by_threads(process)
                if _holds_vm(links):
                    found.append(VmProcess(pid, process.name(), vmm_facts(process, links)))
        except (NoSuchProcess, ProcessEnded):
            continue
        except Undetermined:
            unreadable += 1
    notes = []
    if unreadable:
        notes.append(f"the descriptors of {unreadable} processes cannot be read; run the audit as root")
    if headless:
        notes.append(f"{headless} processes hold VMs, and cannot be looked at since their main threads have ended")
    more = _listed_by_kvm() - sum(vm.facts.vms for vm in found)
    if more > 0:
        notes.append(f"KVM lists {more} VMs more than processes hold descriptors of")
    return found, notes


def _holds_vm(links: Mapping[int, str]) -> bool:
    return any(link == KVM_VM_LINK or KVM_VCPU_LINK.fullmatch(link) for link in links.values())


def _held_by_threads(process: Process) -> bool:
    """Whether a thread that outlives the main one holds a VM; /proc/PID itself shows nothing of such a process."""
    for thread in process.threads():
        try:
            if _holds_vm(process.descriptors(thread)):
                return True
        except Undetermined:  # that one has ended too
            continue
    return False


def _listed_by_kvm() -> int:
    """How many VMs there are, by debugfs; 0 where it is not mounted."""
    try:
        names = os.listdir(_DEBUGFS)  # noqa: PTH208
    except OSError:
        return 0
    # The folder is named for the thread that made the VM, which may have ended since (kvm_create_vm_debugfs).
    return sum(_DEBUGFS_VM.fullmatch(name) is not None for name in names)


def worst_status(statuses: Sequence[ExitStatus], notes: Sequence[str]) -> ExitStatus:
    """Exposed before undetermined before failed before hidden. No VM at all is nothing exposed.

    Args:
        notes: reasons why there may be more VMs; any makes it undetermined at best.
    """
    found = [*statuses, ExitStatus.UNDETERMINED] if notes else statuses
    return max(found, key=_GRAVITY.index, default=ExitStatus.DONE)


def audit_every_vm(audit: Callable[[VmProcess], AuditResult]) -> EveryVm:
    """Find all processes that hold a KVM VM, and audit each with ``audit``.

    One that ends before anything was seen of it is left out: its VM is gone. One that cannot be audited is not.
    """
    vms, notes = find_vms()
    results: list[AuditResult] = []
    failures: list[NotAudited] = []
    statuses = []
    for vm in vms:
        try:
            results.append(audit(vm))
        except (NoSuchProcess, ProcessEnded):
            continue
        except OracleDisagrees:
            raise  # then nothing that is said of the other VMs is to be relied on either
        except OffmapError as error:
            failures.append(NotAudited(vm.pid, vm.name, vm.facts, str(error)))
            statuses.append(error.exit_status)
    statuses += [result.verdict.exit_status for result in results]
    return EveryVm(
        offmap=offmap.__version__,
        time=utc_now(),
        host=host_facts(),
        exit_status=worst_status(statuses, notes),
        vms=tuple(results),
        not_audited=tuple(failures),
        notes=tuple(notes),
    )
