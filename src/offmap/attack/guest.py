"""The guest's kernel, as the attacker sees it through the host."""

from offmap.attack.knowledge import Kernel
from offmap.attack.linux import IMAGE_ALIGN, Linux, Lost
from offmap.attack.vm import GuestMemory, Hidden, NotThere
from offmap.uapi.page import PAGE_SIZE

_DIRECT_MAP_SPACE = 1 << 46  # at least: 64 TiB (mm.rst)


class Guest(Linux):
    """Reads the guest.

    Args:
        memory: the guest's physical memory.
        kernel: what is known of the guest's kernel.
    """

    def __init__(self, memory: GuestMemory, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._memory = memory
        self._image = 0  # guest-physical address of _text

    def physical(self, pa: int, size: int = 8) -> bytes:
        return self._memory.read(pa, size)

    def read(self, va: int, size: int = 8) -> bytes:
        parts = []
        while size > 0:
            step = min(size, PAGE_SIZE - va % PAGE_SIZE)
            parts.append(self._memory.read(self._place(va), step))
            va, size = va + step, size - step
        return b"".join(parts)

    def _place(self, va: int) -> int:
        """The guest-physical address behind an address of the guest kernel's."""
        if self.in_image(va):
            return va - self.symbol("_text") + self._image
        if self.direct_map and self.direct_map <= va < self.direct_map + _DIRECT_MAP_SPACE:
            return va - self.direct_map
        if not self.direct_map:
            raise Lost(f"{va:#x} is no address of the guest kernel's image")
        leaf = self.leaf(self._root(), va)
        if leaf is None:
            raise Lost(f"the guest kernel has nothing at {va:#x}")
        return leaf.pa + va - leaf.va

    def _root(self) -> int:
        return self._place(self.top_table_symbol())

    def find_image(self) -> int:
        """Find the guest's kernel at all places that KASLR may choose; its guest-physical address.

        Raises:
            Hidden: where it may be, a page is hidden, and where none is hidden it is not.
            Lost: it is nowhere.
        """
        hidden: Hidden | None = None
        for slot in self._memory.slots:
            first = -(-slot.gpa // IMAGE_ALIGN) * IMAGE_ALIGN
            for place in range(first, slot.gpa + slot.bytes, IMAGE_ALIGN):
                self._image = place
                try:
                    if self.is_image(self.physical, place):
                        self._find_slide(place)
                        return place
                except Hidden as error:
                    hidden = hidden or error
                except NotThere:
                    continue
        if hidden is not None:
            raise hidden
        raise Lost("the guest's kernel is not the one that is known, or not where it should be")

    def _find_slide(self, place: int) -> None:
        """How far KASLR moved the image: ``init_task.real_parent`` is its own address."""
        task = self.kernel.symbol("init_task")
        at = place + task - self.kernel.symbol("_text") + self.kernel.offset("task_struct", "real_parent")
        slide = int.from_bytes(self._memory.read(at), "little") - task
        if not 0 <= slide < 1 << 30 or slide % IMAGE_ALIGN:
            raise Lost("the guest's init_task is not where it should be")
        self.slide = slide
