"""VMMs that want to be called hidden and are not: more ways of each kind that once worked, in a disposable host.

``python -m tests.lab.nine_ways [NAME…]`` starts all of them beside each other, with one honest VM, and audits the host
once, as ``offmap audit --all`` does. It prints one JSON object: by program, the worst that is said of its VMs. It ends
with status 1 if any but the honest one is called hidden. docs/proof.md has the table.
"""

import array
import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from offmap.audit.audit import Snapshot, snapshot_processes
from offmap.audit.vms import VmProcess, audit_every_vm
from offmap.errors import OffmapError

from .kvm_attack_target import (
    GUEST_MEMFD,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_SET_MSRS,
    KVM_SET_USER_MEMORY_REGION2,
    MIB,
    PAGE,
    READ_ONLY,
    RESERVED,
    Attacker,
    Vm,
    address,
    exposed,
    hidden,
    kept,
    libc,
    nothing,
    place_over,
    plain,
    set_svme,
)

KVM_GET_STATS_FD, KVM_CREATE_DEVICE, KVM_DEV_TYPE_VFIO = 0xAECE, 0xC00CAEE0, 4
CLONE_NEWPID, CLONE_NEWNS = 0x2000_0000, 0x2_0000
KVM_XEN_HVM_SET_ATTR, KVM_XEN_ATTR_TYPE_SHARED_INFO = 0x4048AEC9, 1
SYS_EXIT, PR_SET_NAME = 60, 15
CLOCK_ON = struct.pack("<IIIIQ", 1, 0, 0x4B56_4D01, 0, 0x2000 | 1)  # MSR_KVM_SYSTEM_TIME_NEW
CLOCK_OFF = struct.pack("<IIIIQ", 1, 0, 0x4B56_4D01, 0, 0)
COMES, SEEN = os.pipe(), os.pipe()


def honest() -> Vm:
    """The decoy's VM."""
    return next(each for each in kept if isinstance(each, Vm))


def in_a_child(work: Callable[[], None]) -> None:
    """Do this in a child that stays; returns once it has."""
    done, told = os.pipe()
    if os.fork() == 0:
        try:
            for each in kept:
                if isinstance(each, Vm):
                    os.close(each.fd)
            kept.clear()
            work()
            os.write(told, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    if os.read(done, 1) != b"!":
        raise OSError("the child failed")


# 1. VMs that no table of descriptors shows.


def kept_by_its_statistics_alone() -> None:
    vm = exposed()
    kept.append(fcntl.ioctl(vm.fd, KVM_GET_STATS_FD, 0))
    os.close(vm.fd)


def kept_by_a_device_alone() -> None:
    vm = exposed()
    fcntl.ioctl(vm.fd, KVM_CREATE_DEVICE, bytearray(struct.pack("<III", KVM_DEV_TYPE_VFIO, 0, 0)))
    os.close(vm.fd)


def of_a_process_whose_first_thread_is_gone() -> None:
    def work() -> None:
        ready = threading.Event()

        def go_on() -> None:
            kept.append(exposed().run_for_ever())
            ready.set()
            signal.pthread_sigmask(signal.SIG_BLOCK, [])
            threading.Event().wait()

        threading.Thread(target=go_on, daemon=True).start()
        ready.wait()

    def leave() -> None:
        work()
        os.write(told, b"!")
        libc.syscall(SYS_EXIT, 0)

    done, told = os.pipe()
    if os.fork() == 0:
        leave()
    os.read(done, 1)


def in_pid_and_mount_namespaces_of_its_own() -> None:
    def work() -> None:
        if libc.unshare(CLONE_NEWPID | CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        in_a_child(lambda: kept.append(exposed()))

    in_a_child(work)


# 2. Pages of a guest_memfd that the audited process does not have (Linux 7.3).


def _guest_memfd(slot: Callable[[int], int], offset: int = 0) -> Vm:
    """A VM with a decoy at its slot's address, and a populated guest_memfd.

    Args:
        slot: does with its descriptor what is to be done; returns the one to close.
    """
    vm = Vm.__new__(Vm)
    vm.kvm = os.open("/dev/kvm", os.O_RDWR)
    vm.fd = fcntl.ioctl(vm.kvm, KVM_CREATE_VM, 0)
    asked = bytearray(struct.pack("<QQ6Q", 8 * MIB, 3, *[0] * 6))  # MMAP | INIT_SHARED
    file = int(fcntl.ioctl(vm.fd, KVM_CREATE_GUEST_MEMFD, asked))
    with mmap.mmap(file, 8 * MIB) as view:
        for at in range(offset, offset + 4 * MIB, PAGE):
            view[at] = 1
    memory = hidden(4 * MIB, 8 * MIB)
    where = (0, GUEST_MEMFD, 0, 4 * MIB, address(memory), offset, file, 0, *[0] * 14)
    fcntl.ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION2, struct.pack("<IIQQQQII14Q", *where))
    os.close(slot(file))
    kept.append(vm)
    return vm


def guest_memfd_on_its_way_in_a_socket() -> None:
    def send(file: int) -> int:
        ours, theirs = socket.socketpair()
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))])
        kept.extend((ours, theirs))
        return file

    _guest_memfd(send)


def guest_memfd_mapped_and_closed() -> None:
    def mapped(file: int) -> int:
        kept.append(mmap.mmap(file, 8 * MIB))
        return file

    _guest_memfd(mapped)


def second_half_of_a_guest_memfd_that_is_held_by_the_slot_alone() -> None:
    _guest_memfd(lambda file: file, 4 * MIB)


# 3. Mappings that come and go.


def clock_page_that_comes_and_goes() -> None:
    vcpu = fcntl.ioctl(honest().fd, KVM_CREATE_VCPU, 1)
    fcntl.ioctl(vcpu, KVM_SET_MSRS, CLOCK_ON)
    fcntl.ioctl(vcpu, KVM_SET_MSRS, CLOCK_OFF)

    def work() -> None:
        pause = threading.Event()
        while True:
            pause.wait(0.05)
            fcntl.ioctl(vcpu, KVM_SET_MSRS, CLOCK_ON)
            fcntl.ioctl(vcpu, KVM_SET_MSRS, CLOCK_OFF)

    threading.Thread(target=work, daemon=True).start()


def nesting_that_comes_and_goes() -> None:
    set_svme(honest(), True, False)


def xen_page_that_comes_and_goes() -> None:
    for page in (3, (1 << 64) - 1):  # KVM_XEN_INVALID_GFN
        attribute = struct.pack("<HxxxxxxQ56x", KVM_XEN_ATTR_TYPE_SHARED_INFO, page)
        fcntl.ioctl(honest().fd, KVM_XEN_HVM_SET_ATTR, attribute)


# 5. Slots over what is in no ordinary page table.


def _mapping(name: str) -> tuple[int, int]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.endswith(name))
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    return start, end - start


def _slot_at(va: int, size: int) -> None:
    where = struct.pack("<IIQQQ", 1, 0, 1 << 30, size, va)
    fcntl.ioctl(honest().fd, 0x4020AE46, where)


def slot_on_the_kernels_clock_pages() -> None:
    _slot_at(*_mapping("[vvar]"))


def slot_on_a_vcpus_registers() -> None:
    vm = honest()
    vcpu = fcntl.ioctl(vm.fd, KVM_CREATE_VCPU, 1)
    page = mmap.mmap(vcpu, fcntl.ioctl(vm.kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    kept.append(page)
    _slot_at(address(page), PAGE)


def slot_on_a_private_mapping_of_hidden_memory() -> None:
    fd = os.open("/dev/mem", os.O_RDWR)
    memory = mmap.mmap(fd, 4 * MIB, flags=mmap.MAP_PRIVATE, offset=RESERVED + 24 * MIB)
    for at in range(0, len(memory), PAGE):
        memory[at] = 1  # now it is a copy, in ordinary memory
    kept.append(memory)
    honest().slot(1, memory, 1 << 30)


# 6. What the guest can only read, beside a claim.


def read_only_in_system_management_mode() -> None:
    honest().slot(1 << 16 | 1, plain(), 1 << 30, READ_ONLY)


def read_only_in_many_small_slots() -> None:
    for number in range(1, 17):
        honest().slot(number, plain(64 << 10), number << 30, READ_ONLY)


def read_only_and_said_to_be_kept_from_the_guest() -> None:
    memory = plain()
    slot = {"guest_phys_addr": 1 << 30, "memory_size": len(memory), "userspace_addr": address(memory), "backend": "x"}
    claim = os.memfd_create("offmap-memslots")
    text = {"schema": "offmap-memslots/1", "slots": [slot], "excluded": [[1 << 30, len(memory)]]}
    os.write(claim, json.dumps(text).encode())
    kept.append(claim)
    honest().slot(1, memory, 1 << 30, READ_ONLY)


# 7. VMMs that see the auditor come. What he is known by, they are told.


def _as_the_auditor_comes(work: Callable[[], None]) -> None:
    def wait() -> None:
        os.read(COMES[0], 1)
        work()
        os.write(SEEN[1], b"!")

    threading.Thread(target=wait, daemon=True).start()


def memory_exchanged_under_its_slot() -> None:
    memory = plain()
    honest().slot(1, memory, 1 << 30)
    _as_the_auditor_comes(lambda: place_over(memory, 28 * MIB))


def slot_taken_away() -> None:
    memory = plain()
    honest().slot(1, memory, 1 << 30)
    _as_the_auditor_comes(lambda: honest().slot(1, memory, 1 << 30, size=0))


def slot_made_read_only() -> None:
    memory = plain(64 << 10)
    honest().slot(1, memory, 1 << 30)

    def work() -> None:
        honest().slot(1, memory, 1 << 30, size=0)
        honest().slot(1, memory, 1 << 30, READ_ONLY)

    _as_the_auditor_comes(work)


# 8. VMMs that would rather have no auditor.


def file_cut_short_under_its_slot() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4 * MIB)
    memory = mmap.mmap(fd, 4 * MIB)
    memory[: 2 * MIB] = b"\xf4" * (2 * MIB)
    kept.extend((memory, fd))
    honest().slot(1, memory, 1 << 30)
    os.ftruncate(fd, PAGE)


def stopped() -> None:
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        kept.append(exposed())
        os.write(told, b"!")
        os.kill(os.getpid(), signal.SIGSTOP)
    os.read(ready, 1)
    os.waitid(os.P_PID, child, os.WSTOPPED)


def with_a_name_and_a_claim_that_no_reader_expects() -> None:
    libc.prctl(PR_SET_NAME, b"\x1b[2J\n\xff)S 1 1")
    exposed_vm = exposed()
    claim = os.memfd_create("offmap-memslots")
    os.write(claim, b"[" * MIB)
    kept.extend((exposed_vm, claim))


# 9. Memory that is not there yet.


def file_of_holes() -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 64 * MIB)
    memory = mmap.mmap(fd, 64 * MIB)
    kept.extend((memory, fd))
    honest().slot(1, memory, 1 << 30)


def given_back_to_the_kernel() -> None:
    memory = plain()
    honest().slot(1, memory, 1 << 30)
    memory.madvise(mmap.MADV_DONTNEED)


def without_any_rights_until_later() -> None:
    memory = plain()
    honest().slot(1, memory, 1 << 30)
    memory.madvise(mmap.MADV_DONTNEED)
    libc.mprotect(ctypes.c_void_p(address(memory)), ctypes.c_size_t(len(memory)), 0)


SEE_HIM_COME: tuple[Callable[[], None], ...] = (
    memory_exchanged_under_its_slot,
    slot_taken_away,
    slot_made_read_only,
)
PROGRAMS: tuple[Callable[[], None], ...] = (
    nothing,
    kept_by_its_statistics_alone,
    kept_by_a_device_alone,
    of_a_process_whose_first_thread_is_gone,
    in_pid_and_mount_namespaces_of_its_own,
    clock_page_that_comes_and_goes,
    nesting_that_comes_and_goes,
    xen_page_that_comes_and_goes,
    slot_on_the_kernels_clock_pages,
    slot_on_a_vcpus_registers,
    slot_on_a_private_mapping_of_hidden_memory,
    read_only_in_system_management_mode,
    read_only_in_many_small_slots,
    read_only_and_said_to_be_kept_from_the_guest,
    *SEE_HIM_COME,
    file_cut_short_under_its_slot,
    stopped,
    with_a_name_and_a_claim_that_no_reader_expects,
    file_of_holes,
    given_back_to_the_kernel,
    without_any_rights_until_later,
)
NEWER: tuple[Callable[[], None], ...] = (
    guest_memfd_on_its_way_in_a_socket,
    guest_memfd_mapped_and_closed,
    second_half_of_a_guest_memfd_that_is_held_by_the_slot_alone,
)


def audited(programs: dict[int, str]) -> dict[str, list[str]]:
    """What one audit of all says of each process group: verdicts, or why there is none."""
    found: dict[int, Snapshot | OffmapError] = {}
    since = time.monotonic_ns()
    told = sum(deed.__name__ in programs.values() for deed in SEE_HIM_COME)
    os.write(COMES[1], b"!" * told)
    for _ in range(told):
        os.read(SEEN[0], 1)

    def prepare(vms: Sequence[VmProcess]) -> None:
        found.update(snapshot_processes([vm.pid for vm in vms], seconds=0.1, since=since))

    def audit(vm: VmProcess) -> Snapshot:
        one = found.pop(vm.pid)
        if isinstance(one, OffmapError):
            raise one
        return one

    every = audit_every_vm(audit, prepare)
    said: dict[str, list[str]] = {name: [] for name in programs.values()}
    for vm in every.vms:
        said[programs.get(os.getpgid(vm.pid), "others")].append(f"{vm.verdict.value}: {'; '.join(vm.notes)}")
    for failed in every.not_audited:
        said[programs.get(os.getpgid(failed.pid), "others")].append(f"undetermined: {failed.reason}")
    said["all"] = [str(int(every.exit_status)), *every.notes]
    return said


def main() -> int:
    names = sys.argv[1:]
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        programs: dict[int, str] = {}
        for deed in (*PROGRAMS, *NEWER) if names else PROGRAMS:
            if not names or deed.__name__ in names:
                attacker = stack.enter_context(Attacker(deed))
                programs[attacker.pid] = deed.__name__
                if attacker.said != b"!":
                    failed[deed.__name__] = attacker.said.decode()
        said = audited(programs)
    # Each has the decoy beside what it hides: one verdict of the process, or of two processes.
    hidden = [name for name, words in said.items() if words and all(word.startswith("hidden") for word in words)]
    print(json.dumps({"said": said, "failed": failed, "hidden": hidden}))
    return 1 if failed or hidden != ["nothing"] else 0


if __name__ == "__main__":
    sys.exit(main())
