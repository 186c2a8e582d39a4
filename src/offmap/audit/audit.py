"""One audit of one process, from its PID to a verdict."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import offmap
from offmap.audit.control import check_control
from offmap.audit.drgn_kernel import require_drgn
from offmap.audit.frames import resolve
from offmap.audit.guest_pages import GuestPages
from offmap.audit.guest_ram import AskKvm, GuestRam, RamRange, Source, find_guest_ram
from offmap.audit.host import HostFacts, host_facts, utc_now
from offmap.audit.join import join
from offmap.audit.kcore import Kcore
from offmap.audit.kinds import kinds_of, read_vmallocinfo
from offmap.audit.kvm_slots import KvmSlot, KvmSlots
from offmap.audit.mappings import KernelMappings
from offmap.audit.oracle import OracleResult, Sample
from offmap.audit.pagemap import OwnPage
from offmap.audit.physical import physical_map
from offmap.audit.process import Process, ProcessEnded
from offmap.audit.reach import Kind, PhysicalMap, Reach, ReachTotal, Sharing, VmmFacts
from offmap.audit.regions import Layout
from offmap.audit.scan import ScanResult, Wanted, scan_memory
from offmap.audit.second_opinion import second_opinion
from offmap.audit.sharers import sharing_of
from offmap.audit.verdict import Judged, PageCounts, Verdict, classify, excluded_ranges, mapped_guest_ranges
from offmap.audit.vms import vmm_facts
from offmap.audit.walk import walk_kernel_half
from offmap.errors import Undetermined
from offmap.log import Logger
from offmap.units import format_size

__all__ = ["AuditResult", "Progress", "Stage", "audit_process"]

_log = Logger("offmap.audit")

SCHEMA = "offmap-audit/2"
_ATTEMPTS = 3  # memory hot-plugged in mid-audit changes kcore's segments


class Stage(Enum):
    """What the audit is doing."""

    FRAMES = "finding guest RAM"
    WALK = "walking the kernel's page tables"
    SCAN = "scanning what the kernel has mapped"
    ORACLE = "asking drgn"


# Called with the stage and the share of it that is done, 0 to 1.
Progress = Callable[[Stage, float], None]


@dataclass(frozen=True)
class AuditResult:
    """What was found of one process's guest RAM.

    Attributes:
        pages: the counts the verdict rests on.
        aliases: kernel mappings outside the direct map, in order of kernel address; at most LISTED.
        scan: what a scan found (None if none was asked for).
        notes: what a reader must know about the verdict.
        mapped: guest-physical (address, bytes) of all that is mapped, where a VMM has told its memory slots.
        reach: how many pages are reached by what: complete, whatever the lists leave out.
        direct_map_ranges: the direct map's mappings of guest RAM, in order of kernel address; at most LISTED.
        omitted: entries that were left out of ``aliases`` and of ``direct_map_ranges``.
        physical: where in physical memory the guest's pages are, and what reaches them there.
        sharing: other processes that map them; None if it could not be counted.
        vmm: what the process calls itself.
        partial: why the audit ended early (the process exited, …) and what it counts is a part; empty otherwise.
        time: when it ended, as utc_now says it.
        judged: every page; not part of the JSON.
        oracle: what a second opinion was asked and agreed on; None if nobody was asked.
    """

    pid: int
    process: str
    host: HostFacts
    ram: GuestRam
    pages: PageCounts
    aliases: tuple[Reach, ...]
    mappings: KernelMappings
    levels: int
    scan: ScanResult | None
    verdict: Verdict
    notes: tuple[str, ...]
    seconds: float
    mapped: tuple[tuple[int, int], ...] = ()
    reach: tuple[ReachTotal, ...] = ()
    direct_map_ranges: tuple[Reach, ...] = ()
    omitted: tuple[int, int] = (0, 0)
    physical: PhysicalMap = field(default_factory=PhysicalMap)
    sharing: Sharing | None = None
    vmm: VmmFacts = field(default_factory=VmmFacts)
    partial: str = ""
    time: str = field(default_factory=utc_now)
    judged: Judged | None = field(default=None, repr=False, compare=False)
    oracle: OracleResult | None = None

    @property
    def alias_pages_by_region(self) -> dict[str, int]:
        """Aliased 4 KiB pages, by the name of the region the alias is in (a page counts once for each mapping)."""
        regions: dict[str, int] = {}
        for total in self.reach:
            if total.kind is not Kind.DIRECT_MAP:
                regions[total.region] = regions.get(total.region, 0) + total.pages
        return regions

    @property
    def canaries_found(self) -> int | None:
        """Distinct valid canaries that were read; None without a scan for them."""
        return None if self.scan is None or self.scan.secret_bytes is not None else len(self.scan.found)

    def to_json(self) -> dict[str, Any]:
        """The result in the words of docs/design.md, ready for json.dumps."""
        pages: dict[str, Any] = asdict(self.pages)
        pages["unknown_reasons"] = pages.pop("reasons")
        pages["canaries_found"] = self.canaries_found
        return {
            "schema": SCHEMA,
            "offmap": offmap.__version__,
            "time": self.time,
            "host": self.host.to_json(),
            "pid": self.pid,
            "process": self.process,
            "vmm": self.vmm.to_json(),
            "verdict": self.verdict.value,
            "notes": list(self.notes),
            "partial": self.partial or None,
            "pages": pages,
            "ranges": [
                {
                    "va": f"{part.va:#x}",
                    "bytes": part.bytes,
                    "source": part.source.value,
                    "guest_phys_addr": part.guest_phys_addr,
                    "backend": part.backend,
                }
                for part in self.ram.ranges
            ],
            "reach": [total.to_json() for total in self.reach],
            "aliases": [alias.to_json() for alias in self.aliases],
            "aliases_omitted": self.omitted[0],
            "direct_map_ranges": [direct.to_json() for direct in self.direct_map_ranges],
            "direct_map_ranges_omitted": self.omitted[1],
            "physical": self.physical.to_json(),
            "sharing": None if self.sharing is None else self.sharing.to_json(),
            "mapped_guest_ranges": [list(part) for part in self.mapped],
            "walk": {
                "levels": self.levels,
                "seconds": round(self.mappings.seconds, 4),
                "tables": {str(level): count for level, count in self.mappings.tables.items()},
                "runs": len(self.mappings.runs),
                "direct_map_bytes": self.mappings.direct_bytes(),
                "unreadable": [
                    {"va": f"{span.va:#x}", "bytes": span.bytes, "reason": span.reason}
                    for span in self.mappings.unreadable
                ],
            },
            "scan": None if self.scan is None else self.scan.to_json(),
            "oracle": None if self.oracle is None else self.oracle.to_json(),
            "seconds": round(self.seconds, 4),
        }


def audit_process(
    pid: int,
    *,
    scan: Wanted | None = None,
    ranges: Sequence[RamRange] | None = None,
    progress: Progress | None = None,
    sharers: bool = False,
    threads: int | None = None,
    oracle: Sample | None = None,
) -> AuditResult:
    """Find which pages of a process's guest RAM the host kernel has mapped.

    The process is neither stopped nor written to. One that ends meanwhile leaves a result that says so (``partial``),
    and whose verdict is never ``hidden``.

    Args:
        pid: of the VMM.
        scan: if given, also scan all that the kernel has mapped: for canaries of this key, or for this secret.
        ranges: audit these addresses instead of what is found to be guest RAM.
        progress: told how far the audit is.
        sharers: also name the other processes that map the guest's pages.
        threads: how many read at once in a scan; None for ``scan.default_threads``.
        oracle: if given, also ask drgn about such a sample.

    Raises:
        NoSuchProcess: no such process.
        Undetermined: this host does not let the question be answered, or the process ended before anything was seen.
        OracleDisagrees: drgn was asked, and says something else.
    """
    if oracle is not None:
        require_drgn()
    tell: Progress = progress or (lambda stage, share: None)
    with Process(pid) as process:
        for _ in range(_ATTEMPTS):
            with Kcore() as kcore:
                result = _audit(process, kcore, scan, ranges, tell, sharers, threads, oracle)
                if not kcore.changed():
                    return result
    raise Undetermined("memory was hot-plugged or removed during each attempt", "run the audit again")


def _audit(
    process: Process,
    kcore: Kcore,
    scan: Wanted | None,
    ranges: Sequence[RamRange] | None,
    tell: Progress,
    sharers: bool,
    threads: int | None,
    oracle: Sample | None,
) -> AuditResult:
    started = time.monotonic()
    info = kcore.vmcoreinfo
    layout = Layout.of(info, kcore.page_offset_base, kcore.segments)

    def ask_kvm(pid: int, descriptors: Mapping[int, str]) -> Sequence[KvmSlot]:
        return KvmSlots(kcore, layout).of(pid, descriptors)

    with OwnPage() as control:
        tell(Stage.FRAMES, 0.0)
        control.pfn()  # fails here, and loudly, where pagemap hides frames
        process.check_alive()
        ram = GuestRam(tuple(ranges)) if ranges else find_guest_ram(process, ask_kvm)
        name, facts = process.name(), vmm_facts(process)
        before = resolve(process, ram.ranges, kcore.page_flags)
        tell(Stage.WALK, 0.0)
        mappings = walk_kernel_half(kcore, info.root_pa, info.levels, kcore.page_offset_base, info.sme_mask)
        kinds = kinds_of(mappings, layout, read_vmallocinfo())
        check_control(control, kcore, mappings)
        after = resolve(process, ram.ranges, kcore.page_flags)
    judged = classify(before, after, excluded_ranges(ram), mappings, kinds)
    moved, partial = _slots_moved(process, ram, None if ranges else ask_kvm)
    partial = before.ended or after.ended or partial
    sharing, unshared = _sharing(process, ram, judged, sharers, partial)
    tell(Stage.WALK, 1.0)
    scanned = None
    if scan is not None:
        devices = sorted({*before.device_ranges, *after.device_ranges})
        scanned = scan_memory(
            kcore,
            mappings,
            layout,
            scan,
            _guest_pages(judged, ram),
            devices,
            lambda share: tell(Stage.SCAN, share),
            threads,
        )
    opinion = None
    if oracle is not None and not partial:
        tell(Stage.ORACLE, 0.0)
        opinion = second_opinion(process, kcore, mappings, layout, _guest_pages(judged, ram), oracle)
    pages = judged.counts()
    joined = join(judged, mappings, kinds, layout, ram)
    _log.debug("walked %d tables in %.2f s: %s", sum(mappings.tables.values()), mappings.seconds, pages)
    verdict, notes = _judge(pages, ram, scanned, moved, partial)
    notes = (*notes, *unshared)
    if partial:
        seen = classify(before, before, excluded_ranges(ram), mappings, kinds).counts()
        if seen.pages_populated and not pages.pages_populated:
            notes = (
                *notes,
                f"before that, {seen.pages_populated} pages of it were seen; the walk found mappings of "
                f"{seen.mapped_pages} of these frames, which may have been somebody else's by then",
            )
    if any(total.kind is Kind.VMALLOC_SPACE and not total.caller for total in joined.reach) and not kinds.named:
        notes = (
            *notes,
            "what maps pages in the vmalloc space is not told: /proc/vmallocinfo shows addresses while "
            "sysctl kernel.kptr_restrict is 1",
        )
    return AuditResult(
        pid=process.pid,
        process=name,
        host=host_facts(),
        ram=ram,
        pages=pages,
        aliases=joined.aliases,
        mapped=tuple(mapped_guest_ranges(judged, ram)),
        mappings=mappings,
        levels=info.levels,
        scan=scanned,
        verdict=verdict,
        notes=notes,
        seconds=time.monotonic() - started,
        reach=joined.reach,
        direct_map_ranges=joined.direct_map_ranges,
        omitted=joined.omitted,
        physical=physical_map(judged, kcore.ram),
        sharing=sharing,
        vmm=facts,
        partial=partial,
        judged=judged,
        oracle=opinion,
    )


def _slots_moved(process: Process, ram: GuestRam, ask_kvm: AskKvm | None) -> tuple[bool, str]:
    """Whether the memory slots are others than at the start (those were not looked at), or how the process ended.

    Args:
        ask_kvm: None where the ranges were asked for, and slots do not matter.
    """
    try:
        process.check_alive()
        return ask_kvm is not None and not ram.guessed and find_guest_ram(process, ask_kvm) != ram, ""
    except ProcessEnded as ended:
        return False, ended.reason


def _sharing(
    process: Process, ram: GuestRam, judged: Judged, named: bool, partial: str
) -> tuple[Sharing | None, tuple[str, ...]]:
    if partial:
        return None, ()
    try:
        return sharing_of(process, ram, judged, named=named), ()
    except Undetermined as error:
        return None, (f"whether other processes map these pages too cannot be told: {error}",)


def _guest_pages(judged: Judged, ram: GuestRam) -> GuestPages:
    known = judged.known
    return GuestPages.of(judged.page[known], judged.pfn[known], judged.pages[known], ram.ranges)


def _judge(
    pages: PageCounts, ram: GuestRam, scan: ScanResult | None, moved: bool = False, partial: str = ""
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and what must be said beside it."""
    verdict = pages.verdict(ram.guessed)
    notes = []
    if partial and verdict is Verdict.HIDDEN:
        verdict = Verdict.UNKNOWN
    if ram.guessed:
        why = f": {ram.why_guessed}" if ram.why_guessed else ""
        notes.append(
            f"the ranges are guesses (large mappings of a process with a KVM VM){why}; --range names them for sure"
        )
    elif ram.why_guessed:
        notes.append(f"that the VMM's list leaves no memory out was not checked with KVM's: {ram.why_guessed}")
    if any(part.source is Source.REQUESTED for part in ram.ranges):
        notes.append("only what --range names was judged; whether the guest has more RAM was not looked at")
    if ram.omitted_bytes:
        notes.append(f"{format_size(ram.omitted_bytes)} that the VMM's list leaves out, and KVM has, are judged too")
    if ram.read_only_bytes:
        notes.append(f"{format_size(ram.read_only_bytes)} that the guest cannot write to (firmware) is not judged")
    if ram.unseen_guest_memfd:
        notes.append("the process holds guest_memfd memory that is not mapped, so its pages cannot be found")
        if verdict is Verdict.HIDDEN:
            verdict = Verdict.UNKNOWN
    if moved:
        notes.append("the process changed its memory slots during the audit; run it again")
        if verdict is Verdict.HIDDEN:
            verdict = Verdict.UNKNOWN
    if verdict is Verdict.UNKNOWN and not pages.pages_populated and not partial:
        notes.append("no page of the guest's RAM was found populated")
    if verdict is Verdict.HIDDEN and pages.not_populated_pages:
        notes.append(
            f"{pages.not_populated_pages} pages are not populated: whether they will be hidden is known once they are"
        )
    if pages.excluded_direct_pages:
        notes.append(
            f"{pages.excluded_direct_pages} pages that are said to be kept from the guest are in the direct map"
        )
    if pages.excluded_mapped_pages:
        notes.append(f"{pages.excluded_mapped_pages} mapped pages are kept from the guest and do not count")
    if scan is not None:
        elsewhere = sum(not any(place.in_guest for place in places) for places in scan.found.values())
        if elsewhere:
            notes.append(f"{elsewhere} canaries were read outside the guest's own pages only: copies")
        copies = sum(not place.in_guest for place in scan.findings)
        if copies:
            notes.append(f"the secret was read in {copies} places outside the guest's own pages: copies")
        if any(place.source for place in scan.places):
            notes.append("the file that the secret was read from stands in the page cache, which is not counted")
        if (scan.found or scan.findings) and verdict is not Verdict.EXPOSED:
            # A planted secret was read: whatever the page tables say, it is not hidden.
            verdict = Verdict.EXPOSED
        if scan.frames_unread:
            notes.append(f"{scan.frames_unread} mapped pages of RAM were not scanned: /proc/kcore cannot read them")
    return verdict, tuple(notes)
