"""What CPUID must not offer to a guest on hidden memory: kvm-clock and nested virtualisation.

KVM writes kvm-clock's page, and maps a nested guest's control pages, by the kernel's own addresses.
"""

import ctypes
import struct
from _collections_abc import Sequence  # os has it already; collections.abc would bring more

from offmap.uapi import kvm
from offmap.uapi import ptrace as tracing
from offmap.wrap import address_space
from offmap.wrap.stopped import Stopped

_CLOCK = 1 << kvm.KVM_FEATURE_CLOCKSOURCE | 1 << kvm.KVM_FEATURE_CLOCKSOURCE2
_CLOCK |= 1 << kvm.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
_NESTING = {
    0x1: ("ecx", 1 << 5),  # VMX
    0x80000001: ("ecx", 1 << 2),  # SVM
}
# Where a hypervisor's leaves may begin (for_each_possible_hypervisor_cpuid_base). KVM's are behind its signature; where
# the guest sees Hyper-V's too, those come first.
_BASES = range(0x40000000, 0x40010000, 0x100)
_SIGNATURE = b"KVMKVMKVM\0\0\0"


class _OneMsr(ctypes.Structure):
    _fields_ = [("msrs", kvm.kvm_msrs), ("entry", kvm.kvm_msr_entry)]


_MOST = 256  # entries: KVM_MAX_CPUID_ENTRIES of arch/x86/include/asm/kvm_host.h


def edit(pid: int, address: int, *, keep_clock: bool) -> None:
    """Take what is forbidden out of the process's ``struct kvm_cpuid2`` at `address`.

    Args:
        keep_clock: kvm-clock is allowed.
    """
    head = kvm.kvm_cpuid2()
    address_space.read_into(pid, address, ctypes.addressof(head), ctypes.sizeof(head))
    entries = (kvm.kvm_cpuid_entry2 * min(head.nent, _MOST))()
    if not entries:
        return
    first, size = address + ctypes.sizeof(head), ctypes.sizeof(entries)
    address_space.read_into(pid, first, ctypes.addressof(entries), size)
    before = bytes(entries)
    remove(list(entries), keep_clock=keep_clock)
    if bytes(entries) != before:
        address_space.write_from(pid, first, ctypes.addressof(entries), size)


def remove(entries: Sequence[kvm.kvm_cpuid_entry2], *, keep_clock: bool = False) -> None:
    """Clear in these entries, which are all of a vCPU's, the bits of what is forbidden."""
    clock = {entry.function | kvm.KVM_CPUID_FEATURES & 0xFF: ("eax", _CLOCK) for entry in entries if _is_of_kvm(entry)}
    forbidden = _NESTING if keep_clock else _NESTING | clock
    for entry in entries:
        if entry.function in forbidden:
            register, bits = forbidden[entry.function]
            setattr(entry, register, getattr(entry, register) & ~bits)


def _is_of_kvm(entry: kvm.kvm_cpuid_entry2) -> bool:
    return entry.function in _BASES and struct.pack("<III", entry.ebx, entry.ecx, entry.edx) == _SIGNATURE


def enforce(stopped: Stopped, vcpu: int) -> int:
    """Have KVM refuse what this vCPU's CPUID does not offer; returns 0 or a negative errno.

    That holds for a vCPU without any CPUID too. Old kernels (6.1) then also refuse that a VMM clears kvm-clock's MSR,
    which QEMU does at each reset. There it is not refused to the guest either: it can have one page mapped, which the
    next audit finds.
    """
    result = _enforce(stopped, vcpu, 1)
    if result == 0:
        clear = _OneMsr(kvm.kvm_msrs(1), kvm.kvm_msr_entry(kvm.MSR_KVM_SYSTEM_TIME))
        if _with_argument(stopped, vcpu, kvm.KVM_SET_MSRS, clear) != 1:
            result = _enforce(stopped, vcpu, 0)
    return result


def _enforce(stopped: Stopped, vcpu: int, on: int) -> int:
    request = kvm.kvm_enable_cap(kvm.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
    request.args[0] = on
    return _with_argument(stopped, vcpu, kvm.KVM_ENABLE_CAP, request)


def _with_argument(stopped: Stopped, fd: int, command: int, argument: ctypes.Structure) -> int:
    """Have the VMM's thread call ioctl(2) with a structure below its stack; returns the result."""
    size = ctypes.sizeof(argument)
    at = stopped.room(size)
    kept = ctypes.create_string_buffer(size)
    address_space.read_into(stopped.pid, at, ctypes.addressof(kept), size)
    address_space.write_from(stopped.pid, at, ctypes.addressof(argument), size)
    result = stopped.inject(tracing.SYS_ioctl, fd, command, at)
    address_space.write_from(stopped.pid, at, ctypes.addressof(kept), size)
    return result
