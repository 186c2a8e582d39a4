"""KVM's paravirtual features: whether the guest is offered them and uses them, and what the host does then.

Sources: Documentation/virt/kvm/x86/cpuid.rst and msr.rst.
"""

import os
import signal
from dataclasses import dataclass

from offmap.compare.guest import KVM_CLOCK
from offmap.compare.probes.guest_program import ProbeError
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import no, undetermined, yes
from offmap.compare.questions import Answer
from offmap.kvm import Kvm
from offmap.memory.backend import Backend
from offmap.uapi import kvm as uapi
from offmap.uapi.kvm import MSR_KVM_SYSTEM_TIME_NEW

KVM_CPUID_FEATURES = uapi.KVM_CPUID_FEATURES
MSR_KVM_ASYNC_PF_EN = 0x4B564D02  # arch/x86/include/uapi/asm/kvm_para.h, as the two below
MSR_KVM_STEAL_TIME = 0x4B564D03
MSR_KVM_PV_EOI_EN = 0x4B564D04
_ENABLED = 1  # bit 0 of each of them
_BURN_MS = 400


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature: its bit in the guest's CPUID, and the MSR by which the guest's kernel enables it."""

    bit: int
    msr: int
    name: str


FEATURES = {
    "works.steal_time": Feature(uapi.KVM_FEATURE_STEAL_TIME, MSR_KVM_STEAL_TIME, "KVM_FEATURE_STEAL_TIME"),
    # Since 5.10, Linux uses async page faults by interrupt only.
    "works.async_pf": Feature(uapi.KVM_FEATURE_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_EN, "KVM_FEATURE_ASYNC_PF_INT"),
    "works.pv_eoi": Feature(uapi.KVM_FEATURE_PV_EOI, MSR_KVM_PV_EOI_EN, "KVM_FEATURE_PV_EOI"),
}


def feature(guest: LiveGuest, id: str) -> Answer:
    """Whether the guest's kernel has enabled this feature: it gave KVM a page to write to."""
    wanted = FEATURES[id]
    offered = int(guest.command(f"cpuid {KVM_CPUID_FEATURES:#x}")[0][0])
    if not offered >> wanted.bit & 1:
        return no(id, f"not offered: the guest's CPUID 0x40000001 has no {wanted.name}")
    value = int(guest.value(f"rdmsr {wanted.msr:#x}"))
    detail = f"CPUID 0x40000001 eax {offered:#x}, MSR {wanted.msr:#x} reads {value:#x} in the guest"
    if not value & _ENABLED:
        return no(id, "offered, and the guest's kernel has not enabled it", detail)
    return yes(id, detail)


def steal_time(guest: LiveGuest) -> Answer:
    """Whether the guest has enabled steal time, and it counts while busy processes of the host share the CPU."""
    answer = feature(guest, "works.steal_time")
    if answer.value is not True:
        return answer
    cpus = len(os.sched_getaffinity(0))
    rivals = [_burner() for _ in range(cpus)]
    try:
        ticks = guest.value(f"burn {_BURN_MS}")
    finally:
        for rival in rivals:
            os.kill(rival, signal.SIGKILL)
            os.waitpid(rival, 0)
    detail = f"{answer.detail}; {ticks:.0f} clock ticks stolen in {_BURN_MS} ms beside {cpus} busy processes"
    if not ticks:
        return no(answer.question, "enabled, but a vCPU that had to share its CPU was not told so", detail)
    return yes(answer.question, detail)


def _burner() -> int:
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                pass
        finally:
            os._exit(0)
    return pid


def kvm_clock(guest: LiveGuest, why_not: str) -> Answer:
    """Whether the guest's clocksource is kvm-clock, and goes on. The guest was told to prefer it.

    Args:
        why_not: why it is not offered; empty if it is.
    """
    id = "works.kvm_clock"
    source = guest.facts.clocksource
    if not source:
        return undetermined(id, "the guest did not say what it keeps time by")
    first, second = guest.value("clock"), guest.value("clock")
    detail = f"clocksource {source}; CLOCK_MONOTONIC went on by {second - first:.0f} µs between two readings"
    if source != KVM_CLOCK:
        return no(id, why_not or f"the guest keeps time by {source}", detail)
    return yes(id, detail) if second > first else no(id, "time stands still", detail)


def forbidden_clock(guest: LiveGuest, known: Answer) -> Answer:
    """Let a guest register a page for kvm-clock, though kvm-clock is not offered to it.

    Ask this of a guest last. If KVM accepts a page that the host kernel does not map, the host oopses.

    Args:
        known: the answer so far; this adds to its detail.
    """
    address = 0x1000 | _ENABLED  # a page of low memory, which Linux leaves alone
    try:
        guest.command(f"wrmsr {MSR_KVM_SYSTEM_TIME_NEW:#x} {address:#x}")
        alive = guest.is_alive()
        seen = "KVM took it" + (", and guest and host go on" if alive else ", and the guest does not answer any more")
    except ProbeError as error:
        seen = f"KVM refused it ({error}), and the host goes on"
    detail = f"{known.detail}; a guest that writes MSR {MSR_KVM_SYSTEM_TIME_NEW:#x} all the same: {seen}"
    return Answer(known.question, known.value, known.reason, detail=detail)


def register_pvclock(backend: Backend, size: int) -> str:
    """Register a pvclock page on this kind of RAM without offmap's safeguards, and run a vCPU.

    KVM fills the page before it enters the guest. If it does that through a kernel mapping, and there is none, the host
    oopses and this call does not return.

    Returns:
        What KVM did, in words.
    """
    page = 0x2000
    with Kvm() as kvm, kvm.create_vm() as vm, backend.guest_memory(vm, size) as memory:
        memory.write(0x1000, b"\xf4")  # hlt
        vm.reserve_vmx_pages()
        memory.map_into(vm)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base, sregs.cs.selector = 0, 0
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags = 0x1000, 2
            vcpu.set_regs(regs)
            vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: page | _ENABLED})
            vcpu.run()
        written = memory.read(page, 32) != bytes(32)  # struct pvclock_vcpu_time_info
    return "KVM filled it, and the host goes on" if written else "the host goes on, and the page stays empty"
