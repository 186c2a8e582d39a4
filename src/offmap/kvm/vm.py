"""A KVM virtual machine: memory slots, interrupt controllers, vCPUs."""

import os
from ctypes import c_uint64

from offmap.errors import KernelError
from offmap.kvm.handle import Handle
from offmap.kvm.vcpu import Vcpu
from offmap.typed import TYPE_CHECKING
from offmap.uapi import kvm as uapi

if TYPE_CHECKING:
    from offmap.kvm.stats import MappedPages


class Vm(Handle):
    """Owns a VM fd; KVM frees the VM when this and every vCPU fd are closed."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: int) -> int:
        """The value of `capability` for this VM: 0 where it does not have it."""
        return self.call("KVM_CHECK_EXTENSION", uapi.KVM_CHECK_EXTENSION, capability)

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, size: int, userspace_addr: int, *, readonly: bool = False
    ) -> None:
        """Map `size` bytes of our memory at `userspace_addr` into the guest; a size of 0 removes the slot.

        A write of the guest to a `readonly` slot does not change the memory. It is an MMIO exit.
        """
        flags = uapi.KVM_MEM_READONLY if readonly else 0
        region = uapi.kvm_userspace_memory_region(slot, flags, guest_phys_addr, size, userspace_addr)
        self.call("KVM_SET_USER_MEMORY_REGION", uapi.KVM_SET_USER_MEMORY_REGION, region)

    def set_user_memory_region2(
        self, slot: int, guest_phys_addr: int, size: int, userspace_addr: int, guest_memfd: int, guest_memfd_offset: int
    ) -> None:
        """Map pages of a guest_memfd into the guest (``KVM_MEM_GUEST_MEMFD``; KVM_CAP_USER_MEMORY2)."""
        region = uapi.kvm_userspace_memory_region2(
            slot, uapi.KVM_MEM_GUEST_MEMFD, guest_phys_addr, size, userspace_addr, guest_memfd_offset, guest_memfd
        )
        self.call("KVM_SET_USER_MEMORY_REGION2", uapi.KVM_SET_USER_MEMORY_REGION2, region)

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """A new guest_memfd of `size` bytes; returns its fd, which the caller owns."""
        return self.call(
            "KVM_CREATE_GUEST_MEMFD", uapi.KVM_CREATE_GUEST_MEMFD, uapi.kvm_create_guest_memfd(size, flags)
        )

    def reserve_vmx_pages(self) -> None:
        """Give VMX pages below a PC's BIOS at 4 GiB, where no RAM is: one for an identity map, three for a TSS.

        Intel processors without unrestricted guest need them.
        """
        self.call("KVM_SET_IDENTITY_MAP_ADDR", uapi.KVM_SET_IDENTITY_MAP_ADDR, c_uint64(0xFFFBC000))
        self.call("KVM_SET_TSS_ADDR", uapi.KVM_SET_TSS_ADDR, 0xFFFBD000)

    def create_irqchip(self) -> None:
        """In-kernel PIC, IO-APIC and, per vCPU, local APIC."""
        self.call("KVM_CREATE_IRQCHIP", uapi.KVM_CREATE_IRQCHIP)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive an interrupt line of the in-kernel irqchip."""
        self.call("KVM_IRQ_LINE", uapi.KVM_IRQ_LINE, uapi.kvm_irq_level(gsi, level))

    def irqfd(self, eventfd: int, gsi: int) -> None:
        """Pulse `gsi` whenever `eventfd` is signalled."""
        self.call("KVM_IRQFD", uapi.KVM_IRQFD, uapi.kvm_irqfd(eventfd, gsi))

    def ioeventfd(
        self, eventfd: int, address: int, length: int, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """Signal `eventfd` when the guest writes `length` bytes (only `datamatch`, where given) to `address`."""
        flags = uapi.KVM_IOEVENTFD_FLAG_PIO if pio else 0
        if datamatch is not None:
            flags |= uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
        argument = uapi.kvm_ioeventfd(datamatch or 0, address, length, eventfd, flags)
        self.call("KVM_IOEVENTFD", uapi.KVM_IOEVENTFD, argument)

    def stats(self) -> dict[str, tuple[int, ...]]:
        """KVM's statistics of this VM by name, as they are now (``KVM_CAP_BINARY_STATS_FD``, Linux 5.14).

        Raises:
            KernelError: this KVM has none.
        """
        from offmap.kvm.stats import read_stats

        fd = self.call("KVM_GET_STATS_FD", uapi.KVM_GET_STATS_FD)
        try:
            return read_stats(lambda size, offset: os.pread(fd, size, offset))
        except OSError as error:
            raise KernelError("read of KVM's statistics", error) from None
        finally:
            os.close(fd)

    def mapped_pages(self) -> "MappedPages | None":
        """How the page tables that translate guest-physical addresses (EPT, NPT, or shadow ones) map the guest now.

        Returns:
            None where this KVM does not tell.
        """
        from offmap.kvm.stats import MappedPages

        try:
            return MappedPages.of(self.stats())
        except KernelError:
            return None

    def coalesced_mmio(self, address: int, length: int) -> None:
        """Have KVM note the guest's writes to `address` in a ring (kvm.coalesced). Only a full ring makes an exit."""
        zone = uapi.kvm_coalesced_mmio_zone(address, length, 0)
        self.call("KVM_REGISTER_COALESCED_MMIO", uapi.KVM_REGISTER_COALESCED_MMIO, zone)

    def create_vcpu(self, number: int) -> Vcpu:
        """vCPU `number`, which is also its APIC id."""
        return Vcpu(self.call("KVM_CREATE_VCPU", uapi.KVM_CREATE_VCPU, number), number, self._vcpu_mmap_size)
