"""The published result of an audit. Its JSON, the JSON Schema and the decoding of files follow from these types.

A change that would break a reader gets a new number in the form's name (``schema``). Fields may be added without one.
"""

from enum import StrEnum
from typing import Annotated

from offmap.audit.host import HostFacts, Time
from offmap.audit.reach import Kind, PhysicalMap, Reach, ReachTotal, Sharing, VmmFacts
from offmap.audit.sandbox_result import VmmSandbox
from offmap.audit.scan_result import Scan
from offmap.audit.verdict import Verdict
from offmap.report.typed import Address, Count, Document, Malformed, Seconds, one_of


class Source(StrEnum):
    """How it is known that a range is guest RAM."""

    MEMSLOT = "memslot"  # the VMM says so
    REQUESTED = "range"  # the user says so
    KVM = "kvm"  # KVM has it in a memory slot: read from the kernel's memory
    GUESS = "guess"  # a large mapping of a process that holds a VM


class Pages(Document, frozen=True, kw_only=True):
    """How many 4 KiB pages of guest RAM are what. A page is excluded, populated, not populated or unknown; of the
    populated ones some are mapped.

    Attributes:
        ram_pages: All pages of the ranges.
        pages_populated: Pages whose frame is known, without those kept from the guest.
        not_populated_pages: Pages that are not there yet, so that they hold nothing.
        not_populated_plain_pages: Of these, the pages that the kernel will map when they come: all but secret memory.
            One of them is enough for the VM not to be hidden.
        direct_map_pages: Populated pages that the direct map maps.
        alias_pages: Populated pages that another kernel mapping maps; may overlap with direct_map_pages.
        mapped_pages: Populated pages that any kernel mapping maps: the exposed ones.
        unknown_pages: Pages that could not be judged. Where some page tables could not be read, these include the
            populated pages for which no mapping was found.
        excluded_pages: Pages that the VMM keeps from its guest, in no memory slot. No other count but ram_pages
            has them.
        excluded_mapped_pages: Excluded pages that any kernel mapping maps.
        excluded_direct_pages: Excluded pages in the direct map.
        unknown_reasons: Why pages could not be judged, with their number.
        canaries_found: Distinct valid canaries that were read; null if they were not looked for.
    """

    ram_pages: Count
    pages_populated: Count
    not_populated_pages: Count
    direct_map_pages: Count
    alias_pages: Count
    mapped_pages: Count
    unknown_pages: Count
    excluded_pages: Count
    excluded_mapped_pages: Count
    excluded_direct_pages: Count
    unknown_reasons: dict[str, Count]
    canaries_found: Count | None
    not_populated_plain_pages: Count = 0

    def verdict(self, guessed: bool) -> Verdict:
        """Judge. Ranges that were guessed can be found exposed, never hidden: there may be more RAM elsewhere.

        An alias of an excluded page exposes nothing, as the guest does not have it. Of memory that is hidden, no page
        is in the direct map, excluded or not.
        """
        if self.mapped_pages:
            return Verdict.EXPOSED
        if self.not_populated_plain_pages or self.unknown_pages or guessed or self.excluded_direct_pages:
            return Verdict.UNKNOWN
        if not self.pages_populated:
            return Verdict.UNKNOWN
        return Verdict.HIDDEN


class AuditedRange(Document, frozen=True):
    """A range of the process's addresses that was audited.

    Attributes:
        va: Where the process has it.
        bytes: Its size.
        source: How it is known to be guest RAM. memslot: the VMM says so; range: the user said so; kvm: KVM has it in
            a memory slot (read from the kernel's memory); guess: it is a large mapping of a process that holds a VM.
            What was guessed is never called hidden.
        guest_phys_addr: Where the guest has it; null if that is not known.
        backend: What the VMM, or /proc/PID/maps, calls its backing; empty if nothing. No verdict rests on it.
    """

    va: Address
    bytes: Count
    source: Annotated[str, one_of(Source)]
    guest_phys_addr: Count | None
    backend: str


class Span(Document, frozen=True):
    """A stretch of kernel addresses whose page tables could not be read.

    Attributes:
        va: Where it begins.
        bytes: Its size.
        reason: Why.
    """

    va: Address
    bytes: Count
    reason: str


class Walk(Document, frozen=True):
    """The walk of the kernel half of the host's page tables.

    Attributes:
        levels: Of paging.
        seconds: How long it took.
        tables: Page tables read, by level (5 the top).
        runs: Stretches of mappings found, in all.
        direct_map_bytes: Bytes of the direct map by the size of its pages: 4K, 2M, 1G.
        unreadable: Unless this is empty, a page without a known mapping is unknown.
    """

    levels: Annotated[Count, one_of((4, 5))]
    seconds: Seconds
    tables: dict[str, Count]
    runs: Count
    direct_map_bytes: dict[str, Count]
    unreadable: tuple[Span, ...]


class Look(Document, frozen=True):
    """One walk of the page tables.

    Attributes:
        at: When it began, after the first one.
        seconds: How long it took.
        whole: Whether the tables held still while they were read. If not, it does not count as a walk.
        new: Whether it found a mapping of anything, guest RAM or not, that none before it had seen.
    """

    at: Seconds
    seconds: Seconds
    whole: bool
    new: bool


class Coverage(Document, frozen=True):
    """The stretch of time that the verdict is true for, as far as walks at random moments of it can tell.

    Attributes:
        seconds: Its length.
        walks: Whole walks in it. Each misses a page that is mapped all the time, be it at moving addresses, with a
            probability of at most 1/e; one that is mapped for a share f of the time, of at most e^-f.
        roots: Roots of page tables that were looked at, by kind: init_top_pgt; mm, one for each address space; user,
            its second one under page-table isolation; efi_mm; poking_mm; trampoline.
        looks: Each walk.
    """

    seconds: Seconds
    walks: Count
    roots: dict[str, Count]
    looks: tuple[Look, ...]


class OracleResult(Document, frozen=True):
    """What an independent walker said of a random sample. It agreed: one disagreement fails the audit.

    Attributes:
        name: Of the oracle.
        version: Of the oracle.
        seed: Of the sample; the same one draws the same of the same host.
        pages: Guest pages drawn.
        frames_agreed: Of these, those whose frame the oracle found too.
        frames_unasked: Of these, those whose frame the oracle could not find: they are not in the process's own page
            tables, or it could not be told where those are.
        addresses: Kernel addresses asked for.
        mapped: Of these, what both called mapped.
        unmapped: Of these, what both called not mapped.
        retried: Questions asked again, as the kernel had changed something meanwhile.
        seconds: How long it took.
    """

    name: str
    version: str
    seed: Count
    pages: Count
    frames_agreed: Count
    frames_unasked: Count
    addresses: Count
    mapped: Count
    unmapped: Count
    retried: Count
    seconds: Seconds

    def __str__(self) -> str:
        return (
            f"{self.name} {self.version} agrees on the frames of {self.frames_agreed:,} of {self.pages:,} guest pages "
            f"drawn at random, and on {self.addresses:,} kernel addresses "
            f"({self.mapped:,} mapped, {self.unmapped:,} not)"
        )


class AuditResult(Document, frozen=True, tag_field="schema", tag="offmap-audit/2", kw_only=True):
    """One VM: offmap audit PID --json.

    Attributes:
        schema: Name and version of this form.
        offmap: Version of offmap that made the result.
        time: When the audit ended, in UTC.
        host: The host whose kernel was audited.
        pid: PID of the VMM.
        process: Its command name.
        vmm: What kind of VMM it is.
        sandbox: What confines its process; null if that could not be read, and in results of older versions.
        verdict: hidden, exposed or unknown.
        notes: What must be known about the verdict.
        partial: Why the audit ended early, so that it counts a part; null if it did not.
        pages: The counts that the verdict rests on.
        ranges: What was audited.
        reach: How many pages are reached by what: complete, whatever the lists below leave out.
        aliases: Mappings outside the direct map, in order of kernel address.
        aliases_omitted: Entries left out of aliases.
        direct_map_ranges: The direct map's mappings, in order of kernel address.
        direct_map_ranges_omitted: Entries left out of direct_map_ranges.
        physical: Where in physical memory the guest's pages are, and what reaches them there.
        sharing: Other processes that map guest pages; null if it could not be counted.
        mapped_guest_ranges: Guest-physical address and bytes of all that is mapped, where the VMM has told its slots.
        kvm_clock_pages: Guest-physical addresses of pages that KVM maps to write kvm-clock's time to.
        walk: The walk of the kernel's page tables.
        coverage: The stretch of time that was looked at; null in results of older versions.
        scan: Null if nothing was scanned for.
        oracle: Null if no independent walker was asked.
        seconds: How long the audit took.
    """

    offmap: str
    time: Time
    host: HostFacts
    pid: Count
    process: str
    vmm: VmmFacts
    verdict: Verdict
    notes: tuple[str, ...]
    partial: str | None
    pages: Pages
    ranges: tuple[AuditedRange, ...]
    reach: tuple[ReachTotal, ...]
    aliases: tuple[Reach, ...]
    aliases_omitted: Count
    direct_map_ranges: tuple[Reach, ...]
    direct_map_ranges_omitted: Count
    physical: PhysicalMap
    sharing: Sharing | None
    mapped_guest_ranges: tuple[tuple[Count, Count], ...]
    kvm_clock_pages: tuple[Count, ...] = ()
    walk: Walk
    coverage: Coverage | None = None
    scan: Scan | None
    oracle: OracleResult | None = None
    sandbox: VmmSandbox | None = None
    seconds: Seconds

    @property
    def contradicted(self) -> bool:
        """Whether a secret was read in kernel memory though no mapping was found that explains it."""
        return self.verdict is Verdict.EXPOSED and not self.pages.mapped_pages

    @property
    def pages_by_state(self) -> dict[str, int]:
        """Each page of the RAM in one state, the gravest first. A canary that was read leaves no page hidden."""
        pages = self.pages
        rest = pages.ram_pages - pages.mapped_pages - pages.unknown_pages
        rest -= pages.not_populated_pages + pages.excluded_pages
        doubted = rest if self.contradicted else 0
        return {
            "exposed": pages.mapped_pages,
            "unknown": pages.unknown_pages + doubted,
            "hidden": rest - doubted,
            "unpopulated": pages.not_populated_pages,
            "excluded": pages.excluded_pages,
        }

    @property
    def alias_pages_by_region(self) -> dict[str, int]:
        """Aliased pages, by the name of the region (a page counts once for each mapping)."""
        regions: dict[str, int] = {}
        for total in self.reach:
            if total.kind != Kind.DIRECT_MAP:
                regions[total.region] = regions.get(total.region, 0) + total.pages
        return regions

    def check(self) -> None:
        """Make sure that the figures add up, and say "hidden" where the verdict does. Raises Malformed: they don't."""
        pages, cells = self.pages, self.physical.cells
        where = f"VM {self.pid}: "
        if min(self.pages_by_state.values()) < 0 or any(
            cell.guest_pages != cell.mapped_pages + cell.unknown_pages + cell.unmapped_pages for cell in cells
        ):
            raise Malformed(where + "its pages do not add up")
        mapped = pages.mapped_pages or (not pages.excluded_mapped_pages and any(cell.mapped_pages for cell in cells))
        speaks_against = (
            mapped,
            pages.unknown_pages or any(cell.unknown_pages for cell in cells),
            pages.not_populated_plain_pages,
            not pages.pages_populated,
            pages.direct_map_pages or pages.alias_pages or pages.excluded_direct_pages,
            self.reach or self.aliases or self.direct_map_ranges,
            self.walk.unreadable,
            pages.canaries_found or (self.scan is not None and (self.scan.found or self.scan.findings)),
            self.scan is not None and self.scan.device_pages is not None and self.scan.frames_unread,
            self.partial,
            any(part.source == Source.GUESS for part in self.ranges),
        )
        if self.verdict is Verdict.HIDDEN and any(speaks_against):
            raise Malformed(where + "it says hidden, and its figures do not")
        if self.verdict is not Verdict.EXPOSED and pages.mapped_pages:
            raise Malformed(where + f"it says {self.verdict.value}, and {pages.mapped_pages} of its pages are mapped")
