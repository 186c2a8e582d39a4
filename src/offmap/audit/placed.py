"""What a page is that something was found in: whose it is, by its flags and by what the kernel's structures say of it.

``sort_of`` decides by /proc/kpageflags alone (Documentation/admin-guide/mm/pagemap.rst); ``Placer`` puts the names to
it: the guest's page, the file, the processes, the slab. What cannot be named stays unnamed.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from offmap.audit.btf import Btf, Unknown, host_types
from offmap.audit.guest_pages import GuestPages
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.mappings import KernelMappings
from offmap.audit.pageflags import (
    KPF_ANON,
    KPF_BUDDY,
    KPF_COMPOUND_TAIL,
    KPF_HUGE,
    KPF_KSM,
    KPF_LRU,
    KPF_MMAP,
    KPF_PGTABLE,
    KPF_RESERVED,
    KPF_SLAB,
    KPF_UPTODATE,
    PageFlags,
)
from offmap.audit.regions import KERNEL_TEXT, MODULES, VMALLOC, Layout
from offmap.audit.scan_result import Owner, PageProcess, Sort
from offmap.audit.sharers import mapped_by
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SIZE

_THREAD_SIZE = 4 * PAGE_SIZE  # arch/x86/include/asm/page_64_types.h, without KASAN
_MOST_NAMED = 1 << 10  # pages whose owners are looked up one by one

_SORTS = {  # the first that applies
    1 << KPF_BUDDY: Sort.FREE,
    1 << KPF_SLAB: Sort.SLAB,
    1 << KPF_PGTABLE: Sort.PAGE_TABLE,
    1 << KPF_ANON | 1 << KPF_KSM: Sort.PROCESS,
    1 << KPF_LRU | 1 << KPF_HUGE: Sort.PAGE_CACHE,
    1 << KPF_RESERVED: Sort.RESERVED,
}
_MAYBE_CACHED = 1 << KPF_MMAP | 1 << KPF_LRU | 1 << KPF_UPTODATE


def sort_of(flags: int) -> Sort | None:
    """What the flags of a page (its folio's first page's included) say that it is; None where they do not."""

    return next((sort for bits, sort in _SORTS.items() if flags & bits), None)


class Look(NamedTuple):
    """What the kernel said of a frame: the first frame of its folio, the flags of both, whether nobody refers to it."""

    head: int
    flags: int
    unused: bool

    @property
    def free(self) -> bool:
        return self.unused or sort_of(self.flags) is Sort.FREE


@dataclass
class Placer:
    """Tells whose pages are; built once for a scan.

    Args:
        leave_out: PIDs that are not named as owners: our own.
    """

    kcore: Kcore
    layout: Layout
    mappings: KernelMappings
    guest: GuestPages
    leave_out: Collection[int] = ()
    btf: Callable[[], Btf] = host_types
    _prepared: bool = field(default=False, init=False)
    _objects: KernelObjects | None = field(default=None, init=False)
    _stacks: list[tuple[int, str]] | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Read BTF; best before the scan, as the memory that this takes may be free pages with something in them."""
        if not self._prepared:
            self._prepared = True
            with suppress(Unknown):
                self._objects = KernelObjects(self.kcore, self.layout, self.btf())

    def look(self, frames: Collection[int]) -> dict[int, Look]:
        """What the kernel says of these frames now, in a few reads each."""
        if any(frame not in self.guest for frame in frames):
            self.prepare()
        found = {}
        for frame in sorted(frames):
            head, flags = head_and_flags(self.kcore.page_flags, frame)
            # Pages on the list of one processor are free, which kpageflags does not tell.
            unused = sort_of(flags) is None and self._objects is not None and self._objects.unused(frame)
            found[frame] = Look(head, flags, unused)
        return found

    def owners(self, looks: Mapping[int, Look]) -> dict[int, Owner]:
        """Whose the frames are that ``look`` was asked of."""
        others = [frame for frame, look in looks.items() if not look.free and frame not in self.guest]
        sharers = mapped_by(others, self.leave_out) if others else {}
        owners, named = {}, 0
        for frame, look in looks.items():
            if look.free and frame not in self.guest:
                owners[frame] = Owner(Sort.FREE)
                continue
            named += 1
            same = head_and_flags(self.kcore.page_flags, frame) == (look.head, look.flags)
            objects = self._objects if same and named <= _MOST_NAMED else None
            processes = tuple(PageProcess(by.pid, by.process, Address(by.va)) for by in sharers.get(frame, ()))
            path = next((by.path for by in sharers.get(frame, ()) if by.path), "")
            owners[frame] = self._owner(frame, look, processes, path, objects)
        return owners

    def _owner(
        self, frame: int, look: Look, processes: tuple[PageProcess, ...], path: str, objects: KernelObjects | None
    ) -> Owner:
        head, flags = look.head, look.flags
        place = self.guest.find(frame)
        if place is not None:
            va, guest = place
            known = None if guest is None else Address(guest)
            return Owner(Sort.GUEST, userspace_addr=Address(va), guest_phys_addr=known)
        sort = sort_of(flags)
        if sort is Sort.SLAB:
            return Owner(sort, objects.slab_of(head) if objects else "")
        if sort in {None, Sort.PAGE_CACHE} and flags & _MAYBE_CACHED:
            file = objects.file_of(head, frame) if objects else None
            if file is not None:
                return Owner(Sort.PAGE_CACHE, file.name, file.offset, processes)
            if path or sort is Sort.PAGE_CACHE:
                return Owner(Sort.PAGE_CACHE, path, None, processes)
        if sort is Sort.RESERVED and self._aliased(frame, (KERNEL_TEXT, MODULES)):
            return Owner(Sort.KERNEL_IMAGE)
        if sort is not None:
            return Owner(sort, processes=processes)
        stacks = self._aliased(frame, (VMALLOC,))
        if stacks:
            thread = next((name for va in stacks for name in self._stack(va, objects)), None)
            return Owner(Sort.KERNEL_STACK, thread) if thread else Owner(Sort.VMALLOC)
        return Owner(Sort.KERNEL, processes=processes)

    def _aliased(self, frame: int, regions: Collection[str]) -> list[int]:
        """Addresses outside the direct map that the kernel has this page at, in these regions."""
        direct = self.mappings.direct_map_base + frame * PAGE_SIZE
        addresses = self.mappings.addresses_of(frame * PAGE_SIZE)
        return [va for va in addresses if va != direct and self.layout.name(va) in regions]

    def _stack(self, va: int, objects: KernelObjects | None) -> list[str]:
        """The thread whose kernel stack holds this address."""
        if self._stacks is None:
            self._stacks = []
            if objects is not None:
                with suppress(Unknown):
                    self._stacks += [(task.stack, f"{task.name} ({task.pid})") for task in objects.tasks()]
        return [name for stack, name in self._stacks if stack <= va < stack + _THREAD_SIZE]


def head_and_flags(flags: PageFlags, frame: int) -> tuple[int, int]:
    """(frame of the first page of its folio, flags of both together)."""
    own = int(flags.range(frame, 1)[0])
    head, together = frame, own
    if own >> KPF_COMPOUND_TAIL & 1:
        # At most 1 GiB back: the largest folio there is.
        for back in (64, 512, 1 << 18):
            first = max(frame - back, 0)
            before = flags.range(first, frame - first)
            heads = np.flatnonzero(before & np.uint64(1 << KPF_COMPOUND_TAIL) == 0)
            if len(heads):
                head = first + int(heads[-1])
                together |= int(before[heads[-1]])
                break
    return head, together & ~(1 << KPF_COMPOUND_TAIL)
