"""Guest memory: the one, bounds-checked way to the bytes of a guest."""

from collections.abc import Iterable
from contextlib import ExitStack

from offmap.errors import BackendRefused, OffmapError
from offmap.kvm import Vm
from offmap.memory.backing import Backing
from offmap.memory.iomem import PhysicalRange, subtract
from offmap.owned import Owned
from offmap.typed import NamedTuple

MMIO_HOLE_START = 3 << 30
"""RAM stops here and goes on at 4 GiB: the local APICs, the IO-APIC and virtio-mmio live between (as on a PC)."""

MMIO_HOLE_END = 4 << 30

DEVICE_SLOTS = 1 << 14
"""The number of the first memory slot that devices may use. RAM has one for each stretch that the guest gets; KVM has
32,764 (``KVM_USER_MEM_SLOTS``)."""


class GuestAddressError(OffmapError):
    """An access outside the guest's RAM."""


class Region(NamedTuple):
    """A run of guest-physical addresses and the host memory that holds it.

    Attributes:
        guest_phys_addr: where the guest sees it, in bytes.
        size: bytes.
        backing: the host memory.
        offset: where in `backing` it starts, in bytes.
    """

    guest_phys_addr: int
    size: int
    backing: Backing
    offset: int

    @property
    def end(self) -> int:
        return self.guest_phys_addr + self.size

    @property
    def userspace_addr(self) -> int:
        """Where it is mapped in this process."""
        return self.backing.address + self.offset


def layout(backings: Iterable[Backing]) -> list[Region]:
    """Lay `backings` out from guest-physical 0 upwards, around the MMIO hole from 3 to 4 GiB."""
    regions: list[Region] = []
    gpa = 0
    for backing in backings:
        offset = 0
        while offset < backing.size:
            size = backing.size - offset
            if gpa < MMIO_HOLE_START:
                size = min(size, MMIO_HOLE_START - gpa)
            regions.append(Region(gpa, size, backing, offset))
            gpa += size
            offset += size
            if gpa == MMIO_HOLE_START:
                gpa = MMIO_HOLE_END
    return regions


class GuestMemory(Owned):
    """All RAM of one guest; owns the backings.

    Args:
        backings: host memory, in the order of guest-physical addresses.
    """

    def __init__(self, backings: Iterable[Backing]) -> None:
        self._owned = ExitStack()
        self.backings = [self._owned.enter_context(backing) for backing in backings]
        self.regions = layout(self.backings)

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(region.size for region in self.regions)

    def map_into(self, vm: Vm, excluded: Iterable[PhysicalRange] = ()) -> None:
        """Make every region memory slots of `vm`, numbered from 0.

        Args:
            excluded: guest-physical pages that are in no slot. What the guest does there is an exit to its VMM.

        Raises:
            KernelError: KVM refused one.
            BackendRefused: they would be too many.
        """
        excluded, slot = list(excluded), 0
        for region in self.regions:
            for part in subtract([PhysicalRange(region.guest_phys_addr, region.end)], excluded):
                if slot == DEVICE_SLOTS:
                    raise BackendRefused(
                        "the guest cannot have its RAM",
                        f"pages are left out of it at so many places that it needs over {DEVICE_SLOTS} memory slots",
                        "use another backend",
                    )
                offset = part.start - region.guest_phys_addr
                where = (slot, part.start, part.size, region.userspace_addr + offset)
                if region.backing.guest_memfd is None:
                    vm.set_user_memory_region(*where)
                else:
                    vm.set_user_memory_region2(*where, region.backing.guest_memfd, region.offset + offset)
                slot += 1

    def view(self, guest_phys_addr: int, size: int) -> memoryview:
        """A writable view of `size` bytes, for the kernel to read into or write from.

        Raises:
            GuestAddressError: not all of it is RAM, or it crosses from one region into another.
        """
        for region in self.regions:
            offset = guest_phys_addr - region.guest_phys_addr
            if offset >= 0 and size >= 0 and offset + size <= region.size:
                start = region.offset + offset
                return region.backing.view[start : start + size]
        raise GuestAddressError(f"guest-physical {guest_phys_addr:#x}, {size} bytes, is not in the guest's RAM")

    def read(self, guest_phys_addr: int, size: int) -> bytes:
        """A copy of `size` bytes. Raises GuestAddressError: as `view`."""
        return bytes(self.view(guest_phys_addr, size))

    def write(self, guest_phys_addr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into the guest. Raises GuestAddressError: as `view`."""
        self.view(guest_phys_addr, len(data))[:] = data

    def discard(self, userspace_addr: int, size: int) -> int:
        """Give the whole pages among `size` bytes at `userspace_addr` of this process back to the host.

        Returns:
            Bytes given back.

        Raises:
            KernelError: the kernel would not.
        """
        given = 0
        for backing in self.backings:
            page = backing.page_size
            start = max(userspace_addr - backing.address, 0)
            end = min(userspace_addr + size - backing.address, backing.size)
            start, end = -(-start // page) * page, end // page * page
            if start < end:
                backing.discard(start, end - start)
                given += end - start
        return given

    def close(self) -> None:
        """Give the memory back, in the way of its backend."""
        self._owned.close()
