"""A VMM of a few lines that test_wrap.py runs wrapped, in a disposable host: ``python -m tests.lab.wrap_vmm``.

It prints JSON: what became of each slot that it set, and of each attempt to get its memory back. Then it waits for a
line of input, plants a kernel mapping of a page of its guest's, sets one more slot, and waits again.
"""

import ctypes
import errno
import json
import mmap
import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offmap.audit.kcore import Kcore
from offmap.audit.pagemap import own_entries, pfn
from offmap.audit.residency import physical_ranges
from offmap.kvm import Kvm, Vm
from offmap.uapi import kvm as uapi
from offmap.uapi.offmap_module import DEVICE as HERE

PAGE, MIB = 4096, 1 << 20
MAP_FIXED = 0x10
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_PAGEOUT = 21
SYS_USERFAULTFD, SYS_REMAP_FILE_PAGES, SYS_PKEY_MPROTECT = 323, 216, 329
SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER, IORING_REGISTER_BUFFERS, IORING_UNREGISTER_BUFFERS = 425, 427, 0, 1
IORING_SETUP_SQPOLL = 2
POOL = "/run/own"  # where the test mounts one
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
FLIPS = 16

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
kept: list[Any] = []  # mappings that stay


def name(result: int | None) -> str:
    """The errno of a call that failed; empty if it did not."""
    return errno.errorcode[ctypes.get_errno()] if result in {-1, ctypes.c_void_p(-1).value} else ""


def new(size: int, protection: int = 3, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1) -> int:
    """The address of a new mapping, without Python's own object, which would unmap it at the end."""
    at = libc.mmap(None, ctypes.c_size_t(size), protection, flags, fd, ctypes.c_long(0))
    if name(at):
        raise OSError(ctypes.get_errno(), "mmap")
    return int(at)


def filled(size: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1) -> int:
    at = new(size, flags=flags, fd=fd)
    for offset in range(0, size, PAGE):
        ctypes.memmove(at + offset, (at + offset).to_bytes(8, "little"), 8)
    return at


def is_full(at: int, size: int) -> bool:
    """Whether what ``filled`` wrote there is there still."""
    return all(
        ctypes.string_at(at + offset, 8) == (at + offset).to_bytes(8, "little") for offset in range(0, size, PAGE)
    )


def file_of(at: int) -> str:
    """The file that is mapped at an address; empty for none."""
    with open("/proc/self/maps") as file:  # noqa: PTH123
        for line in file:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= at < end:
                return " ".join(line.split()[5:])
    return ""


class Slots:
    """The memory slots of a VM, set by the C library: fcntl.ioctl works on a copy of what others may change."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.number = 0

    def region(self, at: int, size: int, flags: int = 0) -> uapi.kvm_userspace_memory_region:
        self.number += 1
        return uapi.kvm_userspace_memory_region(self.number, flags, self.number << 24, size, at)

    def set(self, at: int, size: int, flags: int = 0) -> str:
        return self.set_region(self.region(at, size, flags))

    def set_region(self, region: uapi.kvm_userspace_memory_region) -> str:
        return name(libc.ioctl(self.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION, ctypes.addressof(region)))


def placed(slots: Slots) -> dict[str, Any]:
    """Slots that are hidden, with what had been there."""
    size = 4 * MIB
    anonymous, read_only = filled(size), filled(2 * PAGE)
    found: dict[str, Any] = {
        "anonymous": [slots.set(anonymous, size), file_of(anonymous), is_full(anonymous, size)],
        "read-only slot": [
            slots.set(read_only, 2 * PAGE, uapi.KVM_MEM_READONLY),
            file_of(read_only),
            is_full(read_only, 2 * PAGE),
        ],
    }
    with tempfile.TemporaryFile() as file:
        file.write(secrets.token_bytes(3 * PAGE))
        file.flush()
        private = new(3 * PAGE, flags=mmap.MAP_PRIVATE, fd=file.fileno())
    ctypes.memset(private + PAGE, 7, PAGE)
    before = ctypes.string_at(private, 3 * PAGE)
    error = slots.set(private, 3 * PAGE)
    found["private file"] = [error, file_of(private), ctypes.string_at(private, 3 * PAGE) == before]
    inside = filled(4 * PAGE)
    error = slots.set(inside + PAGE, 2 * PAGE)
    found["part of a mapping"] = [error, file_of(inside + PAGE), is_full(inside, 4 * PAGE)]
    found["around it"] = [file_of(inside), file_of(inside + 3 * PAGE)]
    libc.mprotect(ctypes.c_void_p(two := filled(2 * PAGE)), ctypes.c_size_t(PAGE), mmap.PROT_READ)
    found["two mappings"] = [slots.set(two, 2 * PAGE), file_of(two), is_full(two, 2 * PAGE)]
    region = slots.region(newer := filled(PAGE), PAGE)
    newer_region = uapi.kvm_userspace_memory_region2(
        region.slot, 0, region.guest_phys_addr, region.memory_size, region.userspace_addr
    )
    error = name(libc.ioctl(slots.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION2, ctypes.addressof(newer_region)))
    found["newer call"] = [error, file_of(newer), is_full(newer, PAGE)]
    region = slots.region(logged := filled(PAGE), PAGE)
    errors = []
    for flags in (0, uapi.KVM_MEM_LOG_DIRTY_PAGES, 0):
        region.flags = flags
        errors.append(slots.set_region(region))
    found["dirty log"] = ["".join(errors), file_of(logged), is_full(logged, PAGE)]
    return found


def zeroed(slots: Slots) -> list[bool]:
    """Whether a secret is where it was in physical memory, before the slot is set and after."""
    secret = secrets.token_bytes(32)
    at = new(PAGE)
    ctypes.memmove(at + 64, secret, 32)
    physical = int(pfn(own_entries(at, 1))[0]) * PAGE
    found = []
    with Kcore() as kcore:
        for _ in range(2):
            page = bytearray(32)
            kcore.read_virtual(kcore.page_offset_base + physical + 64, memoryview(page))
            found.append(page == secret)
            slots.set(at, PAGE)
    return found


def refused(slots: Slots, kvm: Kvm) -> dict[str, str]:
    """Slots that cannot be hidden, and calls that would get around it."""
    missing = new(PAGE)
    uffd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    for command, words in ((UFFDIO_API, (0xAA, 0, 0)), (UFFDIO_REGISTER, (missing, PAGE, 1, 0))):
        argument = (ctypes.c_uint64 * len(words))(*words)
        if libc.ioctl(uffd, command, ctypes.addressof(argument)):
            raise OSError(ctypes.get_errno(), "userfaultfd")
    shared = os.memfd_create("ram")
    os.ftruncate(shared, PAGE)
    hole = new(2 * PAGE)
    libc.munmap(ctypes.c_void_p(hole + PAGE), ctypes.c_size_t(PAGE))
    found = {
        "hole": slots.set(hole, 2 * PAGE),  # first, as a new mapping would fill it
        "userfaultfd": slots.set(missing, PAGE),
        "no access": slots.set(new(PAGE, 0), PAGE),
        "executable": slots.set(new(PAGE, 7), PAGE),
        "shared memfd": slots.set(new(PAGE, flags=mmap.MAP_SHARED, fd=shared), PAGE),
        "shared anonymous": slots.set(new(PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), PAGE),
        "of the kernel": slots.set(of_the_kernel(), PAGE),
        "Xen": name(libc.ioctl(slots.vm.fd, uapi.KVM_XEN_HVM_CONFIG, bytes(ctypes.sizeof(uapi.kvm_xen_hvm_config)))),
        "pinned": set_pinned(slots),
        "a child's": set_while_a_child_has_it(slots),
        "guest_memfd": slots.set(filled(PAGE), PAGE, uapi.KVM_MEM_GUEST_MEMFD),
    }
    with slots.vm.create_vcpu(0) as vcpu:
        head = uapi.kvm_cpuid()
        found["KVM_SET_CPUID"] = name(libc.ioctl(vcpu.fd, uapi.KVM_SET_CPUID, ctypes.addressof(head)))
    low = new(PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40)  # MAP_32BIT
    region = slots.region(filled(PAGE), PAGE)
    ctypes.memmove(low, bytes(region), ctypes.sizeof(region))
    found["int 0x80"] = errno.errorcode.get(-by_int80(slots.vm.fd, uapi.KVM_SET_USER_MEMORY_REGION, low), "")
    return found


def by_int80(fd: int, command: int, argument: int) -> int:
    """ioctl(2) by the ABI of i386."""
    code = mmap.mmap(-1, PAGE, prot=7)
    kept.append(code)
    # push rbx; mov eax, 54; mov ebx, edi; mov ecx, esi; int 0x80; pop rbx; ret (edx is the third argument already)
    code.write(b"\x53\xb8\x36\x00\x00\x00\x89\xfb\x89\xf1\xcd\x80\x5b\xc3")
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint)(at)
    return int(call(fd, command, argument))


def kept_as_it_is(slots: Slots) -> dict[str, Any]:
    """What a VMM can do to memory that was placed."""
    size = 2 * MIB
    at = filled(size)
    slots.set(at, size)
    part = ctypes.c_void_p(at + PAGE)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    attempts: dict[str, Callable[[], int]] = {
        "unmap a part": lambda: libc.munmap(part, ctypes.c_size_t(PAGE)),
        "map over": lambda: libc.mmap(part, ctypes.c_size_t(PAGE), 3, anonymous, -1, ctypes.c_long(0)),
        "protect": lambda: libc.mprotect(part, ctypes.c_size_t(PAGE), 0),
        "move": lambda: libc.mremap(
            ctypes.c_void_p(at), ctypes.c_size_t(size), ctypes.c_size_t(size), MREMAP_MAYMOVE | MREMAP_FIXED, new(size)
        ),
        "give back": lambda: libc.madvise(part, ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED),
        "page out": lambda: libc.madvise(part, ctypes.c_size_t(PAGE), MADV_PAGEOUT),
        "punch": lambda: libc.madvise(part, ctypes.c_size_t(PAGE), mmap.MADV_REMOVE),
        "move and leave": lambda: libc.mremap(
            ctypes.c_void_p(at), ctypes.c_size_t(size), ctypes.c_size_t(size), MREMAP_MAYMOVE | MREMAP_DONTUNMAP
        ),
        "exchange": lambda: libc.syscall(SYS_REMAP_FILE_PAGES, part, ctypes.c_size_t(PAGE), 0, ctypes.c_size_t(3), 0),
        "key": lambda: libc.syscall(SYS_PKEY_MPROTECT, part, ctypes.c_size_t(PAGE), 0, -1),
        "pin": lambda: pin(at, PAGE),
    }
    return {**{what: name(attempt()) for what, attempt in attempts.items()}, "whole": is_full(at, size)}


def new_ring(flags: int = 0) -> int:
    return int(libc.syscall(SYS_IO_URING_SETUP, 8, (ctypes.c_uint32 * 30)(0, 0, flags)))


def pin(at: int, size: int, ring: int | None = None) -> int:
    """Make memory a fixed buffer of io_uring's."""
    buffer = (ctypes.c_uint64 * 2)(at, size)
    ring = new_ring() if ring is None else ring
    return int(libc.syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_BUFFERS, buffer, 1))


def set_while_a_child_has_it(slots: Slots) -> str:
    """Set a slot of memory that a child has too, with what is in it."""
    at, ends = filled(PAGE), os.pipe()
    if not (child := os.fork()):
        os.close(ends[1])
        os.read(ends[0], 1)
        os._exit(0)
    error = slots.set(at, PAGE)
    for end in ends:
        os.close(end)
    os.waitpid(child, 0)
    return error


def set_pinned(slots: Slots) -> str:
    """Set a slot of memory that a device may write to; returns the error, or that it could not be pinned."""
    at, ring = filled(PAGE), new_ring()
    if error := name(pin(at, PAGE, ring)):
        return f"not pinned: {error}"
    error = slots.set(at, PAGE)
    libc.syscall(SYS_IO_URING_REGISTER, ring, IORING_UNREGISTER_BUFFERS, None, 0)
    return error


def brought(slots: Slots, pool: str, kinds: Sequence[str] = ("open", "closed", "device")) -> dict[str, Any]:
    """Slots of hidden memory that this VMM has itself, all but its first and last page: how each ended.

    Of each: the slot's error; that of unmapping it then; whether it has what was there; and whether it is that file.
    """
    size = MIB
    found: dict[str, list[str | bool]] = {}
    for what in kinds:
        if what == "device":
            fd = os.open(HERE, os.O_RDWR)
            at = filled(size, mmap.MAP_SHARED, fd)
        else:
            fd = os.open(pool, os.O_TMPFILE | os.O_RDWR)
            os.ftruncate(fd, size)
            at = filled(size, mmap.MAP_SHARED, fd)
        view = new(size, flags=mmap.MAP_SHARED, fd=fd)
        if what == "closed":
            os.close(fd)
        errors: list[str | bool] = [slots.set(at + PAGE, size - 2 * PAGE)]
        errors.append(name(libc.munmap(ctypes.c_void_p(at + 2 * PAGE), ctypes.c_size_t(PAGE))))
        if not errors[1]:
            found[what] = errors
            continue
        found[what] = [*errors, is_full(at, size), ctypes.string_at(view, size) == ctypes.string_at(at, size)]
        again = slots.set(at + PAGE, PAGE), name(libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(PAGE)))
        found[what] += again
    return found


def forked(slots: Slots) -> int:
    """Set a slot in a child, which has the VM's file and not its memory; whether KVM refused it."""
    if not (pid := os.fork()):
        os._exit(slots.set(filled(PAGE), PAGE) == "EIO")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


PV_MSRS = {
    "wall clock": (0x4B564D00, 0),
    "steal time": (0x4B564D03, 1),
    "page faults": (0x4B564D02, 1),
    "end of interrupt": (0x4B564D04, 1),
    "Hyper-V guest": (0x40000000, 1),
    "Hyper-V hypercalls": (0x40000001, 1),
    "Hyper-V clock": (0x40000021, 1),
    "Hyper-V processor": (0x40000073, 1),
}
"""MSRs that name a page which KVM and the guest share, and the bit that makes it so."""


def paravirtual(kvm: Kvm) -> list[str]:
    """Have KVM share a page with the guest for each of these MSRs; returns those that it took. The VM stays."""
    vm = kvm.create_vm()
    vm.create_irqchip()
    slots = Slots(vm)
    slots.set(filled(MIB), MIB)
    vcpu = vm.create_vcpu(0)
    kept.extend((vm, vcpu))
    vcpu.set_cpuid(kvm.supported_cpuid())
    found = []
    for number, (what, (msr, bit)) in enumerate(PV_MSRS.items()):
        value = 1 if msr == 0x40000000 else (1 << 24) + number * PAGE | bit
        if libc.ioctl(vcpu.fd, uapi.KVM_SET_MSRS, (ctypes.c_uint64 * 3)(1, msr, value)) == 1:
            found.append(what)
    vcpu.run()  # it comes to nothing, but KVM does what it does before a guest runs
    return found


def flipped(slots: Slots) -> set[str]:
    """Set slots whose address another thread changes all the time; how that ended."""
    region = slots.region(0, PAGE)
    addresses = [0, 0]
    over = threading.Event()

    def flip() -> None:
        while not over.is_set():
            for address in addresses:
                region.userspace_addr = address

    thread = threading.Thread(target=flip)
    addresses[:] = [filled(PAGE), filled(PAGE)]
    thread.start()
    found = set()
    for _ in range(FLIPS):
        addresses[:] = [filled(PAGE), filled(PAGE)]
        slots.number += 1
        region.slot, region.guest_phys_addr = slots.number, slots.number << 24
        found.add(slots.set_region(region))
    over.set()
    thread.join()
    return found


def cpuid(kvm: Kvm) -> dict[str, int]:
    """What the guest must not be offered: bits of CPUID that are left."""
    clock = sum(1 << bit for bit in (0, 3, 24))
    left = {"kvm-clock": 0, "nesting": 0, "leaves": 0}
    for entry in kvm.supported_cpuid():
        left["leaves"] += 1
        if entry.function == uapi.KVM_CPUID_FEATURES:
            left["kvm-clock"] = entry.eax & clock
        elif entry.function == 0x80000001:
            left["nesting"] = entry.ecx & 1 << 2
    return left


def clock_is_refused(kvm: Kvm, slots: Slots) -> dict[str, str]:
    """A VMM that knows better enables kvm-clock for its guest: where CPUID has it, has it elsewhere, or is missing."""
    usual = kvm.supported_cpuid()
    behind = kvm.supported_cpuid()
    for entry in (*usual, *behind):
        if entry.function == uapi.KVM_CPUID_FEATURES:
            entry.eax |= 1 << uapi.KVM_FEATURE_CLOCKSOURCE2
    for entry in behind:
        entry.function += 0x100 * (entry.function in {uapi.KVM_CPUID_SIGNATURE, uapi.KVM_CPUID_FEATURES})
    behind.append(uapi.kvm_cpuid_entry2(function=uapi.KVM_CPUID_SIGNATURE))
    found = {}
    for number, (what, entries) in enumerate({"usual": usual, "behind others": behind, "no CPUID": []}.items(), 1):
        with slots.vm.create_vcpu(number) as vcpu:
            if entries:
                vcpu.set_cpuid(entries)
            msrs = (ctypes.c_uint64 * 3)(1, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0x100_0001)
            done: int = libc.ioctl(vcpu.fd, uapi.KVM_SET_MSRS, ctypes.addressof(msrs))
            found[what] = ["refused", "set"][done]
    return found


def closed_and_made_again(kvm: Kvm) -> dict[str, Any]:
    """Begin a Linux guest in the second of three VMs that are closed, with one number, and have other memory."""
    new_ring(IORING_SETUP_SQPOLL)  # a thread of the kernel's in this process, which stands still with the others
    found: dict[str, Any] = {"numbers": []}
    for first in (0, 1 << 30):
        with kvm.create_vm() as vm:
            at = filled(MIB)
            kept.append(at)
            found["numbers"].append(vm.fd)
            vm.set_user_memory_region(first >> 30, first, MIB, at)
            if first:
                with vm.create_vcpu(0) as vcpu:
                    for begin in (0, first):
                        vcpu.set_regs(uapi.kvm_regs(rip=begin + PAGE, rsi=begin + 2 * PAGE, rflags=2))
                found["told"] = [ctypes.string_at(each + PAGE, 2) == b"\xeb\xfe" for each in kept]
    with kvm.create_vm() as vm:
        found["numbers"].append(vm.fd)
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    found["whole"] = [is_full(each, MIB) for each in kept]
    return {**found, "threads": sorted(name.partition("-")[0] for name in threads)}


def of_the_kernel() -> int:
    """The address of a mapping of the kernel's own, which looks like a device's: the page of vDSO variables."""
    with open("/proc/self/maps") as file:  # noqa: PTH123
        return next(int(line.split("-")[0], 16) for line in file if line.endswith("[vvar]\n"))


def plant(at: int) -> int:
    """Have the kernel map a page of ours; returns the descriptor that holds the mapping."""
    ((physical, _),) = physical_ranges(os.getpid(), at, PAGE)
    fd = os.open("/dev/offmap-alias", os.O_WRONLY)
    os.write(fd, f"memremap {physical:#x} {PAGE:#x}".encode())
    return fd


def main() -> None:
    if sys.argv[1:] == ["again"]:
        with Kvm() as kvm:
            print(json.dumps(closed_and_made_again(kvm)), flush=True)
            sys.stdin.read()
        return
    with Kvm() as kvm, kvm.create_vm() as vm:
        slots = Slots(vm)
        if sys.argv[1:] == ["plain"]:
            at = filled(MIB)
            found: dict[str, Any] = {"placed": [slots.set(at, MIB), file_of(at), is_full(at, MIB)]}
        elif sys.argv[1:2] == ["own"]:
            found = brought(slots, sys.argv[2], ("open", "closed"))
        else:
            found = {
                "cpuid": cpuid(kvm),
                "clock": clock_is_refused(kvm, slots),
                "placed": placed(slots),
                "zeroed": zeroed(slots),
                "brought": brought(slots, POOL),
                "forked": forked(slots),
                "shared with KVM": paravirtual(kvm),
                "refused": refused(slots, kvm),
                "kept": kept_as_it_is(slots),
                "flipped": sorted(flipped(slots)),
            }
        print(json.dumps({"pid": os.getpid(), **found}), flush=True)
        if not sys.stdin.readline():
            return
        at = filled(MIB)
        slots.set(at, MIB)
        if file_of(at) == HERE:
            kept.append(plant(at))
        slots.set(filled(PAGE), PAGE)
        sys.stdin.read()


if __name__ == "__main__":
    main()
