"""Run in a disposable host: a guest that executes VMRUN, so that KVM maps a page of its RAM to read the VMCB there.

``nested_target.py COUNT`` runs a guest of a few bytes on ordinary memory, and prints the page frame number of its VMCB.
The VMCB is empty: each VMRUN fails, once KVM has read it.
"""

import os
import struct
import sys

from offmap.audit.pagemap import pfn, read_pagemap
from offmap.audit.process import Process
from offmap.kvm import Kvm, Vcpu
from offmap.memory.anon import Anon
from offmap.memory.guest import GuestMemory
from offmap.uapi import kvm as uapi

RAM = 0x10000
CODE = 0x1000
VMCB = 0x2000
PAGE_DIRECTORY = 0x3000
HOST_SAVE_AREA = 0x4000
MSR_VM_HSAVE_PA = 0xC0010117
EFER_SVME = 1 << 12
CR0_PE, CR0_PG = 1, 1 << 31
CR4_PSE = 1 << 4
IDENTITY_4M = 0x83  # of the first 4 MiB: present, writable, PS
FLAT_CODE, FLAT_DATA = 0xB, 0x3  # segment types: accessed, and readable or writable

MOV_VMCB_EAX = b"\xb8" + struct.pack("<I", VMCB)
# 32-bit code: touch the VMCB, then execute VMRUN %ecx times.
PROGRAM = b"".join(
    (
        MOV_VMCB_EAX,
        b"\xc7\x00" + bytes(4),  # movl $0, (%eax)
        b"\x0f\x01\xd8",  # 1: vmrun
        MOV_VMCB_EAX,
        b"\x49",  # dec %ecx
        b"\x75\xf5",  # jnz 1b
        b"\xe6\x80",  # out %al, $0x80
    )
)


def main() -> None:
    count = int(sys.argv[1])
    with Kvm() as kvm, kvm.create_vm() as vm, GuestMemory(Anon().allocate(vm, RAM)) as memory:
        (region,) = memory.regions
        vm.set_user_memory_region(0, 0, region.size, region.userspace_addr)
        memory.write(CODE, PROGRAM)
        memory.write(PAGE_DIRECTORY, struct.pack("<I", IDENTITY_4M))
        with vm.create_vcpu(0) as vcpu:
            set_up(kvm, vcpu)
            start(vcpu, count)
            reason = vcpu.run()
            if reason != uapi.KVM_EXIT_IO:
                sys.exit(f"the guest ended with exit reason {reason} at {vcpu.get_regs().rip:#x}")
        print(frame_of(region.userspace_addr + VMCB))


def set_up(kvm: Kvm, vcpu: Vcpu) -> None:
    """Let it run 32-bit code, and guests of its own."""
    vcpu.set_cpuid(kvm.supported_cpuid())
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, 8
        segment.type = FLAT_CODE if name == "cs" else FLAT_DATA
        segment.s = segment.present = segment.db = segment.g = 1
    # KVM has no VMRUN without paging and a host save area (nested_svm_check_permissions, nested_svm_vmrun).
    sregs.cr0 |= CR0_PE | CR0_PG
    sregs.cr3, sregs.cr4 = PAGE_DIRECTORY, CR4_PSE
    sregs.efer |= EFER_SVME
    vcpu.set_sregs(sregs)
    vcpu.set_msrs({MSR_VM_HSAVE_PA: HOST_SAVE_AREA})


def start(vcpu: Vcpu, count: int) -> None:
    """Let it begin with its program, which executes VMRUN so often."""
    regs = vcpu.get_regs()
    regs.rip, regs.rcx, regs.rflags = CODE, count, 2
    vcpu.set_regs(regs)


def frame_of(address: int) -> int:
    """Return the page frame number behind an address of this process."""
    with Process(os.getpid()) as process:
        return int(pfn(read_pagemap(process.pagemap, address, 1))[0])


if __name__ == "__main__":
    main()
