"""One audit of one process, from its PID to a verdict."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import TypedDict, Unpack

import msgspec

import offmap
from offmap.audit.btf import Unknown
from offmap.audit.classify import Classified, classify, excluded_ranges, mapped_guest_ranges
from offmap.audit.drgn_kernel import require_drgn
from offmap.audit.frames import GuestMemfdPages, resolve
from offmap.audit.guest_pages import GuestPages
from offmap.audit.guest_ram import AskKvm, GuestRam, RamRange, ask_kvm_list, find_guest_ram
from offmap.audit.host import host_facts, utc_now
from offmap.audit.join import join, physical_map
from offmap.audit.kcore import Kcore
from offmap.audit.kinds import kinds_of, read_vmallocinfo
from offmap.audit.kvm_list import KvmList, Vm
from offmap.audit.mappings import KernelMappings
from offmap.audit.oracle import Sample, ask_drgn
from offmap.audit.own_memory import OwnPage, check_control
from offmap.audit.process import Process, ProcessEnded
from offmap.audit.reach import Kind, Reach, Sharing
from offmap.audit.regions import Layout
from offmap.audit.result import AuditedRange, AuditResult, Pages, Source
from offmap.audit.roots import walk_kcore
from offmap.audit.scan import Wanted, scan_memory
from offmap.audit.scan_result import Scan
from offmap.audit.sharers import sharing_of
from offmap.audit.verdict import Verdict
from offmap.audit.vms import vmm_facts
from offmap.errors import Undetermined
from offmap.log import Logger
from offmap.report.typed import Address
from offmap.units import format_size

_log = Logger("offmap.audit")

_ROM = 16  # a guest has this many times as much RAM as ROM, at least
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
class Snapshot:
    """An audit, and what a later one is compared with.

    Attributes:
        audit: the published result.
        ram: the ranges that were audited.
        mappings: all kernel mappings that the walk found.
        judged: every page of the ranges.
    """

    audit: AuditResult
    ram: GuestRam
    mappings: KernelMappings = field(repr=False)
    judged: Classified = field(repr=False)

    def aliases_of(self, pa: int, size: int) -> list[Reach]:
        """The listed aliases that lie at least in part in these physical addresses."""
        return [alias for alias in self.audit.aliases if alias.pa < pa + size and pa < alias.pa + alias.bytes]


class Options(TypedDict, total=False):
    """What ``snapshot_process`` can be asked for besides the verdict.

    Attributes:
        scan: also scan all that the kernel has mapped, for canaries of this key or for this secret.
        ranges: audit these addresses instead of what is found to be guest RAM.
        progress: told how far the audit is.
        sharers: also name the other processes that map the guest's pages.
        threads: how many threads read in a scan; None for ``scan.default_threads``.
        oracle: also compare a sample of this size with what drgn says.
        since: no slot may have been replaced since this moment (CLOCK_MONOTONIC, nanoseconds); None for this call's
            begin.
    """

    scan: Wanted | None
    ranges: Sequence[RamRange] | None
    progress: Progress | None
    sharers: bool
    threads: int | None
    oracle: Sample | None
    since: int | None


def audit_process(pid: int, **options: Unpack[Options]) -> AuditResult:
    """The published part of ``snapshot_process``."""
    return snapshot_process(pid, **options).audit


def snapshot_process(pid: int, **options: Unpack[Options]) -> Snapshot:
    """Find which pages of a process's guest RAM the host kernel has mapped.

    The process is neither stopped nor written to. If it ends meanwhile, the result says so (``partial``), and its
    verdict is never ``hidden``.

    Args:
        pid: of the VMM.

    Raises:
        NoSuchProcess: no such process.
        Undetermined: this host does not let the question be answered, or the process ended before anything was seen.
        OracleDisagrees: drgn was asked, and says something else.
    """
    if options.get("oracle") is not None:
        require_drgn()
    if options.get("since") is None:
        options["since"] = time.monotonic_ns()
    with Process(pid) as process:
        for _ in range(_ATTEMPTS):
            with Kcore() as kcore:
                snapshot = _snapshot(process, kcore, options)
                if not kcore.changed():
                    return snapshot
    raise Undetermined("memory was hot-plugged or removed during each attempt", "run the audit again")


def _snapshot(process: Process, kcore: Kcore, options: Options) -> Snapshot:
    ranges, sample = options.get("ranges"), options.get("oracle")
    tell: Progress = options.get("progress") or (lambda stage, share: None)
    started = time.monotonic()
    layout = Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments)

    kvm, unlisted = _kvm_list(kcore, layout)

    def ask_kvm(process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
        if kvm is None:
            raise Unknown(unlisted)
        return ask_kvm_list(kvm, process, links)

    guest_memfd = None if kvm is None else kvm.guest_memfd_pages
    with OwnPage() as control:
        tell(Stage.FRAMES, 0.0)
        control.pfn()  # fails here, and loudly, where pagemap hides frames
        process.check_alive()
        ram = GuestRam(tuple(ranges)) if ranges else find_guest_ram(process, ask_kvm)
        name, facts = process.name(), vmm_facts(process, vms=None if ranges or ram.unlisted else ram.vms)
        before = resolve(process, ram.ranges, kcore.page_flags, guest_memfd)
        tell(Stage.WALK, 0.0)
        mappings = walk_kcore(kcore)
        kinds = kinds_of(mappings, layout, read_vmallocinfo())
        check_control(control, kcore, mappings)
        after = resolve(process, ram.ranges, kcore.page_flags, guest_memfd)
    excluded = excluded_ranges(ram)
    judged = classify(before, after, excluded, mappings, kinds)
    read_only = _mapped_read_only(process, ram, kcore, mappings, guest_memfd)
    ram, moved, partial = _look_again(process, ram, kvm, None if ranges else ask_kvm)
    partial = before.ended or after.ended or partial
    sharing, unshared = _sharing(process, ram, judged, kcore, options.get("sharers", False), partial)
    tell(Stage.WALK, 1.0)
    known = judged.known
    guest = GuestPages.of(judged.page[known], judged.pfn[known], judged.pages[known], ram.ranges)
    scan = opinion = None
    if (wanted := options.get("scan")) is not None:
        devices = sorted({*before.device_ranges, *after.device_ranges})
        threads = options.get("threads")
        scan = scan_memory(kcore, mappings, layout, wanted, guest, devices, lambda s: tell(Stage.SCAN, s), threads)
    if sample is not None and not partial:
        tell(Stage.ORACLE, 0.0)
        opinion = ask_drgn(process, kcore, mappings, layout, guest, sample)
    pages = judged.counts()
    joined = join(judged, mappings, kinds, layout, ram)
    _log.debug("walked %d tables in %.2f s: %s", sum(mappings.tables.values()), mappings.seconds, pages)
    replaced = ram.replaced_since(options.get("since") or 0)
    verdict, notes = _judge(pages, ram, scan, moved, partial, judged.plain, replaced, read_only)
    notes += unshared
    if partial:
        seen = classify(before, before, excluded, mappings, kinds).counts()
        if seen.pages_populated and not pages.pages_populated:
            notes += (
                f"before that, {seen.pages_populated} pages of it were seen; the walk found mappings of "
                f"{seen.mapped_pages} of these frames, which may have been somebody else's by then",
            )
    if any(total.kind is Kind.VMALLOC_SPACE and not total.caller for total in joined.reach) and not kinds.named:
        notes += (
            "what maps pages in the vmalloc space is not told: /proc/vmallocinfo shows addresses while "
            "sysctl kernel.kptr_restrict is 1",
        )
    audit = AuditResult(
        offmap=offmap.__version__,
        time=utc_now(),
        host=host_facts(),
        pid=process.pid,
        process=name,
        vmm=facts,
        verdict=verdict,
        notes=notes,
        partial=partial or None,
        pages=msgspec.structs.replace(pages, canaries_found=None if scan is None else scan.canaries_found),
        ranges=tuple(
            AuditedRange(Address(part.va), part.bytes, part.source, part.guest_phys_addr, part.backend)
            for part in ram.ranges
        ),
        reach=joined.reach,
        aliases=joined.aliases,
        aliases_omitted=joined.omitted[0],
        direct_map_ranges=joined.direct_map_ranges,
        direct_map_ranges_omitted=joined.omitted[1],
        physical=physical_map(judged, kcore.ram),
        sharing=sharing,
        mapped_guest_ranges=tuple(mapped_guest_ranges(judged, ram)),
        walk=mappings.facts(kcore.vmcoreinfo.levels),
        scan=scan,
        oracle=opinion,
        seconds=round(time.monotonic() - started, 4),
    )
    return Snapshot(audit, ram, mappings, judged)


def _kvm_list(kcore: Kcore, layout: Layout) -> tuple[KvmList | None, str]:
    """KVM's list of VMs, or why it cannot be read here."""
    try:
        return KvmList(kcore, layout), ""
    except Unknown as error:
        return None, str(error)


def _look_again(
    process: Process, ram: GuestRam, kvm: KvmList | None, ask_kvm: AskKvm | None
) -> tuple[GuestRam, bool, str]:
    """What KVM says at the end too, whether the slots or the memory under them changed, and how the process ended.

    Args:
        ask_kvm: None where the ranges were asked for, and slots do not matter.
    """
    try:
        process.check_alive()
        if ask_kvm is None or ram.guessed:
            return ram, False, ""
        moved = kvm is not None and any(kvm.changed(vm) for vm in ram.vms)
        again = find_guest_ram(process, ask_kvm)
        return replace(ram, vms=(*ram.vms, *again.vms)), moved or again != ram, ""
    except ProcessEnded as ended:
        return ram, False, ended.reason


def _mapped_read_only(
    process: Process, ram: GuestRam, kcore: Kcore, mappings: KernelMappings, guest_memfd: GuestMemfdPages | None
) -> int:
    """How many pages that the guest can only read are mapped, or may be."""
    if not ram.read_only:
        return 0
    frames = resolve(process, ram.read_only, kcore.page_flags, guest_memfd)
    pages = classify(frames, frames, excluded_ranges(GuestRam(())), mappings).counts()
    return pages.ram_pages - pages.pages_populated + pages.mapped_pages


def _sharing(
    process: Process, ram: GuestRam, judged: Classified, kcore: Kcore, named: bool, partial: str
) -> tuple[Sharing | None, tuple[str, ...]]:
    """Who else maps the pages, and a note if that cannot be told."""
    if partial:
        return None, ()
    try:
        return sharing_of(process, ram, judged, kcore.ram, named=named), ()
    except Undetermined as error:
        return None, (f"whether other processes map these pages too cannot be told: {error}",)


def _judge(
    pages: Pages,
    ram: GuestRam,
    scan: Scan | None,
    moved: bool = False,
    partial: str = "",
    plain: Mapping[str, int] = MappingProxyType({}),
    replaced: bool = False,
    mapped_read_only: int = 0,
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and what must be said beside it."""
    verdict = pages.verdict(ram.guessed)
    # Where no slot was ever changed, the guest could never write to what it can only read now. And ROM is small.
    once_writable = mapped_read_only if not ram.intact or mapped_read_only * _ROM > pages.pages_populated else 0
    if verdict is Verdict.HIDDEN and (partial or moved or replaced or ram.unlisted or ram.doubts or once_writable):
        verdict = Verdict.UNKNOWN
    why = f": {ram.unlisted}" if ram.unlisted else ""
    unchecked = f": {ram.why_unchecked}" if ram.why_unchecked else ""
    read_only = format_size(sum(part.bytes for part in ram.read_only))
    candidates = {
        **{
            f"{count} pages are not populated, and the kernel maps them when they are: {memory}": (
                verdict is not Verdict.EXPOSED
            )
            for memory, count in plain.items()
        },
        "the ranges are guesses (large mappings of a process with a KVM VM)"
        f"{why}; --range names them for sure": ram.guessed,
        f"KVM's own list of VMs could not be read, so that memory may be missing{why}": why and not ram.guessed,
        f"that the VMM's list leaves no memory out was not checked with KVM's{unchecked}": unchecked,
        **dict.fromkeys(ram.doubts, True),
        "only what --range names was judged; whether the guest has more RAM was not looked at": any(
            part.source is Source.REQUESTED for part in ram.ranges
        ),
        f"{format_size(ram.omitted_bytes)} that the VMM's list leaves out, and KVM has, are judged too": (
            ram.omitted_bytes
        ),
        f"{read_only} that the guest cannot write to (firmware, registers) is not judged: it never could, as no memory "
        "slot of its VM was ever changed": ram.read_only and ram.intact and not once_writable,
        f"{read_only} that the guest cannot write to (firmware, registers) is not judged": (
            ram.read_only and not ram.intact and not once_writable
        ),
        f"{once_writable} pages that the guest cannot write to are mapped or cannot be found, and they may be its RAM: "
        "memory slots of its VM were changed, or they are too many for firmware; --range names RAM for sure": (
            once_writable
        ),
        "the process changed its memory slots, or the memory under them, during the audit; run it again": moved,
        "memory slots were changed, or devices added, since the audit was started; run it again": replaced,
        "no page of the guest's RAM was found populated": (
            verdict is Verdict.UNKNOWN and not pages.pages_populated and not partial
        ),
        f"{pages.not_populated_pages} pages are not populated: whether they will be hidden is known once they are": (
            verdict is Verdict.HIDDEN and pages.not_populated_pages
        ),
        f"{pages.excluded_direct_pages} pages that are said to be kept from the guest are in the direct map": (
            pages.excluded_direct_pages
        ),
        f"{pages.excluded_mapped_pages} mapped pages are kept from the guest and do not count": (
            pages.excluded_mapped_pages
        ),
    }
    notes = tuple(note for note, applies in candidates.items() if applies)
    if scan is None:
        return verdict, notes
    # A planted secret was read: whatever the page tables say, it is not hidden.
    return Verdict.EXPOSED if scan.found or scan.findings else verdict, notes + _scan_notes(scan)


def _scan_notes(scan: Scan) -> tuple[str, ...]:
    elsewhere = sum(not any(place.in_guest for place in hit.places) for hit in scan.found)
    copies = sum(not place.in_guest for place in scan.findings)
    candidates = {
        f"{elsewhere} canaries were read outside the guest's own pages only: copies": elsewhere,
        f"the secret was read in {copies} places outside the guest's own pages: copies": copies,
        "the file that the secret was read from stands in the page cache, which is not counted": any(
            place.source for place in scan.places
        ),
        f"{scan.frames_unread} mapped pages of RAM were not scanned: /proc/kcore cannot read them": scan.frames_unread,
    }
    return tuple(note for note, applies in candidates.items() if applies)
