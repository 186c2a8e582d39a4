"""/dev/kvm: what the host's KVM can do, and new virtual machines."""

import errno

from offmap.errors import KernelError, OffmapError
from offmap.kvm.handle import Handle, open_device
from offmap.kvm.vcpu import pack_cpuid, unpack_cpuid
from offmap.kvm.vm import Vm
from offmap.uapi import kvm as uapi

_DEV_KVM = "/dev/kvm"
_NO_MODULE = "load kvm_intel or kvm_amd, and check that virtualisation is enabled in the firmware"
_REMEDY = {
    **dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ENXIO), _NO_MODULE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "run as root, or join the group that owns /dev/kvm"),
}


class Kvm(Handle):
    """The KVM subsystem of this host.

    Raises:
        KernelError: /dev/kvm is missing or may not be opened.
        OffmapError: it speaks another API version than 12.
    """

    def __init__(self) -> None:
        super().__init__(open_device(_DEV_KVM, _REMEDY))
        try:
            version = self.call("KVM_GET_API_VERSION", uapi.KVM_GET_API_VERSION)
            if version != uapi.KVM_API_VERSION:
                why = f"it speaks API version {version}, not {uapi.KVM_API_VERSION}"
                raise OffmapError(f"{_DEV_KVM} cannot be used", "use Linux 2.6.22 or later", why=why)
        except OffmapError:
            self.close()
            raise

    def check_extension(self, capability: int) -> int:
        """The value of `capability` (``KVM_CAP_*``): 0 where this kernel does not have it."""
        return self.call("KVM_CHECK_EXTENSION", uapi.KVM_CHECK_EXTENSION, capability)

    def vcpu_mmap_size(self) -> int:
        """Bytes of the area shared with each vCPU."""
        return self.call("KVM_GET_VCPU_MMAP_SIZE", uapi.KVM_GET_VCPU_MMAP_SIZE)

    def supported_cpuid(self) -> list[uapi.kvm_cpuid_entry2]:
        """The CPUID leaves that KVM can give a guest on this host."""
        count = 128
        while True:
            buffer = pack_cpuid([], room=count)
            try:
                self.call("KVM_GET_SUPPORTED_CPUID", uapi.KVM_GET_SUPPORTED_CPUID, buffer)
            except KernelError as error:
                if error.errno != errno.E2BIG or count >= 4096:
                    raise
                count *= 2
                continue
            return unpack_cpuid(buffer)

    def create_vm(self) -> Vm:
        """A new VM of the default type (``KVM_X86_DEFAULT_VM``)."""
        while True:
            try:
                fd = self.call("KVM_CREATE_VM", uapi.KVM_CREATE_VM, 0)
            except KernelError as error:
                if error.errno == errno.EINTR:  # a signal during the long allocation; the kernel asks to try again
                    continue
                raise
            return Vm(fd, self.vcpu_mmap_size())
