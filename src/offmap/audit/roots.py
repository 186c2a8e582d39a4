"""Every root of page tables that the kernel can run on, not only ``init_top_pgt``.

An address space has a top table of its own, whose kernel half is a copy of init_top_pgt's: but for what it has beside
it (the LDT remap of page-table isolation). All of them are on the kernel's ``pgd_list`` (``arch/x86/mm/pgtable.c``).
Under page-table isolation each has a second one, which is the next page. ``efi_mm`` and ``poking_mm``
(``text_poke_mm`` in newer kernels) map for the kernel in their lower half too. The real-mode trampoline has a table
that processors start and reboot on.

``pgd_list`` is a list of ``struct page``, whose layout VMCOREINFO tells. It changes while it is read: what was read is
believed only if each page points back to the one before. Where a root cannot be found, the result has a problem, and no
VM is hidden.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offmap.audit.btf import Unknown, host_types
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import symbol
from offmap.audit.mappings import KernelMappings
from offmap.audit.procfs import read_path
from offmap.audit.regions import Layout
from offmap.audit.tops import TOP_ENTRY, Tops
from offmap.audit.walk import ENTRIES, Walker
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

_ATTEMPTS = 10  # the list changes with each fork and exit
_MOST_SPACES = 1 << 22  # PID_MAX_LIMIT
_HALF = ENTRIES // 2
_ACCESSED_DIRTY = np.uint64(1 << 5 | 1 << 6)
_PRESENT = np.uint64(1 << 0)
_REAL_MODE_HEADER = 64  # bytes that are more than all of struct real_mode_header (asm/realmode.h), of u32
_LOW_MEMORY = 1 << 20  # where real mode can run
_EFI = Path("/sys/firmware/efi")


class _Moved(Exception):
    """The list changed while it was read."""


class Roots:
    """Asks the running kernel for what other roots than init_top_pgt have.

    Args:
        kcore: an open kcore, which must outlive this.
        layout: of the kernel's addresses.
    """

    def __init__(self, kcore: Kcore, layout: Layout) -> None:
        self._kcore, self._vmemmap = kcore, layout.vmemmap
        self._isolated = page_table_isolation()
        self._facts = kcore.vmcoreinfo

    def __call__(self) -> Tops:
        """What they have now."""
        problems: list[str] = []
        roots: dict[str, int] = {}
        parts: list[NDArray[np.void]] = []

        def add(name: str, pages: NDArray[np.uint64], whole: bool = False) -> None:
            roots[name] = len(pages)
            parts.append(_entries(pages, 0 if whole else _HALF))

        try:
            spaces = self._spaces()
            tables = self._read([pa for pa, _ in spaces])
            add("mm", tables)
            if self._isolated:
                twins = [self._facts.root_pa, *(pa for pa, _ in spaces)]
                add("user", self._read([pa + PAGE_SIZE for pa in twins]))
            poking = self._pointer(self._poking)
            add("poking_mm", tables[[number for number, (_, mm) in enumerate(spaces) if mm == poking]], whole=True)
            if not roots["poking_mm"]:
                problems.append("the page table of poking_mm is not on pgd_list")
            if _EFI.exists():
                add("efi_mm", self._read(self._efi()), whole=True)
            add("trampoline", self._read(self._trampoline()), whole=True)
        except (Unknown, Undetermined) as error:
            problems.append(f"not every root of page tables can be found: {error}")
        entries = np.concatenate([np.empty(0, dtype=TOP_ENTRY), *parts])
        return Tops(_distinct(entries), roots, tuple(problems))

    def _spaces(self) -> list[tuple[int, int]]:
        """Physical address of each address space's top table, and the address of its ``struct mm_struct``.

        Raises:
            Unknown: the list cannot be read.
        """
        for _ in range(_ATTEMPTS):
            try:
                return list(self._list())
            except _Moved:
                continue
        raise Unknown("the list of address spaces kept changing")

    def _list(self) -> Iterator[tuple[int, int]]:
        facts = self._facts
        if facts.page_bytes is None or facts.page_lru is None or facts.page_mapping is None:
            raise Unknown("VMCOREINFO does not describe struct page")
        head = symbol("pgd_list")
        back, at = head, self._pointer(head)
        for _ in range(_MOST_SPACES):
            if at == head:
                return
            page, odd = divmod(at - facts.page_lru - self._vmemmap, facts.page_bytes)
            if odd or page < 0:
                raise _Moved
            raw = self._bytes(at - facts.page_lru, facts.page_bytes)
            following, before = struct.unpack_from("<QQ", raw, facts.page_lru)
            if before != back:
                raise _Moved
            # pgd_set_mm(): in the word behind page.mapping (struct ptdesc, pt_mm).
            yield page * PAGE_SIZE, int.from_bytes(raw[facts.page_mapping + 8 :][:8], "little")
            back, at = at, following
        raise Unknown("the list of address spaces does not end")

    @cached_property
    def _poking(self) -> int:
        """Address of the variable that leads to it."""
        try:
            return symbol("poking_mm")
        except Unknown:
            return symbol("text_poke_mm")

    def _efi(self) -> Sequence[int]:
        """The top table of efi_mm; none where the kernel does not call the firmware (``noefi``)."""
        table = self._pointer(symbol("efi_mm") + host_types().offset("mm_struct", "pgd"))
        return [table - self._kcore.page_offset_base] if table else []

    def _trampoline(self) -> Sequence[int]:
        """The top table of the trampoline: what its header refers to, and ends as init_top_pgt does."""
        header = self._pointer(symbol("real_mode_header"))
        words = [word for (word,) in struct.iter_unpack("<I", self._bytes(header, _REAL_MODE_HEADER))]
        words = [word for word in words if word and word % PAGE_SIZE == 0 and word < _LOW_MEMORY]
        root, *pages = self._read([self._facts.root_pa, *words])
        for word, page in zip(words, pages, strict=True):
            if not int(page[-1] ^ root[-1]) & ~int(_ACCESSED_DIRTY):
                return [word]
        raise Unknown("the real-mode trampoline's page table is not where its header is")

    def _read(self, pas: Sequence[int]) -> NDArray[np.uint64]:
        """Whole tables, in the order of their addresses here."""
        wanted, inverse = np.unique(np.array(pas, dtype=np.uint64), return_inverse=True)
        if not self._kcore.in_ram(wanted).all():
            raise Unknown("a top-level table is outside RAM")
        pages = np.empty((len(wanted), ENTRIES), dtype=np.uint64)
        self._kcore.read_pages(wanted, pages)
        return pages[inverse]

    def _pointer(self, va: int) -> int:
        return int.from_bytes(self._bytes(va, 8), "little")

    def _bytes(self, va: int, size: int) -> bytes:
        buffer = bytearray(size)
        self._kcore.read_virtual(va, memoryview(buffer))
        return bytes(buffer)


def _entries(pages: NDArray[np.uint64], first: int) -> NDArray[np.void]:
    """The present entries of top tables (n x 512), from this one of each on."""
    table, index = np.nonzero(pages[:, first:] & _PRESENT)
    found = np.empty(len(index), dtype=TOP_ENTRY)
    found["index"], found["entry"] = index + first, pages[table, index + first] & ~_ACCESSED_DIRTY
    return found


def _distinct(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Each once, in order. (numpy sorts records with two fields 50 times slower.)"""
    entries = entries[np.lexsort((entries["entry"], entries["index"]))]
    again = (entries["index"][1:] == entries["index"][:-1]) & (entries["entry"][1:] == entries["entry"][:-1])
    first = np.ones(len(entries), dtype=np.bool_)
    first[1:] = ~again
    return np.asarray(entries[first], dtype=TOP_ENTRY)


def page_table_isolation(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the kernel runs processes on page tables of their own (the flag ``pti``)."""
    try:
        text = read_path(cpuinfo)
    except OSError as error:
        raise Undetermined(f"cannot read {cpuinfo}: {error.strerror}") from None
    flags = next((line.split() for line in text.splitlines() if line.startswith(b"flags")), [])
    return b"pti" in flags


def walker_of(kcore: Kcore, layout: Layout | None = None) -> Walker:
    """A walker of all the running kernel's tables."""
    info = kcore.vmcoreinfo
    layout = layout or Layout.of(info, kcore.page_offset_base, kcore.segments)
    return Walker(kcore, info.root_pa, info.levels, kcore.page_offset_base, info.sme_mask, Roots(kcore, layout))


def walk_kcore(kcore: Kcore) -> KernelMappings:
    """One pass over all the running kernel's tables."""
    walker = walker_of(kcore)
    walker.walk()
    return walker.mappings()
