"""guest_memfd: memory of one VM, in its mappable form (Linux 6.18). A baseline: the kernel maps every page of it."""

import os

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Vm
from offmap.memory.backend import Backend, check_host_has
from offmap.memory.backing import Backing, map_backing
from offmap.uapi import kvm as uapi

__all__ = ["GuestMemfd"]

_FLAGS = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED


class GuestMemfd(Backend):
    name = "guest_memfd"

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        if not vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD) or not vm.check_extension(uapi.KVM_CAP_USER_MEMORY2):
            raise BackendRefused(
                "this kernel's KVM has no guest_memfd", "use Linux 6.18 or later, built with CONFIG_KVM_GUEST_MEMFD"
            )
        if vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS) & _FLAGS != _FLAGS:
            raise BackendRefused(
                "this kernel's guest_memfd cannot be mapped by a VMM (no GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED)",
                "use Linux 6.18 or later",
            )
        try:
            fd = vm.create_guest_memfd(size, _FLAGS)
        except KernelError as error:
            raise BackendRefused(error.what) from None
        try:
            return [map_backing("guest_memfd memory", fd, size, guest_memfd=fd)]
        except KernelError:
            os.close(fd)
            raise
