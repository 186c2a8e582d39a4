"""VMMs that want to be called hidden and are not, run in a disposable host.

``kvm_attack_target.py`` prints one JSON object: by attack, the verdict on the process and what an audit of all says.
Each attacker has a VM on hidden memory, with a claim, as a decoy. Its other VM, slot or page is in ordinary memory, and
it does what it can to keep that from being seen.
"""

import array
import ctypes
import fcntl
import itertools
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum, auto
from pathlib import Path
from typing import Any, Unpack

from offmap.audit.audit import Options, Stage, audit_process, snapshot_process
from offmap.audit.guest_ram import named_ranges
from offmap.audit.result import AuditResult
from offmap.audit.seen import seen_at
from offmap.audit.vms import VmProcess, audit_every_vm
from offmap.errors import OffmapError
from offmap.patience import scaled

PAGE, MIB = 4096, 1 << 20
RESERVED = 0x6000_0000  # the host is booted with memmap=256M$0x60000000
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP = 0xAE01, 0xAE41, 0xAE60
KVM_SET_USER_MEMORY_REGION, KVM_RUN, KVM_GET_VCPU_MMAP_SIZE = 0x4020AE46, 0xAE80, 0xAE04
KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2, KVM_SET_MSRS = 0xC008AE05, 0x4008AE90, 0x4008AE89
KVM_CREATE_GUEST_MEMFD, KVM_SET_USER_MEMORY_REGION2 = 0xC040AED4, 0x40A0AE49
READ_ONLY, GUEST_MEMFD = 1 << 1, 1 << 2
SREGS_SIZE, EFER_SVME = 312, 1 << 12
CLONE_FILES, CLONE_VM = 0x400, 0x100
MAP_FIXED = 0x10

libc = ctypes.CDLL(None, use_errno=True)
kept: list[Any] = []  # what lives as long as the attacker


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def plain(size: int = 4 * MIB) -> mmap.mmap:
    """Ordinary memory, all of it there."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, PAGE):
        memory[at] = 0xF4  # hlt
    kept.append(memory)
    return memory


def hidden(size: int = 4 * MIB, offset: int = 0) -> mmap.mmap:
    """Memory that the kernel does not map."""
    fd = os.open("/dev/mem", os.O_RDWR)
    memory = mmap.mmap(fd, size, offset=RESERVED + offset)
    memory[:PAGE] = bytes(PAGE)
    kept.append(memory)
    return memory


class Vm:
    """A VM by its bare calls."""

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR)
        self.fd = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        fcntl.ioctl(self.fd, KVM_CREATE_IRQCHIP, 0)

    def slot(self, number: int, memory: mmap.mmap, gpa: int = 0, flags: int = 0, size: int | None = None) -> None:
        size = len(memory) if size is None else size
        fcntl.ioctl(
            self.fd, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", number, flags, gpa, size, address(memory))
        )

    def vcpu(self) -> int:
        return int(fcntl.ioctl(self.fd, KVM_CREATE_VCPU, 0))

    def run_for_ever(self) -> int:
        """A thread that stays in KVM_RUN, as its guest halts; the vCPU's descriptor."""
        vcpu = self.vcpu()
        sregs = bytearray(SREGS_SIZE)
        fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
        struct.pack_into("<QIH", sregs, 0, 0, 0xFFFF, 0)  # cs
        fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *[0] * 17, 2))
        thread = threading.Thread(target=lambda: libc.ioctl(vcpu, KVM_RUN, 0), daemon=True)
        thread.start()
        kept.append(thread)
        waits_in = Path(f"/proc/self/task/{thread.native_id}/syscall")  # proc(5): the number and the arguments
        while thread.is_alive() and waits_in.read_text(encoding="ascii").split()[2:3] != [hex(KVM_RUN)]:
            os.sched_yield()
        return vcpu


def decoy(offset: int) -> Vm:
    """A VM on hidden memory, with a claim."""
    memory = hidden(offset=offset)
    vm = Vm()
    vm.slot(0, memory)
    vm.vcpu()
    slot = {"guest_phys_addr": 0, "memory_size": len(memory), "userspace_addr": address(memory), "backend": "x"}
    claim = os.memfd_create("offmap-memslots")
    os.write(claim, json.dumps({"schema": "offmap-memslots/1", "slots": [slot]}).encode())
    kept.extend((vm, claim))
    return vm


def exposed() -> Vm:
    vm = Vm()
    vm.slot(0, plain())
    return vm


def nothing() -> None:
    """The control: the decoy alone is hidden."""


def thread_with_descriptors_of_its_own() -> None:
    def work() -> None:
        try:
            libc.unshare(CLONE_FILES)
            kept.append(exposed().run_for_ever())
        finally:
            ready.set()
        threading.Event().wait()

    ready = threading.Event()
    threading.Thread(target=work, daemon=True).start()
    ready.wait()


def duplicate_of_the_decoy() -> None:
    thread_with_descriptors_of_its_own()
    os.dup(next(each.fd for each in kept if isinstance(each, Vm)))


def descriptors_closed_while_it_runs() -> None:
    vm = exposed()
    vcpu = vm.run_for_ever()
    for fd in (vcpu, vm.fd):
        os.close(fd)


def child_with_the_same_memory() -> None:
    vm = exposed()
    vm.vcpu()
    stack = plain(MIB)
    pause = ctypes.cast(libc.pause, ctypes.c_void_p)
    child = libc.clone(pause, ctypes.c_void_p(address(stack) + MIB - 64), CLONE_VM | signal.SIGCHLD, None)
    kept.append(child)
    os.close(vm.fd)


def descriptor_on_its_way_in_a_socket() -> None:
    vm = exposed()
    ours, theirs = socket.socketpair()
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [vm.fd]))])
    os.close(vm.fd)
    kept.extend((ours, theirs))


def vcpu_mapped_and_closed() -> None:
    vm = exposed()
    vcpu = vm.vcpu()
    kept.append(mmap.mmap(vcpu, fcntl.ioctl(vm.kvm, KVM_GET_VCPU_MMAP_SIZE, 0)))
    duplicate = kept[-1]
    assert len(duplicate)
    os.close(vcpu)
    os.close(vm.fd)


def program_replaced_and_descriptor_kept() -> None:
    """Its VM's memory is gone with the old program; whose it was nobody can tell."""
    if (child := os.fork()) == 0:
        vm = exposed()
        os.set_inheritable(vm.fd, True)
        os.execv("/bin/sleep", ["sleep", "600"])
    while Path(f"/proc/{child}/comm").read_text(encoding="ascii") != "sleep\n":
        os.sched_yield()


def slot_of_system_management_mode_only() -> None:
    vm = next(each for each in kept if isinstance(each, Vm))
    vm.slot(1 << 16 | 3, plain(), 1 << 30)


def read_only_since_the_auditor_may_come() -> None:
    vm = next(each for each in kept if isinstance(each, Vm))
    memory = plain(64 * 1024)
    vm.slot(1, memory, 1 << 30)
    vm.slot(1, memory, 1 << 30, size=0)
    vm.slot(1, memory, 1 << 30, READ_ONLY)


def read_only_and_as_large_as_ram() -> None:
    vm = next(each for each in kept if isinstance(each, Vm))
    vm.slot(1, plain(), 1 << 30, READ_ONLY)


def small_and_always_read_only() -> None:
    """No attack: the registers or the firmware of an honest VMM."""
    vm = next(each for each in kept if isinstance(each, Vm))
    vm.slot(1, plain(PAGE), 1 << 30, READ_ONLY)


def set_svme(vm: Vm, *states: bool) -> None:
    """Give a VM one more vCPU, with all features that KVM has, and set its EFER.SVME to each of these in turn."""
    vcpu = fcntl.ioctl(vm.fd, KVM_CREATE_VCPU, 1)
    cpuid = bytearray(8 + 40 * 100)
    struct.pack_into("<I", cpuid, 0, 100)
    fcntl.ioctl(vm.kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
    fcntl.ioctl(vcpu, KVM_SET_CPUID2, cpuid)
    sregs = bytearray(SREGS_SIZE)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
    at = 8 * 24 + 2 * 16 + 5 * 8  # segments, gdt and idt, cr0 cr2 cr3 cr4 cr8
    efer = struct.unpack_from("<Q", sregs, at)[0] & ~EFER_SVME
    for state in states:
        struct.pack_into("<Q", sregs, at, efer | (EFER_SVME if state else 0))
        fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))


def nested_guest_allowed() -> None:
    set_svme(next(each for each in kept if isinstance(each, Vm)), True)


def clock_page_in_hidden_memory() -> None:
    vm = next(each for each in kept if isinstance(each, Vm))
    vcpu = fcntl.ioctl(vm.fd, KVM_CREATE_VCPU, 1)
    msrs = struct.pack("<IIIIQ", 1, 0, 0x4B56_4D01, 0, 0x2000 | 1)  # MSR_KVM_SYSTEM_TIME_NEW
    fcntl.ioctl(vcpu, KVM_SET_MSRS, msrs)


def page_with_an_alias_that_is_said_to_be_kept_from_the_guest() -> None:
    clock_page_in_hidden_memory()
    claim = kept[kept.index(next(each for each in kept if isinstance(each, Vm))) + 1]
    text = json.loads(os.pread(claim, 4096, 0)) | {"excluded": [[0x2000, PAGE]]}
    os.pwrite(claim, json.dumps(text).encode(), 0)


def guest_memfd_held_by_another() -> None:
    vm = Vm.__new__(Vm)
    vm.kvm = os.open("/dev/kvm", os.O_RDWR)
    vm.fd = fcntl.ioctl(vm.kvm, KVM_CREATE_VM, 0)

    def guest_memfd(size: int) -> int:
        asked = bytearray(struct.pack("<QQ6Q", size, 3, *[0] * 6))  # MMAP | INIT_SHARED
        return int(fcntl.ioctl(vm.fd, KVM_CREATE_GUEST_MEMFD, asked))

    file = guest_memfd(4 * MIB)
    with mmap.mmap(file, 4 * MIB) as view:
        for at in range(0, 4 * MIB, PAGE):
            view[at] = 1
    memory = hidden(4 * MIB, 8 * MIB)
    fcntl.ioctl(
        vm.fd,
        KVM_SET_USER_MEMORY_REGION2,
        struct.pack("<IIQQQQII14Q", 0, GUEST_MEMFD, 0, 4 * MIB, address(memory), 0, file, 0, *[0] * 14),
    )
    held, told = os.pipe()
    if os.fork() == 0:
        for each in kept:
            if isinstance(each, Vm):
                os.close(each.fd)
        os.close(vm.fd)
        os.write(told, b"x")
        signal.pause()
    os.read(held, 1)
    os.close(file)
    guest_memfd(PAGE)
    kept.append(vm)


LISTED: tuple[Callable[[], None], ...] = (
    nothing,
    small_and_always_read_only,
    thread_with_descriptors_of_its_own,
    duplicate_of_the_decoy,
    descriptors_closed_while_it_runs,
    child_with_the_same_memory,
    descriptor_on_its_way_in_a_socket,
    vcpu_mapped_and_closed,
    program_replaced_and_descriptor_kept,
    slot_of_system_management_mode_only,
    read_only_since_the_auditor_may_come,
    read_only_and_as_large_as_ram,
    nested_guest_allowed,
)
NEWER: tuple[Callable[[], None], ...] = (
    clock_page_in_hidden_memory,
    page_with_an_alias_that_is_said_to_be_kept_from_the_guest,
    guest_memfd_held_by_another,
)


class Attacker:
    """A process that does this beside its decoy; a context manager that leaves none behind.

    Up to 32 beside each other have hidden memory of their own: what one has KVM map is mapped in no other's VM.
    """

    decoy_ram = 0  # in an attacker: where its decoy's RAM begins, in host physical addresses
    _decoys = itertools.cycle(range(128 * MIB, 256 * MIB, 4 * MIB))

    def __init__(self, deed: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair()
        offset = next(self._decoys)
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            try:
                ours.close()
                Attacker.decoy_ram = RESERVED + offset
                decoy(offset)
                deed()
                theirs.send(b"!")
                theirs.recv(1)
            except Exception as error:
                theirs.send(repr(error).encode()[:100])
            finally:
                os._exit(0)
        theirs.close()
        self._ours = ours
        ours.settimeout(scaled(60.0))
        self.said = ours.recv(100)

    def __enter__(self) -> "Attacker":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._ours.close()


def verdict(pid: int, **options: Unpack[Options]) -> dict[str, Any]:
    try:
        result = audit_process(pid, **options)
    except OffmapError as error:
        return {"verdict": f"status {int(error.exit_status)}", "notes": [str(error)]}
    return judged(result)


def judged(result: AuditResult) -> dict[str, Any]:
    return {"verdict": result.verdict.value, "notes": list(result.notes)}


def tried(deed: Callable[[], None]) -> dict[str, Any]:
    with Attacker(deed) as attacker:
        if attacker.said != b"!":
            return {"failed": attacker.said.decode()}
        every = audit_every_vm(lambda vm: snapshot_process(vm.pid))
        # What an audit of the process alone says has been said among all, unless its VM was found by another's PID.
        mine = [judged(result) for result in every.vms if result.pid == attacker.pid]
        found = mine[0] if mine else verdict(attacker.pid)
        found["range"] = verdict(attacker.pid, ranges=named_ranges(attacker.pid), seconds=0)
        found["all"] = int(every.exit_status)
        found["all notes"] = list(every.notes)
    return found


def auditor_is_there() -> bool:
    """Whether there is somebody whose command line has ``audit``."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"audit" in words:
                return True
    return False


class What(Enum):
    """What a ``Swapper`` exchanges. Of a new VM, no slot was ever changed."""

    SLOT = auto()
    VM = auto()
    MEMORY = auto()


class Swapper(Attacker):
    """Has hidden memory under its slot for as long as it sees an auditor."""

    def __init__(self, what: What) -> None:
        self._what = what
        super().__init__(self._swap)

    def _swap(self) -> None:
        offset = (16 + 4 * self._what.value) * MIB
        vm, memory, other = exposed(), kept[-1], hidden(4 * MIB, offset)
        kept.append(vm)

        def work() -> None:
            before, last = False, vm
            while True:
                if (now := auditor_is_there()) != before:
                    if self._what is What.MEMORY:
                        place_over(memory, offset if now else None)
                    else:
                        if self._what is What.VM:
                            os.close(last.fd)
                            last = Vm()
                        else:
                            last.slot(0, memory, size=0)
                        last.slot(0, other if now else memory)
                    before = now
                time.sleep(0.01)

        threading.Thread(target=work, daemon=True).start()


def place_over(memory: mmap.mmap, hidden_at: int | None) -> None:
    """Put other memory in its place: what is at this offset of ``hidden``, or else ordinary memory."""
    if hidden_at is None:
        fd, flags, offset = -1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE, 0
    else:
        fd, flags, offset = os.open("/dev/mem", os.O_RDWR), mmap.MAP_SHARED, RESERVED + hidden_at
    rights, size = mmap.PROT_READ | mmap.PROT_WRITE, ctypes.c_size_t(len(memory))
    at, libc.mmap.restype = address(memory), ctypes.c_void_p
    if libc.mmap(ctypes.c_void_p(at), size, rights, flags | MAP_FIXED, fd, ctypes.c_long(offset)) != at:
        raise OSError(ctypes.get_errno(), "mmap")


def swapped() -> dict[str, Any]:
    """By what each exchanges: verdict and notes of one audit that all of them see come."""
    with ExitStack() as stack:
        attackers = {stack.enter_context(Swapper(what)).pid: what.name for what in What}
        done = subprocess.run(
            [sys.executable, "-m", "offmap", "audit", "--all", "--no-progress", "--json"],
            capture_output=True,
            check=False,
        )
    found = {attackers[vm["pid"]]: [vm["verdict"], *vm["notes"]] for vm in json.loads(done.stdout or "{}")["vms"]}
    return {"status": done.returncode, "found": found, "errors": done.stderr.decode()}


def moved_under_the_slot() -> dict[str, Any]:
    """The decoy's memory is moved away and back, under the same slot, in the middle of an audit."""
    ours, theirs = socket.socketpair()

    def deed() -> None:
        ours.close()
        memory = next(each for each in kept if isinstance(each, mmap.mmap))

        def work() -> None:
            while theirs.recv(1):
                size, at = ctypes.c_size_t(len(memory)), ctypes.c_void_p(address(memory))
                libc.mprotect(at, size, mmap.PROT_READ)
                libc.mprotect(at, size, mmap.PROT_READ | mmap.PROT_WRITE)
                theirs.send(b"!")

        threading.Thread(target=work, daemon=True).start()

    def progress(stage: Stage, share: float) -> None:
        if stage is Stage.WALK and not share:
            ours.send(b"x")
            ours.recv(1)

    with Attacker(deed) as attacker:
        began = time.monotonic_ns()
        found = snapshot_process(attacker.pid, progress=progress)
        later = [verdict(attacker.pid, seconds=0, seen=seen) for seen in ((), seen_at(began, found.ram.vms))]
    return {"verdict": found.audit.verdict.value, "notes": list(found.audit.notes), "later": later}


def born() -> dict[str, Any]:
    """An honest VM that was made since the auditor was started: while no other VM ended, and after one did."""
    since, found = time.monotonic_ns(), {}
    with Attacker(nothing) as attacker:
        found["alone"] = verdict(attacker.pid, seconds=0, since=since)
        with Attacker(nothing):
            pass
        found["another ended"] = verdict(attacker.pid, seconds=0, since=since)
    return found


def handed_over() -> dict[str, Any]:
    """Once VMs were looked for, their process ends, and a child that shares its memory goes on."""
    ours, theirs = socket.socketpair()

    def deed() -> None:
        ours.close()
        child_with_the_same_memory()

        def work() -> None:
            theirs.recv(1)
            os._exit(0)  # the thread's process, not the child

        threading.Thread(target=work, daemon=True).start()

    with Attacker(deed) as attacker:
        theirs.close()

        def prepare(vms: Sequence[VmProcess]) -> None:
            if attacker.pid in {vm.pid for vm in vms}:
                ours.send(b"x")
                os.waitid(os.P_PID, attacker.pid, os.WEXITED | os.WNOWAIT)

        every = audit_every_vm(lambda vm: snapshot_process(vm.pid), prepare)
    return {"all": int(every.exit_status), "pids": [vm.pid != attacker.pid for vm in every.vms]}


def churn(times: int) -> dict[str, Any]:
    """Audits of honest VMs while others begin and end beside them."""
    with Attacker(nothing) as one, Attacker(small_and_always_read_only) as other:
        busy = os.fork()
        if busy == 0:
            while True:
                vm = Vm()
                vm.slot(0, kept[0] if kept else plain(MIB))
                vcpu = vm.vcpu()
                for fd in (vcpu, vm.fd, vm.kvm):
                    os.close(fd)
        try:
            verdicts = [verdict(vm.pid) for vm in (one, other) for _ in range(times)]
            every = [audit_every_vm(lambda vm: snapshot_process(vm.pid)) for _ in range(1)]
        finally:
            os.kill(busy, signal.SIGKILL)
            os.waitpid(busy, 0)
        return {
            "verdicts": [each["verdict"] for each in verdicts],
            "notes": sorted({note for each in verdicts for note in each["notes"]}),
            "every": [
                [
                    int(each.exit_status),
                    list(each.notes),
                    [str(no.reason) for no in each.not_audited],
                    [vm.verdict.value for vm in each.vms if vm.pid in (one.pid, other.pid)],
                ]
                for each in every
            ],
        }


def main() -> int:
    names = sys.argv[1:]
    found: dict[str, Any] = {}
    for deed in (*LISTED, *NEWER):
        if not names or deed.__name__ in names:
            began = time.monotonic()
            found[deed.__name__] = tried(deed)
            print(f"{deed.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    if not names or "swapped" in names:
        found["swapped"] = swapped()
    if not names or "born" in names:
        found["born"] = born()
    if not names or "handed_over" in names:
        found["handed_over"] = handed_over()
    if not names or "moved_under_the_slot" in names:
        found["moved_under_the_slot"] = moved_under_the_slot()
    if not names or "churn" in names:
        found["churn"] = churn(2)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
