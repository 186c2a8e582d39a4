"""Ask the kernel by trying: can KVM run a guest from this memory?"""

import errno
from collections.abc import Callable

from offmap.errors import KernelError, OffmapError
from offmap.kvm import Kvm, Vm
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.uapi.kvm import KVM_EXIT_HLT

_HLT = b"\xf4"


def try_page(page: Callable[[Vm], Backing]) -> None:
    """Run ``hlt`` from what `page` gives for a VM, which is one of its own, and give it back. Raises as `try_out`."""
    with Kvm() as kvm, kvm.create_vm() as vm, GuestMemory([page(vm)]) as memory:
        try_out(vm, memory)


def try_out(vm: Vm, memory: GuestMemory) -> None:
    """Run ``hlt`` in real mode from the first page of `memory`, as all the RAM of `vm`, which has had none and no vCPU.

    Raises:
        KernelError: EFAULT, if KVM cannot get the page.
        OffmapError: the guest did something else than halt.
    """
    memory.write(0, _HLT)
    memory.map_into(vm)
    vm.reserve_vmx_pages()
    with vm.create_vcpu(0) as vcpu:
        sregs = vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = 0, 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = 0, 2
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
