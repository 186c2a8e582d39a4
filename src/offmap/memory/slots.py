"""Give guest memory to a VM: one KVM memory slot a region."""

from offmap.kvm import Vm
from offmap.memory.guest import GuestMemory

DEVICE_SLOTS = 256
"""The number of the first memory slot that devices may use. RAM has one a region, KVM 509 in all or more."""


def map_into(vm: Vm, memory: GuestMemory) -> None:
    """Make every region of `memory` a slot of `vm`. Raises KernelError: KVM refused one."""
    for slot, region in enumerate(memory.regions):
        where = (slot, region.guest_phys_addr, region.size, region.userspace_addr)
        if region.backing.guest_memfd is None:
            vm.set_user_memory_region(*where)
        else:
            vm.set_user_memory_region2(*where, region.backing.guest_memfd, region.offset)
