"""Guests of a few bytes of 16-bit code."""

from offmap.kvm import Vcpu, Vm
from offmap.memory.anon import Anon
from offmap.memory.guest import GuestMemory

__all__ = ["CODE", "DATA", "END_PORT", "RAM", "TO", "load"]

RAM = 0x10000
CODE = 0x1000
DATA = 0x2000
TO = 0x3000
END_PORT = 0x600


def load(vm: Vm, code: bytes, backend: Anon | None = None, *, ram: int = RAM) -> tuple[Vcpu, GuestMemory]:
    """A vCPU about to run `code` at guest-physical 0x1000; both are the caller's to close."""
    memory = GuestMemory((backend or Anon()).allocate(vm, ram))
    (region,) = memory.regions
    vm.set_user_memory_region(0, 0, region.size, region.userspace_addr)
    memory.write(CODE, code)
    vcpu = vm.create_vcpu(0)
    point_at(vcpu, CODE)
    return vcpu, memory


def point_at(vcpu: Vcpu, address: int) -> None:
    """Real mode, all segments at 0."""
    sregs = vcpu.get_sregs()
    sregs.cs.base, sregs.cs.selector = 0, 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rsp, regs.rflags = address, 0x800, 2
    vcpu.set_regs(regs)
