"""All VMs of a host: which processes they are of, and an audit of each.

KVM's own list has them all (``kvm_list``), each with the address space that made it, and the kernel's tasks tell which
processes have that. Descriptors (``anon_inode:kvm-vm`` and ``anon_inode:kvm-vcpu:N`` in /proc/PID/fd) and the folders
``kvm/PID-FD`` in debugfs, one for each VM, are compared with it. They can only show that the list is wrong. What the
VMM calls itself is a label for people.
"""

import os
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import offmap
from offmap.audit.btf import Unknown
from offmap.audit.guest_ram import KVM_VCPU_LINK, KVM_VM_LINK, MEMSLOTS_LINK, GuestRam, NoVm, vm_links
from offmap.audit.host import host_facts, utc_now
from offmap.audit.kcore import Kcore
from offmap.audit.kvm_list import KvmList, Vm
from offmap.audit.kvm_moment import Moment, unlisted
from offmap.audit.oracle import OracleDisagrees
from offmap.audit.process import NoSuchProcess, Process, ProcessEnded, process_ids
from offmap.audit.reach import VmmFacts
from offmap.audit.regions import Layout
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import EveryVm, NotAudited
from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus, OffmapError, Undetermined

_DEBUGFS = Path("/sys/kernel/debug/kvm")
_DEBUGFS_VM = re.compile(r"\d+-\d+")
_ATTEMPTS = 4  # VMs begin and end while they are looked for
_ROUNDS = 2  # of audits, if a process hands its VM to another meanwhile
_LOOKS = 12  # at a VM that has a folder in debugfs and is not on KVM's list, before that is believed
_FIRST_WAIT = 0.001  # seconds; each is twice the one before: four seconds in all

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
    """A process that has at least one KVM VM.

    Attributes:
        pid: of the process, or of a thread where the main one has ended.
        vms: what its VMs are known by, whichever process has them later.
    """

    pid: int
    name: str
    facts: VmmFacts
    vms: frozenset[Hashable] = frozenset()


class Judged(Protocol):
    """An audit of a process, and the VMs that it was of."""

    @property
    def audit(self) -> AuditResult:
        """The result."""
        ...

    @property
    def ram(self) -> GuestRam:
        """What was judged."""
        ...


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


def vmm_facts(process: Process, links: Mapping[int, str] | None = None, vms: Sequence[Vm] | None = None) -> VmmFacts:
    """What a process says of itself, and which VMs it has.

    Args:
        vms: what KVM lists; without it, the process's descriptors are counted.

    Raises:
        Undetermined: its descriptors may not be read, or it has ended.
    """
    links = process.descriptors() if links is None else links
    executable = process.link("exe")
    arguments = process.read("cmdline").decode("utf-8", "replace")
    return VmmFacts(
        vmm=recognise(process.name(), executable, arguments, MEMSLOTS_LINK in links.values()),
        executable=executable,
        vms=sum(link == KVM_VM_LINK for link in links.values()) if vms is None else len(vms),
        vcpus=(
            len({link for link in links.values() if KVM_VCPU_LINK.fullmatch(link)})
            if vms is None
            else sum(len(vm.vcpus) for vm in vms)
        ),
    )


def find_vms() -> tuple[list[VmProcess], list[str]]:
    """All processes that have a VM, in order of their PIDs, and why there may be more of them."""
    try:
        with Kcore() as kcore:
            kvm = KvmList(kcore, Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments))
            found, notes, moment = find_listed(kvm)
            return found, notes + _unlisted(kvm, moment)
    except (Unknown, Undetermined) as error:
        found, notes = find_held()
        return found, [*notes, f"KVM's own list of VMs cannot be read: {error}"]


def find_listed(kvm: KvmList) -> tuple[list[VmProcess], list[str], Moment]:
    """The processes of all VMs that KVM lists, how many VMs have none, and what was read.

    Raises:
        Unknown: the list cannot be read.
    """
    for _ in range(_ATTEMPTS):
        vms: dict[int, list[Vm]] = {}
        moment = Moment(kvm)
        for vm in moment.vms:
            vms.setdefault(vm.memory, []).append(vm)
        # The main thread of the process that has had it longest, or any that lives.
        threads = sorted(moment.threads.values(), key=lambda thread: (thread.tid != thread.pid, thread.tid))
        owners = {thread.memory: thread.tid for thread in reversed(threads) if thread.memory in vms}
        found = []
        for memory, tid in owners.items():
            with suppress(NoSuchProcess, ProcessEnded), Process(tid) as process:
                name, here = process.name(), vms[memory]
                facts = vmm_facts(process, vms=here)
                found.append(VmProcess(tid, name, facts, frozenset(vm.identity for vm in vms.pop(memory))))
        if not vms:
            break
    labels = ", ".join(sorted(vm.label for alone in vms.values() for vm in alone))
    notes = [f"KVM lists VMs that no process is found for: {labels}"] if vms else []
    return sorted(found), notes, moment


def _unlisted(kvm: KvmList, moment: Moment) -> list[str]:
    """What descriptors and debugfs have, and KVM's list has not."""
    notes = []
    for pid in process_ids():
        with suppress(NoSuchProcess, Undetermined), Process(pid) as process:
            if why := unlisted(moment, process):
                notes.append(f"process {pid}: {why}")
    more = len(left_out(_debugfs_folders, kvm.debugfs_folders))
    if more:
        notes.append(f"debugfs has {more} VMs more than KVM's own list")
    return notes


def left_out(folders: Callable[[], set[int]], listed: Callable[[], set[int]]) -> set[int]:
    """Inode numbers of the debugfs folders whose VMs KVM's list does not have, though they stay.

    KVM makes the folder before it lists a VM, and waits for a thread in between (``kvm_create_vm``). So a VM that
    begins has a folder alone, but soon both or none. The name (``PID-FD``) may be used again at once, by a VM that is
    being made too. Its inode number is not.

    Args:
        folders: those that debugfs has.
        listed: those of the VMs on KVM's list.
    """
    left = folders()
    for attempt in range(_LOOKS):
        left -= listed()
        if not left:
            break
        time.sleep(_FIRST_WAIT * 2**attempt)
        left &= folders()
    return left


def find_held() -> tuple[list[VmProcess], list[str]]:
    """The processes that hold a VM by a descriptor of their main thread, and why there may be more."""
    found: list[VmProcess] = []
    unreadable = 0
    for pid in process_ids():
        try:
            with Process(pid) as process:
                links = process.descriptors()
                if vm_links(links):
                    found.append(VmProcess(pid, process.name(), vmm_facts(process, links), frozenset({pid})))
        except (NoSuchProcess, ProcessEnded):
            continue
        except Undetermined:
            unreadable += 1
    if unreadable:
        return found, [f"the descriptors of {unreadable} processes cannot be read; run the audit as root"]
    return found, []


def _debugfs_folders() -> set[int]:
    """Inode numbers of the folders that KVM has made, one for each VM; none where debugfs is not mounted."""
    try:
        with os.scandir(_DEBUGFS) as found:
            # The folder is named for the thread that made the VM, which may have ended since (kvm_create_vm_debugfs).
            return {each.inode() for each in found if _DEBUGFS_VM.fullmatch(each.name)}
    except OSError:
        return set()


def worst_status(statuses: Sequence[ExitStatus], notes: Sequence[str]) -> ExitStatus:
    """Exposed before undetermined before failed before hidden. No VM at all is nothing exposed.

    Args:
        notes: reasons why there may be more VMs; any makes it undetermined at best.
    """
    found = [*statuses, ExitStatus.UNDETERMINED] if notes else statuses
    return max(found, key=_GRAVITY.index, default=ExitStatus.DONE)


def _audited(audit: Callable[[VmProcess], Judged], vm: VmProcess) -> Judged:
    """Audit it; one whose VM ended, and that may have made another, is looked at again."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(NoVm):
            return audit(vm)
    return audit(vm)


def audit_every_vm(
    audit: Callable[[VmProcess], Judged], prepare: Callable[[Sequence[VmProcess]], None] = lambda vms: None
) -> EveryVm:
    """Find all processes that hold a KVM VM, and audit each with ``audit``.

    Each VM that was found must have been judged, or have ended. Its process may end or run another program meanwhile,
    while another that shares its memory goes on: then that one is audited. What can be neither is undetermined.

    Args:
        audit: raises as ``snapshot_process`` does.
        prepare: told all of them before the first is audited.
    """
    vms, notes = find_vms()
    left = frozenset[Hashable]().union(*(vm.vms for vm in vms))
    results: list[AuditResult] = []
    failures: list[NotAudited] = []
    statuses = []
    more: list[str] = []
    for _ in range(_ROUNDS):
        prepare(vms)
        for vm in vms:
            try:
                found = _audited(audit, vm)
            except (NoSuchProcess, ProcessEnded, NoVm):
                continue
            except OracleDisagrees:
                raise  # then nothing that is said of the other VMs is to be relied on either
            except OffmapError as error:
                failures.append(NotAudited(vm.pid, vm.name, vm.facts, str(error)))
                statuses.append(error.exit_status)
                left -= vm.vms
                continue
            results.append(found.audit)
            # Who runs another program by now has other VMs.
            hidden = found.audit.verdict is Verdict.HIDDEN
            left -= {each.identity for each in found.ram.vms} | {vm.pid} if hidden else vm.vms
        vms, more = _still_there(left)
        if not vms:
            break
    notes = list(dict.fromkeys([*notes, *more]))
    for vm in vms:
        failures.append(NotAudited(vm.pid, vm.name, vm.facts, "it could not be looked at, and its VM is still there"))
        statuses.append(ExitStatus.UNDETERMINED)
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


def _still_there(vms: Set[Hashable]) -> tuple[list[VmProcess], list[str]]:
    """The processes that have these VMs now, and why there may be more; one that is about to end is given time."""
    found: list[VmProcess] = []
    notes: list[str] = []
    for attempt in range(_ATTEMPTS if vms else 0):
        time.sleep(_FIRST_WAIT * 2**attempt)
        every, notes = find_vms()
        found = [vm for vm in every if vm.vms & vms]
        if not found and not notes:
            break
    return found, notes
