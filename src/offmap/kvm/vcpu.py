"""A KVM vCPU: its registers, its CPUID, and the area it shares with us (``struct kvm_run``)."""

import mmap
import struct
from collections.abc import Mapping
from ctypes import sizeof

from offmap.errors import KernelError
from offmap.kvm.handle import Handle
from offmap.uapi import kvm as uapi

_MSRS = struct.Struct("<II")  # struct kvm_msrs: nmsrs, pad
_MSR_ENTRY = struct.Struct("<IIQ")  # struct kvm_msr_entry


class Vcpu(Handle):
    """Owns a vCPU fd and the mapping of its ``struct kvm_run`` (`area`, bytes as the kernel lays them out)."""

    def __init__(self, fd: int, number: int, mmap_size: int) -> None:
        super().__init__(fd)
        self.number = number
        try:
            self.area = mmap.mmap(fd, mmap_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            self.close()
            raise KernelError("mmap of a vCPU fd", error) from None

    def close(self) -> None:
        super().close()
        if hasattr(self, "area"):
            self.area.close()

    def run(self) -> int:
        """Enter the guest until it exits; returns the exit reason (``KVM_EXIT_*``).

        For probes and tests; the VMM's own loop is in offmap.vmm.

        Raises:
            KernelError: EFAULT where KVM could not get a page of guest memory, EINTR on a signal.
        """
        self.call("KVM_RUN", uapi.KVM_RUN)
        return uapi.kvm_run.from_buffer_copy(self.area).exit_reason  # type: ignore[no-any-return]

    def exit_state(self) -> uapi.kvm_run:
        """A copy of ``struct kvm_run`` as the last exit left it."""
        return uapi.kvm_run.from_buffer_copy(self.area)

    def get_regs(self) -> uapi.kvm_regs:
        regs = uapi.kvm_regs()
        self.call("KVM_GET_REGS", uapi.KVM_GET_REGS, regs)
        return regs

    def set_regs(self, regs: uapi.kvm_regs) -> None:
        self.call("KVM_SET_REGS", uapi.KVM_SET_REGS, regs)

    def get_sregs(self) -> uapi.kvm_sregs:
        sregs = uapi.kvm_sregs()
        self.call("KVM_GET_SREGS", uapi.KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: uapi.kvm_sregs) -> None:
        self.call("KVM_SET_SREGS", uapi.KVM_SET_SREGS, sregs)

    def set_cpuid(self, entries: list[uapi.kvm_cpuid_entry2]) -> None:
        self.call("KVM_SET_CPUID2", uapi.KVM_SET_CPUID2, pack_cpuid(entries))

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write model-specific registers as the host may.

        Raises:
            KernelError: EINVAL, if KVM did not take all of them.
        """
        buffer = bytearray(_MSRS.pack(len(values), 0))
        for index, data in values.items():
            buffer += _MSR_ENTRY.pack(index, 0, data)
        done = self.call("KVM_SET_MSRS", uapi.KVM_SET_MSRS, buffer)
        if done != len(values):
            index = list(values)[done]
            raise KernelError(f"KVM_SET_MSRS of MSR {index:#x}", 22)

    def set_xcr0(self, value: int) -> None:
        """Set which of its state components (Intel SDM volume 1, chapter 13) the vCPU has enabled.

        Raises:
            KernelError: EINVAL, for a component that its CPUID does not have.
        """
        xcrs = uapi.kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = value
        self.call("KVM_SET_XCRS", uapi.KVM_SET_XCRS, xcrs)

    def get_lapic(self) -> bytearray:
        """The local APIC's registers, 0x400 bytes."""
        state = uapi.kvm_lapic_state()
        self.call("KVM_GET_LAPIC", uapi.KVM_GET_LAPIC, state)
        return bytearray(state)

    def set_lapic(self, registers: bytes | bytearray) -> None:
        self.call("KVM_SET_LAPIC", uapi.KVM_SET_LAPIC, uapi.kvm_lapic_state.from_buffer_copy(registers))

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP on this vCPU."""
        argument = uapi.kvm_enable_cap(cap=capability)
        for number, value in enumerate(args):
            argument.args[number] = value
        self.call("KVM_ENABLE_CAP", uapi.KVM_ENABLE_CAP, argument)

    def tsc_khz(self) -> int:
        """The frequency of the guest's TSC in kHz."""
        return self.call("KVM_GET_TSC_KHZ", uapi.KVM_GET_TSC_KHZ)


def pack_cpuid(entries: list[uapi.kvm_cpuid_entry2], room: int = 0) -> bytearray:
    """A ``struct uapi.kvm_cpuid2`` of `entries`, followed by room for more, up to `room` entries together."""
    empty = max(room - len(entries), 0)
    packed = b"".join(map(bytes, [uapi.kvm_cpuid2(len(entries) + empty), *entries]))
    return bytearray(packed + bytes(empty * sizeof(uapi.kvm_cpuid_entry2)))


def unpack_cpuid(buffer: bytes | bytearray) -> list[uapi.kvm_cpuid_entry2]:
    """The entries of a ``struct uapi.kvm_cpuid2`` that the kernel filled in."""
    count = uapi.kvm_cpuid2.from_buffer_copy(buffer).nent
    start, size = sizeof(uapi.kvm_cpuid2), sizeof(uapi.kvm_cpuid_entry2)
    return [uapi.kvm_cpuid_entry2.from_buffer_copy(buffer, start + number * size) for number in range(count)]
