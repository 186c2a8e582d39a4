"""The primitive for hosts that are no labs: /proc/kcore, which only reads.

Kcore reads by the very address, or by the page tables' entry for it (``fs/proc/kcore.c``), and gives zeroes for a page
that it cannot read. So a page that is not all zeroes is mapped. Of one that is, the page tables are asked whether the
address is mapped: for that alone, and uncounted. Zeroes that kcore may have made up are no answer: the address counts
as reached.
"""

from collections.abc import Callable, Sequence

from offmap.attack.linux import walk_tables
from offmap.attack.primitive import NotMapped, Primitive, Unreadable, neighbours
from offmap.audit.kcore import Kcore
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

_PHYSICAL_MASK = (1 << 52) - PAGE_SIZE
_ZEROES = bytes(PAGE_SIZE)


class KcorePrimitive(Primitive):
    """Reads /proc/kcore where the host's page tables (``init_top_pgt``) map the address.

    Raises:
        Undetermined: there is no /proc/kcore, or it may not be read.
    """

    name = "kcore"
    by_kcore = True

    def __init__(self, kcore: Kcore | None = None) -> None:
        super().__init__()
        self._kcore = kcore or Kcore()
        self._facts = self._kcore.vmcoreinfo
        self._mask = _PHYSICAL_MASK & ~self._facts.sme_mask

    def close(self) -> None:
        self._kcore.close()

    def _fetch(self, va: int, size: int) -> bytes:
        start = va % PAGE_SIZE
        page = self._shown(va - start, PAGE_SIZE)
        if page is None or page == _ZEROES:
            pa = self._translate(va)
            if pa is None:
                raise NotMapped(va)
            page = self._shown(va - start, PAGE_SIZE)
            if page is None or (page == _ZEROES and not self._of_image(va) and self._blank(pa)):
                raise Unreadable(va)
        return page[start : start + size]

    def _fetch_pages(self, vas: Sequence[int]) -> "list[bytes | NotMapped | Unreadable]":
        found: list[bytes | NotMapped | Unreadable] = []
        for va, count in neighbours(vas):
            data = self._shown(va, count * PAGE_SIZE) or b""
            for at in range(0, count * PAGE_SIZE, PAGE_SIZE):
                page = data[at : at + PAGE_SIZE] or _ZEROES
                found += [page] if page != _ZEROES else super()._fetch_pages([va + at])
        return found

    def _shown(self, va: int, size: int) -> bytes | None:
        """What kcore shows of whole pages; None if that is nothing. A page that is not all zeroes was really read."""
        buffer = bytearray(size)
        try:
            self._kcore.read_virtual(va, memoryview(buffer))
        except Undetermined:
            return None
        return bytes(buffer)

    def _fetch_user(self, pid: int, va: int, size: int) -> bytes:
        raise NotMapped(va)

    def fill(self, va: int, view: memoryview) -> None:
        try:
            self._kcore.read_virtual(va, view)
        except Undetermined:
            raise Unreadable(va) from None

    def _of_image(self, va: int) -> bool:
        """Whether kcore reads it by this very address (KCORE_TEXT)."""
        return START_KERNEL_MAP <= va < START_KERNEL_MAP + self._facts.kernel_image_size

    def _blank(self, pa: int) -> bool:
        """Whether kcore may give zeroes for a page that holds something else: it reads by the direct map."""
        mapped = self._walk(self._kcore.page_offset_base + pa, lambda _: None)
        return not mapped or self._kcore.page_flags.is_zero_filled(pa >> PAGE_SHIFT)

    def _translate(self, va: int) -> int | None:
        """The physical address behind a kernel address; None if it is not mapped.

        Raises:
            Unreadable: a page table cannot be read, so it cannot be told.
        """

        def empty(table: int) -> None:
            if self._blank(table):
                raise Unreadable(va)

        return self._walk(va, empty)

    def _walk(self, va: int, empty: Callable[[int], None]) -> int | None:
        """As ``_translate``.

        Args:
            empty: asked about a table that reads as zeroes: is it really so? What it raises goes on.
        """

        def entry_at(pa: int) -> int:
            table, at = pa & PAGE_MASK, pa % PAGE_SIZE
            page = self._shown(self._kcore.page_offset_base + table, PAGE_SIZE)
            if page is None:
                raise Unreadable(va)
            if page == _ZEROES:
                empty(table)
            return int.from_bytes(page[at : at + 8], "little")

        if va >> PAGE_SHIFT + 9 * self._facts.levels - 1 != (1 << 53 - 9 * self._facts.levels) - 1:
            return None  # not canonical
        leaf = walk_tables(entry_at, self._facts.root_pa, self._facts.levels, va, self._mask)
        return None if leaf is None else leaf.pa + va - leaf.va
