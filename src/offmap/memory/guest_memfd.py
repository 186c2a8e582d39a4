"""guest_memfd: memory of one VM, in its mappable form (Linux 6.18). A baseline: the kernel maps every page of it."""

import os

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Vm
from offmap.memory.backend import ASK_FOR_LESS, Backend, check_host_has, refused
from offmap.memory.backing import Backing
from offmap.uapi import kvm as uapi

MAPPABLE = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED
"""What makes it memory that a VMM can map, from the first moment on."""


class GuestMemfd(Backend):
    name = "guest_memfd"
    discards = True
    since = (6, 18)

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        guest_memfd_flags(vm)
        with refused(ASK_FOR_LESS):
            return [map_guest_memfd(vm, size, MAPPABLE)]


def guest_memfd_flags(vm: Vm) -> int:
    """The flags that `vm` takes for its guest_memfd, among them those of MAPPABLE.

    Raises:
        BackendRefused: this kernel has no guest_memfd that a VMM can map.
    """
    if not vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD) or not vm.check_extension(uapi.KVM_CAP_USER_MEMORY2):
        raise BackendRefused(
            "this host has no guest_memfd",
            "its kernel's KVM has none",
            "use Linux 6.18 or later, built with CONFIG_KVM_GUEST_MEMFD",
        )
    flags = vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS)
    if flags & MAPPABLE != MAPPABLE:
        raise BackendRefused(
            "this kernel's guest_memfd cannot be mapped by a VMM",
            "it has no GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED",
            "use Linux 6.18 or later",
        )
    return flags


def map_guest_memfd(vm: Vm, size: int, flags: int) -> Backing:
    """A new guest_memfd of `vm`, mapped; nothing of it has a frame yet.

    Raises:
        KernelError: this kernel does not give it.
    """
    fd = vm.create_guest_memfd(size, flags)
    try:
        return Backing("guest_memfd memory", fd, size, guest_memfd=fd)
    except KernelError:
        os.close(fd)
        raise
