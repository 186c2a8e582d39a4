"""The boot CPU's state at a kernel's 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

Long mode with paging on, memory below 4 GiB mapped to itself, flat segments from a GDT in guest memory, interrupts off,
%rsi pointing at boot_params.
"""

import struct

from offmap.boot.linux import BOOT_PARAMS
from offmap.kvm import Vcpu
from offmap.memory.guest import GuestMemory
from offmap.uapi.kvm import kvm_regs, kvm_segment
from offmap.uapi.page import PAGE_SIZE

_GDT = 0x1000
_STACK = 0x6FF0
_PML4 = 0x9000
_PDPT = 0xA000
_PD = 0xB000  # four of them, one for each GiB

_PRESENT_WRITABLE = 0x3
_PAGE_SIZE_2M = 1 << 7

_CS, _DS, _TSS = 0x10, 0x18, 0x20  # __BOOT_CS, __BOOT_DS

_X86_CR0_PE, _X86_CR0_MP, _X86_CR0_ET = 1 << 0, 1 << 1, 1 << 4
_X86_CR0_NE, _X86_CR0_WP, _X86_CR0_PG = 1 << 5, 1 << 16, 1 << 31
_X86_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10

_MSR_IA32_MISC_ENABLE = 0x1A0
_MISC_ENABLE_FAST_STRING = 1 << 0
_MSR_MTRRdefType = 0x2FF
_MTRR_ENABLE, _MTRR_TYPE_WRBACK = 1 << 11, 6

# What a BIOS leaves in the local vector table (Intel SDM volume 3): the 8259 on LINT0, NMI on LINT1.
_APIC_LVT0, _APIC_LVT1 = 0x350, 0x360
_APIC_MODE_EXTINT, _APIC_MODE_NMI = 0x700, 0x400


def _descriptor(segment: kvm_segment) -> bytes:
    """The GDT entry (Intel SDM volume 3, "Segment Descriptors") of a segment whose base is 0."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return struct.pack("<HHBBBB", limit & 0xFFFF, 0, 0, access, limit >> 16 | flags << 4, 0)


def _page_tables() -> bytes:
    """4 GiB mapped to itself by 2 MiB pages: PML4, PDPT and four PDs, to stand at `_PML4`."""
    pml4 = struct.pack("<Q4088x", _PDPT | _PRESENT_WRITABLE)
    pdpt = struct.pack("<4Q4064x", *(_PD + PAGE_SIZE * n | _PRESENT_WRITABLE for n in range(4)))
    pds = struct.pack("<2048Q", *range(_PAGE_SIZE_2M | _PRESENT_WRITABLE, 1 << 32, 1 << 21))
    return pml4 + pdpt + pds


def enter_64bit(vcpu: Vcpu, memory: GuestMemory, entry: int) -> None:
    """Set `vcpu` up to start at guest-physical `entry`. Writes its GDT and page tables into `memory`."""
    code = kvm_segment(limit=0xFFFFFFFF, selector=_CS, type=0xB, present=1, s=1, l=1, g=1)
    data = kvm_segment(limit=0xFFFFFFFF, selector=_DS, type=0x3, present=1, db=1, s=1, g=1)
    tss = kvm_segment(limit=0x67, selector=_TSS, type=0xB, present=1)
    memory.write(_GDT, bytes(_CS) + _descriptor(code) + _descriptor(data) + _descriptor(tss) + bytes(8))
    memory.write(_PML4, _page_tables())

    sregs = vcpu.get_sregs()
    sregs.cs = code
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = tss
    sregs.gdt.base, sregs.gdt.limit = _GDT, _TSS + 16 - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = _X86_CR0_PE | _X86_CR0_MP | _X86_CR0_ET | _X86_CR0_NE | _X86_CR0_WP | _X86_CR0_PG
    sregs.cr3 = _PML4
    sregs.cr4 = _X86_CR4_PAE
    sregs.efer = _EFER_LME | _EFER_LMA
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=entry, rsi=BOOT_PARAMS, rsp=_STACK, rflags=2))
    vcpu.set_msrs({_MSR_IA32_MISC_ENABLE: _MISC_ENABLE_FAST_STRING, _MSR_MTRRdefType: _MTRR_ENABLE | _MTRR_TYPE_WRBACK})
    lapic = vcpu.get_lapic()
    for register, mode in ((_APIC_LVT0, _APIC_MODE_EXTINT), (_APIC_LVT1, _APIC_MODE_NMI)):
        struct.pack_into("<I", lapic, register, mode)
    vcpu.set_lapic(lapic)
