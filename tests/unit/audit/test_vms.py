"""Finding VMs, and what their VMMs are called."""

import os
import subprocess
import sys

import pytest

from offmap.audit.process import NoSuchProcess, Process, ProcessEnded
from offmap.audit.reach import VmmFacts
from offmap.audit.vms import VmProcess, audit_every_vm, find_vms, recognise, vmm_facts, worst_status
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


def test_vm_that_cannot_be_audited_is_listed_and_one_that_ended_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    vms = [VmProcess(pid, f"vmm{pid}", VmmFacts("", "", 1, 0)) for pid in (1, 2, 3)]
    monkeypatch.setattr("offmap.audit.vms.find_vms", lambda: (vms, []))
    errors = {1: Undetermined("no kcore"), 2: NoSuchProcess("gone"), 3: ProcessEnded("ended")}

    def audit(vm: VmProcess) -> None:
        raise errors[vm.pid]

    every = audit_every_vm(audit)  # type: ignore[arg-type]
    assert [(each.pid, each.reason) for each in every.not_audited] == [(1, "no kcore")]
    assert every.exit_status == ExitStatus.UNDETERMINED


def test_a_vm_of_a_process_whose_main_thread_has_ended_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.audit.vms.KVM_VM_LINK", "/memfd:headless-vm (deleted)")
    program = """if True:
        import ctypes, os, sys, threading, time
        fd = os.memfd_create("headless-vm")
        threading.Thread(target=sys.stdin.read, daemon=True).start()
        print(flush=True)
        ctypes.CDLL(None).syscall(60, 0)  # exit, of this thread alone
    """
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        with Process(child.pid) as process:
            while process.running():
                os.sched_yield()
        try:
            found, notes = find_vms()
        finally:
            child.kill()
    assert child.pid not in [vm.pid for vm in found]
    assert any("1 processes hold VMs" in note for note in notes)


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
