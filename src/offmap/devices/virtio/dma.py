"""The guest memory that a device may reach: RAM, without the pages that are kept from the guest.

The host kernel maps pages that are kept from the guest (hide.py), so nothing of the guest may get into them. An honest
driver never names one.
"""

from bisect import bisect_right
from collections.abc import Iterable

from offmap.memory.guest import Region
from offmap.memory.iomem import PhysicalRange, merged, subtract

Piece = tuple[int, int, memoryview]
"""A run of the guest's RAM: guest-physical start and end, and its bytes."""


class DriverError(Exception):
    """The guest's driver did what the specification forbids. The device then needs a reset; the VMM goes on."""


class Dma:
    """Bounds-checked views of the memory that a guest may name to its devices.

    Args:
        regions: the guest's RAM.
        excluded: guest-physical ranges that are kept from the guest.

    All devices share it, each on its own thread. So nothing in it changes until `release`.
    """

    def __init__(self, regions: Iterable[Region], excluded: Iterable[PhysicalRange] = ()) -> None:
        self._starts: list[int] = []
        self._pieces: list[Piece] = []
        excluded = merged(excluded)
        for region in sorted(regions, key=lambda r: r.guest_phys_addr):
            whole = PhysicalRange(region.guest_phys_addr, region.end)
            for piece in subtract([whole], excluded):
                start = region.offset + piece.start - region.guest_phys_addr
                self._starts.append(piece.start)
                self._pieces.append((piece.start, piece.end, region.backing.view[start : start + piece.size]))

    def view(self, address: int, size: int) -> memoryview:
        """A writable view of `size` bytes at guest-physical `address`, for the kernel to read into or write from.

        Raises:
            DriverError: not all of it is RAM of the guest, in one region.
        """
        start, _, view = self.piece(address, size)
        return view[address - start : address - start + size]

    def piece(self, address: int, size: int) -> Piece:
        """The piece of RAM that contains `size` bytes at guest-physical `address`.

        Raises:
            DriverError: not all of it is RAM of the guest, in one region.
        """
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address + size > self._pieces[at][1]:
            raise DriverError(f"names {size} bytes at {address:#x}, which are not all in the guest's RAM")
        return self._pieces[at]

    def pieces(self) -> list[Piece]:
        """Return every piece."""
        return list(self._pieces)

    def release(self) -> None:
        """Let go of the memory, so that it can be unmapped."""
        for _, _, view in self._pieces:
            view.release()
        self._pieces.clear()
        self._starts.clear()
