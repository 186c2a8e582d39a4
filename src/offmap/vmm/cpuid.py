"""The CPUID that a guest sees: KVM's, with the guest's own topology, without what hidden RAM rules out.

Sources: Documentation/virt/kvm/x86/cpuid.rst; Intel SDM volume 2 and AMD APM volume 3, "CPUID".
"""

from offmap.uapi import kvm as uapi

PVCLOCK_FEATURES = (
    1 << uapi.KVM_FEATURE_CLOCKSOURCE
    | 1 << uapi.KVM_FEATURE_CLOCKSOURCE2
    | 1 << uapi.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
)
"""KVM writes the guest's pvclock page through the host kernel's own mapping of it (kvm_setup_guest_pvclock), which
oopses the host where there is none."""

_LEAF1_ECX_VMX = 1 << 5
_LEAF1_ECX_TSC_DEADLINE = 1 << 24
_LEAF1_ECX_XSAVE = 1 << 26
_LEAF1_ECX_HYPERVISOR = 1 << 31
_LEAF80000001_ECX_SVM = 1 << 2


def guest_cpuid(
    supported: list[uapi.kvm_cpuid_entry2], *, vcpu: int, vcpus: int, kvm_clock: bool, nested: bool, tsc_deadline: bool
) -> list[uapi.kvm_cpuid_entry2]:
    """The CPUID of vCPU number `vcpu` of `vcpus`: one socket, one thread a core, APIC ids from 0.

    Args:
        supported: what KVM_GET_SUPPORTED_CPUID says.
        kvm_clock: leave the pvclock features in.
        nested: leave VMX and SVM in (KVM maps the pages of a nested guest's control blocks into the host kernel).
        tsc_deadline: KVM's local APIC has the TSC deadline timer (it is not among `supported` before Linux 6.13).
    """
    guest: list[uapi.kvm_cpuid_entry2] = []
    for entry in supported:
        e = uapi.kvm_cpuid_entry2.from_buffer_copy(entry)
        match e.function:
            case 0x1:
                e.ebx = e.ebx & 0x0000FFFF | vcpus << 16 | vcpu << 24
                e.ecx |= _LEAF1_ECX_HYPERVISOR
                if tsc_deadline:
                    e.ecx |= _LEAF1_ECX_TSC_DEADLINE
                if not nested:
                    e.ecx &= ~_LEAF1_ECX_VMX
            case 0x4:
                if e.eax & 0x1F:  # a cache: shared by one thread, in a package of so many cores
                    e.eax = (
                        e.eax & 0x3FFF | ((1 << (vcpus - 1).bit_length()) - 1) << 26
                    )  # core ids, less one: all bits set
            case 0xB | 0x1F:
                continue  # the host's topology; ours is added below
            case uapi.KVM_CPUID_FEATURES if not kvm_clock:
                e.eax &= ~PVCLOCK_FEATURES
            case 0x80000001 if not nested:
                e.ecx &= ~_LEAF80000001_ECX_SVM
            case 0x80000008:
                e.ecx = vcpus - 1 | (vcpus - 1).bit_length() << 12
            case 0x8000000A if not nested:
                continue
            case 0x8000001E:
                e.eax, e.ebx, e.ecx = vcpu, vcpu, 0
            case _:
                pass
        guest.append(e)
    return guest + _extended_topology(vcpu, vcpus)


def enabled_xstate(guest: list[uapi.kvm_cpuid_entry2]) -> int | None:
    """XCR0 of a vCPU that starts with every state component of its CPUID enabled, or None if it has no XSAVE.

    Linux enables them all itself (fpu__init_system_xstate in arch/x86/kernel/fpu/xstate.c), so a vCPU may as well have
    them from the start. KVM answers leaf 0xD's sizes by the XCR0 that it knows of, and puts that one back at each
    entry. QEMU's emulation of nested SVM does not intercept XSETBV, so there KVM would go on knowing the reset value:
    Linux 6.12 warns of an "XSAVE consistency problem" and has no AVX, Linux 7.3 panics.
    """
    if not any(e.function == 0x1 and e.ecx & _LEAF1_ECX_XSAVE for e in guest):
        return None
    return next((e.edx << 32 | e.eax for e in guest if e.function == 0xD and e.index == 0), None)


def _extended_topology(vcpu: int, vcpus: int) -> list[uapi.kvm_cpuid_entry2]:
    """Leaf 0xB: a level of one thread a core (SMT, type 1), then one of `vcpus` cores a package (core, type 2)."""
    flags = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    return [
        uapi.kvm_cpuid_entry2(0xB, 0, flags, eax=0, ebx=1, ecx=1 << 8, edx=vcpu),
        uapi.kvm_cpuid_entry2(0xB, 1, flags, eax=(vcpus - 1).bit_length(), ebx=vcpus, ecx=2 << 8 | 1, edx=vcpu),
        uapi.kvm_cpuid_entry2(0xB, 2, flags, ecx=2, edx=vcpu),
    ]
