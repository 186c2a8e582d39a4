"""Finding VMs, and what their VMMs are called."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from offmap.audit.guest_ram import NoVm
from offmap.audit.kvm_list import Vm
from offmap.audit.kvm_vcpu import VCpu
from offmap.audit.process import NoSuchProcess, Process, ProcessEnded
from offmap.audit.reach import VmmFacts
from offmap.audit.tasks import Thread
from offmap.audit.verdict import Verdict
from offmap.audit.vms import (
    VmProcess,
    audit_every_vm,
    find_listed,
    find_vms,
    left_out,
    recognise,
    vmm_facts,
    worst_status,
)
from offmap.errors import ExitStatus, Undetermined


@pytest.mark.parametrize(
    ("comm", "executable", "arguments", "memslots", "name"),
    [
        ("qemu-system-x86", "/usr/bin/qemu-system-x86_64", "qemu-system-x86_64\0-m\0", False, "QEMU"),
        ("CPU 0/KVM", "/usr/libexec/qemu-kvm", "/usr/libexec/qemu-kvm\0", False, "QEMU"),
        ("firecracker", "/firecracker", "firecracker\0", False, "Firecracker"),
        ("cloud-hyperviso", "", "cloud-hypervisor\0", False, "cloud-hypervisor"),
        ("vcpu0", "/opt/cloud-hypervisor", "", False, "cloud-hypervisor"),
        ("crosvm", "/usr/bin/crosvm", "crosvm\0run\0", False, "crosvm"),
        ("python3", "/usr/bin/python3.11", "python3\0-m\0offmap\0run\0", True, "offmap"),
        ("python3", "/usr/bin/python3.11", "/x/bin/python\0/x/bin/offmap\0run\0", True, "offmap"),
        ("python3", "/usr/bin/python3.11", "python3\0-m\0offmap\0run\0", False, ""),
        ("python3", "/usr/bin/python3.11", "python3\0other.py\0", True, ""),
        ("sh", "/bin/sh", "sh\0-c\0qemu\0", False, ""),
    ],
)
def test_vmms_are_told_by_their_names(comm: str, executable: str, arguments: str, memslots: bool, name: str) -> None:
    assert recognise(comm, executable, arguments, memslots) == name


def test_own_process_holds_no_vm() -> None:
    with Process(os.getpid()) as process:
        facts = vmm_facts(process)
        assert (facts.vmm, facts.vms, facts.vcpus) == ("", 0, 0)
        assert "python" in facts.executable


@pytest.mark.parametrize(
    ("statuses", "notes", "worst"),
    [
        ([], (), ExitStatus.DONE),
        ([], ("more",), ExitStatus.UNDETERMINED),
        ([ExitStatus.FAILED], (), ExitStatus.FAILED),
        ([ExitStatus.UNDETERMINED, ExitStatus.FAILED], (), ExitStatus.UNDETERMINED),
        ([ExitStatus.EXPOSED, ExitStatus.UNDETERMINED], ("more",), ExitStatus.EXPOSED),
    ],
)
def test_worst_of_all_decides(statuses: list[ExitStatus], notes: tuple[str, ...], worst: ExitStatus) -> None:
    assert worst_status(statuses, notes) is worst


def of(pid: int, *vms: str) -> VmProcess:
    return VmProcess(pid, f"vmm{pid}", VmmFacts("", "", 1, 0), frozenset(vms or {pid}))


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[list[VmProcess]]:
    """Give what is found at each look; the last for ever."""
    found: list[list[VmProcess]] = []
    monkeypatch.setattr("offmap.audit.vms.find_vms", lambda: (found.pop(0) if len(found) > 1 else found[0], []))
    monkeypatch.setattr("offmap.audit.vms.host_facts", lambda: None)
    monkeypatch.setattr("offmap.audit.vms._FIRST_WAIT", 0.0)
    return found


def judged(verdict: Verdict, *vms: str) -> Any:
    """An audit that was of these VMs."""
    identities = SimpleNamespace(vms=[SimpleNamespace(identity=vm) for vm in vms])
    return SimpleNamespace(audit=SimpleNamespace(verdict=verdict), ram=identities)


def test_vm_that_cannot_be_audited_is_listed_and_one_that_ended_is_not(lists: list[list[VmProcess]]) -> None:
    vms = [of(pid) for pid in (1, 2, 3, 4)]
    lists += [vms, vms[:1] + vms[3:]]
    errors = {
        1: Undetermined("no kcore"),
        2: NoSuchProcess("gone"),
        3: ProcessEnded("ended"),
        4: ProcessEnded("its main thread has ended"),
    }

    def audit(vm: VmProcess) -> Any:
        raise errors[vm.pid]

    every = audit_every_vm(audit)
    assert [(each.pid, each.reason) for each in every.not_audited] == [
        (1, "no kcore"),
        (4, "it could not be looked at, and its VM is still there"),
    ]
    assert every.exit_status == ExitStatus.UNDETERMINED


def test_a_process_whose_vm_ended_is_looked_at_again_and_then_left_out(lists: list[list[VmProcess]]) -> None:
    vms = [of(pid) for pid in (1, 2)]
    lists += [vms, vms[:1]]
    looks: list[int] = []

    def audit(vm: VmProcess) -> Any:
        looks.append(vm.pid)
        raise NoVm("process holds no KVM VM")

    every = audit_every_vm(audit)
    assert looks == [1] * 4 + [2] * 4 + [1] * 4
    assert [each.pid for each in every.not_audited] == [1]
    assert every.exit_status == ExitStatus.UNDETERMINED


def test_a_vm_whose_process_runs_another_program_is_judged_by_who_has_it_now(lists: list[list[VmProcess]]) -> None:
    prepared: list[list[int]] = []

    def audit(vm: VmProcess) -> Any:
        # By now process 1 has a decoy. Process 2 shared its memory before.
        return judged(Verdict.HIDDEN, "decoy") if vm.pid == 1 else judged(Verdict.EXPOSED, *map(str, vm.vms))

    lists += [[of(1, "bad"), of(3, "good")], [of(1, "decoy"), of(2, "bad"), of(3, "good")]]
    every = audit_every_vm(audit, lambda vms: prepared.append([vm.pid for vm in vms]))
    assert prepared == [[1, 3], [2]]
    assert every.exit_status == ExitStatus.EXPOSED and not every.not_audited


def test_a_vm_that_goes_from_process_to_process_is_not_hidden(lists: list[list[VmProcess]]) -> None:
    lists += [[of(1, "bad")], [of(2, "bad")], [of(3, "bad")]]
    every = audit_every_vm(lambda vm: judged(Verdict.HIDDEN, "decoy"))
    assert [each.pid for each in every.not_audited] == [3]
    assert every.exit_status == ExitStatus.UNDETERMINED


def test_who_is_hidden_with_all_its_vms_is_asked_once(lists: list[list[VmProcess]]) -> None:
    lists += [[of(1, "a", "b"), of(2, "ended")], [of(1, "a", "b"), of(3, "new")]]
    asked: list[int] = []

    def audit(vm: VmProcess) -> Any:
        asked.append(vm.pid)
        if vm.pid == 2:
            raise NoVm("process holds no KVM VM")
        return judged(Verdict.HIDDEN, "a", "b")

    assert audit_every_vm(audit).exit_status == ExitStatus.DONE
    assert asked == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("why", ["KVM lists VMs that no process is found for: kvm-1", "KVM's list cannot be read"])
def test_a_vm_that_outlives_its_process_has_not_ended(
    why: str, lists: list[list[VmProcess]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists += [[of(1, "left"), of(2, "good")]]
    notes: list[list[str]] = [[], [why]]
    monkeypatch.setattr(
        "offmap.audit.vms.find_vms", lambda: (lists.pop(0) if lists else [], notes.pop(0) if len(notes) > 1 else [why])
    )

    def audit(vm: VmProcess) -> Any:
        if vm.pid == 1:
            raise ProcessEnded("ended")
        return judged(Verdict.HIDDEN, "good")

    every = audit_every_vm(audit)
    assert (every.exit_status, every.notes) == (ExitStatus.UNDETERMINED, (why,))


def test_a_vm_that_is_still_being_ended_is_given_time(
    lists: list[list[VmProcess]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [([of(1, "ends")], []), ([], ["no process is found for: kvm-1"]), ([], list[str]())]
    monkeypatch.setattr("offmap.audit.vms.find_vms", lambda: looks.pop(0))

    def audit(vm: VmProcess) -> Any:
        raise ProcessEnded("ended")

    assert audit_every_vm(audit).exit_status == ExitStatus.DONE and not looks


class List:
    """KVM's list and the kernel's tasks, as far as they are asked."""

    def __init__(self, vms: list[Vm], threads: list[Thread]) -> None:
        self._vms, self._threads = vms, threads

    def vms(self) -> list[Vm]:
        return self._vms

    def threads(self) -> list[Thread]:
        return self._threads


def listed(vms: list[Vm], threads: list[Thread]) -> tuple[list[VmProcess], list[str]]:
    kvm: Any = List(vms, threads)
    return find_listed(kvm)[:2]


def test_vms_are_attributed_by_address_space_whoever_holds_their_descriptors() -> None:
    one, other, lost = (
        Vm(address, memory, f"kvm-{address}", (), (), True, 0, 0, (VCpu(0, False, 0),), ())
        for address, memory in ((1, 0xA000), (2, 0xA000), (3, 0xB000))
    )
    pid = os.getpid()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        # Of the main thread's table nothing is asked; a child that shares the memory (CLONE_VM) is no other VMM.
        found, notes = listed([one, other], [Thread(child.pid, child.pid, 0xA000), Thread(pid, pid, 0xA000)])
        assert ([(vm.pid, vm.facts.vms, vm.facts.vcpus) for vm in found], notes) == ([(min(pid, child.pid), 2, 2)], [])
        # The main thread has ended: one that lives stands for the process.
        found, _ = listed([one], [Thread(child.pid, 1, 0xA000)])
        assert [vm.pid for vm in found] == [child.pid]
    found, notes = listed([one, lost], [Thread(pid, pid, 0xA000)])
    assert [vm.pid for vm in found] == [pid]
    assert notes == ["KVM lists VMs that no process is found for: kvm-3"]


def test_without_kvms_list_there_may_be_more_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise Undetermined("cannot open /proc/kcore")

    monkeypatch.setattr("offmap.audit.vms.Kcore", unreadable)
    assert any("list of VMs cannot be read: cannot open" in note for note in find_vms()[1])


def stays(folders: list[set[int]], listed: list[set[int]]) -> set[int]:
    """What is left when debugfs and KVM's list have this at each look, and the last for ever."""
    return left_out(
        lambda: set(folders.pop(0) if len(folders) > 1 else folders[0]),
        lambda: listed.pop(0) if len(listed) > 1 else listed[0],
    )


def test_only_a_vm_whose_folder_stays_is_more_than_kvm_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.audit.vms._FIRST_WAIT", 0.0)
    assert stays([set()], [set()]) == set()
    assert stays([{1, 2}], [{1, 2, 3}]) == set()
    # One is being made: its folder is there first. One is being ended: it is on neither soon.
    assert stays([{1, 2}], [{1}, {1}, {1, 2}]) == set()
    assert stays([{1, 2}, {1, 2}, {1}], [{1}]) == set()
    # At each look there is one that is not on the list, and never the same.
    assert stays([{1, number} for number in range(2, 40)], [{1}]) == set()
    # As many on the list as in debugfs are not the same ones.
    assert stays([{1, 2}], [{1, 3}]) == {2}
    assert stays([{1, 2}, {1, 2, 4}], [{1, 4}]) == {2}


def test_process_that_ended_is_said_to_have() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with Process(pid) as process:
        assert not process.running()
        with pytest.raises(ProcessEnded):
            process.check_alive()
        os.waitpid(pid, 0)
        with pytest.raises(ProcessEnded):
            process.maps()
    with Process(os.getpid()) as process:
        assert process.running()
        process.check_alive()


def test_process_that_ends_while_its_descriptors_are_listed_is_said_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    list_folder = os.listdir
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:

        def ends_first(folder: int) -> list[str]:
            child.kill()
            child.wait()
            return list_folder(folder)

        monkeypatch.setattr(os, "listdir", ends_first)
        with Process(child.pid) as process, pytest.raises(ProcessEnded):
            process.descriptors()
