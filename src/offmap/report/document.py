"""An audit's JSON as types: the published form (``schema/``), field by field.

All renderers work on this and nothing else, so that what they say of a fresh audit and of one that came as a file
(``--merge``) is the same. Kinds and sources stay text: a later version may have more of them.
"""

from dataclasses import dataclass

from offmap.audit.verdict import Verdict
from offmap.report.decode import Address
from offmap.report.scan_document import Oracle, Scan

__all__ = [
    "DIRECT_MAP",
    "Cell",
    "Host",
    "Mapping",
    "NotAudited",
    "Pages",
    "Physical",
    "Total",
    "Vm",
    "Vmm",
    "Walk",
]

DIRECT_MAP = "direct_map"  # audit.reach.Kind


@dataclass(frozen=True)
class Host:
    """Facts of a host (audit.host.HostFacts)."""

    kernel: str
    cpu: str
    microcode: str
    cmdline: str
    memory_bytes: int
    lab: bool
    name: str


@dataclass(frozen=True)
class Vmm:
    """audit.reach.VmmFacts."""

    vmm: str
    executable: str
    vms: int
    vcpus: int


@dataclass(frozen=True)
class Pages:
    """audit.verdict.PageCounts."""

    ram_pages: int
    pages_populated: int
    not_populated_pages: int
    direct_map_pages: int
    alias_pages: int
    mapped_pages: int
    unknown_pages: int
    excluded_pages: int
    excluded_mapped_pages: int
    excluded_direct_pages: int
    unknown_reasons: dict[str, int]
    canaries_found: int | None


@dataclass(frozen=True)
class RamRange:
    """audit.guest_ram.RamRange."""

    va: Address
    bytes: int
    source: str
    guest_phys_addr: int | None
    backend: str


@dataclass(frozen=True)
class Total:
    """audit.reach.ReachTotal."""

    kind: str
    region: str
    page_size: int
    writable: bool
    executable: bool
    caller: str
    pages: int
    ranges: int

    @property
    def rights(self) -> str:
        """As in /proc/PID/maps."""
        return f"r{'w' if self.writable else '-'}{'x' if self.executable else '-'}"


@dataclass(frozen=True)
class Mapping:
    """audit.reach.Reach."""

    va: Address
    pa: Address
    bytes: int
    kind: str
    region: str
    page_size: int
    writable: bool
    executable: bool
    userspace_addr: Address
    guest_phys_addr: int | None
    caller: str

    @property
    def rights(self) -> str:
        """As in /proc/PID/maps."""
        return f"r{'w' if self.writable else '-'}{'x' if self.executable else '-'}"


@dataclass(frozen=True)
class Cell:
    """audit.reach.PhysicalCell."""

    pa: Address
    bytes: int
    guest_pages: int
    direct_map_pages: int
    alias_pages: int
    mapped_pages: int
    unknown_pages: int
    kinds: tuple[str, ...]

    @property
    def unmapped_pages(self) -> int:
        return self.guest_pages - self.mapped_pages - self.unknown_pages


@dataclass(frozen=True)
class Physical:
    """audit.reach.PhysicalMap."""

    ram: tuple[tuple[Address, Address], ...]
    cell_bytes: int | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sharer:
    """audit.reach.Sharer."""

    pid: int
    process: str
    pages: int


@dataclass(frozen=True)
class Sharing:
    """audit.reach.Sharing."""

    shared_pages: int
    uncounted_pages: int
    processes: tuple[Sharer, ...] | None
    unreadable_processes: int


@dataclass(frozen=True)
class Unreadable:
    """audit.mappings.Span."""

    va: Address
    bytes: int
    reason: str


@dataclass(frozen=True)
class Walk:
    """The walk of the kernel's page tables."""

    levels: int
    seconds: float
    tables: dict[str, int]
    runs: int
    direct_map_bytes: dict[str, int]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class Vm:
    """One process's audit."""

    pid: int
    process: str
    vmm: Vmm
    verdict: Verdict
    notes: tuple[str, ...]
    partial: str | None
    pages: Pages
    ranges: tuple[RamRange, ...]
    reach: tuple[Total, ...]
    aliases: tuple[Mapping, ...]
    aliases_omitted: int
    direct_map_ranges: tuple[Mapping, ...]
    direct_map_ranges_omitted: int
    physical: Physical
    sharing: Sharing | None
    walk: Walk
    scan: Scan | None
    seconds: float
    oracle: Oracle | None = None

    @property
    def contradicted(self) -> bool:
        """A secret of its was read in kernel memory, and no mapping was found that explains it."""
        return self.verdict is Verdict.EXPOSED and not self.pages.mapped_pages

    @property
    def pages_by_state(self) -> dict[str, int]:
        """Each page of the RAM in one state, in order of gravity. No page is hidden that a canary speaks against."""
        pages = self.pages
        states = {
            "exposed": pages.mapped_pages,
            "unknown": pages.unknown_pages,
            "hidden": pages.ram_pages - pages.mapped_pages - pages.unknown_pages,
            "unpopulated": pages.not_populated_pages,
            "excluded": pages.excluded_pages,
        }
        states["hidden"] -= states["unpopulated"] + states["excluded"]
        if self.contradicted:
            states["unknown"] += states["hidden"]
            states["hidden"] = 0
        return states

    @property
    def alias_pages_by_region(self) -> dict[str, int]:
        """Pages aliased, by the name of the region (a page counts once for each mapping)."""
        regions: dict[str, int] = {}
        for total in self.reach:
            if total.kind != DIRECT_MAP:
                regions[total.region] = regions.get(total.region, 0) + total.pages
        return regions


@dataclass(frozen=True)
class NotAudited:
    """A process that holds a KVM VM and could not be audited: unknown, never left out."""

    pid: int
    process: str
    vmm: Vmm
    reason: str
