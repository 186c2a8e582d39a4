"""The words of a result for what reaches a page of guest RAM: kernel mappings, other processes, physical memory.

Only facts; ``join`` finds the kernel mappings, ``sharers`` the processes and ``physical`` the ranges of memory.
A list may be cut at LISTED entries. What is left out is counted, and totals are always of everything.
"""

from enum import StrEnum
from typing import Annotated

from offmap.report.typed import Address, Count, Document, one_of
from offmap.uapi.page import PAGE_SIZE

LISTED = 1 << 14  # ranges a list holds: some 5 MB of JSON


class Kind(StrEnum):
    """What a kernel mapping is: the region it lies in, and for the vmalloc space what /proc/vmallocinfo says of it."""

    DIRECT_MAP = "direct_map"
    KERNEL_IMAGE = "kernel_image"
    MODULE = "module"
    VMALLOC = "vmalloc"
    VMAP = "vmap"  # vmap() and vm_map_ram()
    MEMREMAP = "memremap"
    IOREMAP = "ioremap"
    VMALLOC_SPACE = "vmalloc_space"  # in that space, and /proc/vmallocinfo does not say what it is
    VMEMMAP = "vmemmap"
    FIXMAP = "fixmap"
    CPU_ENTRY_AREA = "cpu_entry_area"
    ESPFIX = "espfix"
    EFI = "efi"
    LDT_REMAP = "ldt_remap"
    KASAN = "kasan"
    VSYSCALL = "vsyscall"
    OTHER = "other"  # where the kernel's documentation has a hole


KINDS = tuple(Kind)
"""Numbers for kinds in arrays and bit masks: index into this."""

KindName = Annotated[str, one_of(Kind)]
"""A Kind, or what a later version calls one."""

PageBytes = Annotated[Count, one_of((PAGE_SIZE, 2 << 20, 1 << 30))]


class Reach(Document, frozen=True):
    """A stretch of guest RAM and one kernel mapping of it: contiguous in all addresses.

    Attributes:
        va: Kernel virtual address.
        pa: Physical address.
        bytes: A multiple of 4096.
        kind: What the mapping is: its region, and for the vmalloc space what /proc/vmallocinfo says of it.
        region: Region of the kernel's addresses, as Documentation/arch/x86/x86_64/mm.rst names it.
        page_size: Bytes that one entry maps.
        writable: Whether all levels of the page tables together allow writes.
        executable: Whether all levels of the page tables together allow execution.
        userspace_addr: Where the audited process has it; 0x0 if that is not known.
        guest_phys_addr: Where the guest has it; null if that is not known.
        caller: Who made the mapping, as /proc/vmallocinfo says (kvm_gpc_map+0x…); empty where nobody is named.
    """

    va: Address
    pa: Address
    bytes: Count
    kind: KindName
    region: str
    page_size: PageBytes
    writable: bool
    executable: bool
    userspace_addr: Address
    guest_phys_addr: Count | None
    caller: str

    @property
    def rights(self) -> str:
        """As in /proc/PID/maps."""
        return _rights(self.writable, self.executable)


class ReachTotal(Document, frozen=True):
    """All mappings of one sort; a page counts once for each mapping of it. The vmalloc space has one for each caller.

    Attributes:
        kind: What the mappings are.
        region: Region of the kernel's addresses, as Documentation/arch/x86/x86_64/mm.rst names it.
        page_size: Bytes that one entry maps.
        writable: Whether all levels of the page tables together allow writes.
        executable: Whether all levels of the page tables together allow execution.
        caller: Who made the mappings, as /proc/vmallocinfo says; empty where nobody is named.
        pages: Pages of guest RAM that they reach.
        ranges: Contiguous stretches.
    """

    kind: KindName
    region: str
    page_size: PageBytes
    writable: bool
    executable: bool
    caller: str
    pages: Count
    ranges: Count

    @property
    def rights(self) -> str:
        """As in /proc/PID/maps."""
        return _rights(self.writable, self.executable)


def _rights(writable: bool, executable: bool) -> str:
    return f"r{'w' if writable else '-'}{'x' if executable else '-'}"


class Sharer(Document, frozen=True):
    """Another process that maps guest pages.

    Attributes:
        pid: Its PID.
        process: Its command name.
        pages: Guest pages in its page tables.
    """

    pid: Count
    process: str
    pages: Count


class Sharing(Document, frozen=True):
    """Guest pages that other processes map too.

    Attributes:
        shared_pages: Pages that /proc/kpagecount counts more mappings of than the audited process has.
        uncounted_pages: Pages that it cannot count: without a struct page, or in a VM_PFNMAP mapping.
        processes: Who maps them, most pages first; null if that was not asked.
        unreadable_processes: Processes whose page tables could not be read, if that was asked.
    """

    shared_pages: Count
    uncounted_pages: Count
    processes: tuple[Sharer, ...] | None
    unreadable_processes: Count


class PhysicalCell(Document, frozen=True):
    """A stretch of physical memory that holds guest pages.

    Attributes:
        pa: Where it begins.
        bytes: Its size.
        guest_pages: Guest pages in it.
        direct_map_pages: Of these, in the direct map.
        alias_pages: Of these, mapped otherwise; may overlap with direct_map_pages.
        mapped_pages: Of these, mapped at all.
        unknown_pages: Of these, not judged.
        unmapped_pages: The rest: no mapping was found. The verdict says whether they are hidden.
        kinds: What maps them.
    """

    pa: Address
    bytes: Count
    guest_pages: Count
    direct_map_pages: Count
    alias_pages: Count
    mapped_pages: Count
    unknown_pages: Count
    unmapped_pages: Count
    kinds: tuple[KindName, ...]


class PhysicalMap(Document, frozen=True):
    """Where the guest's pages are in physical memory.

    Attributes:
        ram: Start and end of each range that the host kernel calls RAM.
        cell_bytes: Size of the buckets that the cells are; null if they are exact ranges.
        cells: In order of address, disjoint; only those that hold guest pages.
    """

    ram: tuple[tuple[Address, Address], ...]
    cell_bytes: Count | None
    cells: tuple[PhysicalCell, ...]


class VmmFacts(Document, frozen=True):
    """What kind of VMM the process is, by its name only; no verdict rests on it.

    Attributes:
        vmm: QEMU, Firecracker, …; empty if it is not known.
        executable: Path of its executable; empty if it cannot be read.
        vms: KVM VMs that it holds open.
        vcpus: KVM vCPUs that it holds open.
    """

    vmm: str
    executable: str
    vms: Count
    vcpus: Count
