"""The words of a result: what reaches a page of guest RAM, by which kernel address and with which rights.

Only facts; how they are found is in ``join`` (kernel mappings), ``sharers`` (processes) and ``physical`` (the picture).
Lists may be cut, at LISTED entries each; what is left out is counted, and the totals are always of everything.
"""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

__all__ = ["LISTED", "Kind", "PhysicalCell", "PhysicalMap", "Reach", "ReachTotal", "Sharer", "Sharing", "VmmFacts"]

LISTED = 1 << 14  # ranges a list holds: some 5 MB of JSON


class Kind(Enum):
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


@dataclass(frozen=True)
class Reach:
    """A stretch of guest RAM and one kernel mapping of it: contiguous in all addresses.

    Attributes:
        va: kernel virtual address.
        pa: physical address.
        bytes: a multiple of 4096.
        kind: what the mapping is.
        region: its region, as Documentation/arch/x86/x86_64/mm.rst names it.
        page_size: of the mapping: 4096, 2 MiB or 1 GiB.
        writable, executable: as all levels of the page tables together say.
        userspace_addr: where the audited process has it.
        guest_phys_addr: where the guest has it; None where the VMM has not told.
        caller: who made the mapping, as /proc/vmallocinfo says it (``kvm_gpc_map+0x…``); empty where nobody is named.
    """

    va: int
    pa: int
    bytes: int
    kind: Kind
    region: str
    page_size: int
    writable: bool
    executable: bool
    userspace_addr: int = 0
    guest_phys_addr: int | None = None
    caller: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "va": f"{self.va:#x}",
            "pa": f"{self.pa:#x}",
            "kind": self.kind.value,
            "userspace_addr": f"{self.userspace_addr:#x}",
        }


@dataclass(frozen=True)
class ReachTotal:
    """How many pages of guest RAM mappings of one sort reach; a page counts once for each mapping of it.

    Of the vmalloc space, one total for each caller.
    """

    kind: Kind
    region: str
    page_size: int
    writable: bool
    executable: bool
    caller: str
    pages: int
    ranges: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kind": self.kind.value}


@dataclass(frozen=True)
class Sharer:
    """Another process, and how many of the guest's pages it has in its page tables."""

    pid: int
    process: str
    pages: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sharing:
    """Guest pages that other processes map too.

    Attributes:
        shared_pages: those that /proc/kpagecount counts more mappings of than the audited process has.
        uncounted_pages: those that it cannot count (no ``struct page``, or a VM_PFNMAP mapping).
        processes: who maps them, most pages first; None if that was not asked.
        unreadable_processes: those whose page tables could not be read, if it was asked.
    """

    shared_pages: int
    uncounted_pages: int
    processes: tuple[Sharer, ...] | None = None
    unreadable_processes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "shared_pages": self.shared_pages,
            "uncounted_pages": self.uncounted_pages,
            "processes": None if self.processes is None else [sharer.to_json() for sharer in self.processes],
            "unreadable_processes": self.unreadable_processes,
        }


@dataclass(frozen=True)
class PhysicalCell:
    """A stretch of physical memory with pages of the guest's in it.

    ``guest_pages`` counts them; of these, ``direct_map_pages`` and ``alias_pages`` (which may overlap) are mapped,
    ``mapped_pages`` by either, and ``unknown_pages`` could not be judged. ``kinds`` are those of the mappings.
    """

    pa: int
    bytes: int
    guest_pages: int
    direct_map_pages: int
    alias_pages: int
    mapped_pages: int
    unknown_pages: int
    kinds: tuple[Kind, ...]

    @property
    def unmapped_pages(self) -> int:
        """Those that no mapping was found of. Whether they are hidden is for the verdict to say."""
        return self.guest_pages - self.mapped_pages - self.unknown_pages

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "pa": f"{self.pa:#x}",
            "unmapped_pages": self.unmapped_pages,
            "kinds": [kind.value for kind in self.kinds],
        }


@dataclass(frozen=True)
class PhysicalMap:
    """Where the guest's pages are in physical memory.

    Attributes:
        ram: (start, end) of what the host kernel calls RAM.
        cells: in order of address, disjoint: exact ranges if they are few (``cell_bytes`` is None), else buckets of
            ``cell_bytes`` each, only those with guest pages in them.
    """

    ram: tuple[tuple[int, int], ...] = ()
    cells: tuple[PhysicalCell, ...] = ()
    cell_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "ram": [[f"{start:#x}", f"{end:#x}"] for start, end in self.ram],
            "cell_bytes": self.cell_bytes,
            "cells": [cell.to_json() for cell in self.cells],
        }


@dataclass(frozen=True)
class VmmFacts:
    """What kind of VMM the process is, by its name only: no verdict rests on it.

    ``vmm`` is ``QEMU``, ``Firecracker``, … or empty; ``vms`` and ``vcpus`` count the distinct KVM descriptors it holds.
    """

    vmm: str = ""
    executable: str = ""
    vms: int = 0
    vcpus: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
