"""Ask the kernel by trying: can KVM run a guest from this memory?"""

import errno

from offmap.errors import KernelError, OffmapError
from offmap.kvm import Kvm, Vm
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.uapi.kvm import KVM_EXIT_HLT
from offmap.uapi.page import PAGE_SIZE

_HLT = b"\xf4"
_GUEST_PHYS_ADDR = 0x1000


def run_one_instruction(page: Backing) -> None:
    """Run ``hlt`` in real mode from the first page of `page`, in a VM of its own.

    Raises:
        KernelError: EFAULT, if KVM cannot get the page.
        OffmapError: the guest did something else than halt.
    """
    with Kvm() as kvm, kvm.create_vm() as vm:
        page.view[:1] = _HLT
        vm.set_user_memory_region(0, _GUEST_PHYS_ADDR, PAGE_SIZE, page.address)
        _halt(vm)


def try_out(vm: Vm, memory: GuestMemory) -> None:
    """Run ``hlt`` in real mode from `memory`, as all the RAM of `vm`, which has had none and no vCPU.

    Raises:
        KernelError: EFAULT, if KVM cannot get the page.
        OffmapError: the guest did something else than halt.
    """
    memory.write(_GUEST_PHYS_ADDR, _HLT)
    memory.map_into(vm)
    _halt(vm)


def _halt(vm: Vm) -> None:
    vm.reserve_vmx_pages()
    with vm.create_vcpu(0) as vcpu:
        sregs = vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = 0, 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = _GUEST_PHYS_ADDR, 2
        vcpu.set_regs(regs)
        while True:
            try:
                reason = vcpu.run()
            except KernelError as error:
                if error.errno == errno.EINTR:
                    continue
                raise
            break
        if reason != KVM_EXIT_HLT:
            raise OffmapError(f"a guest of one hlt instruction ended in KVM exit {reason}")
