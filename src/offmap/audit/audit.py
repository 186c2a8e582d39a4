"""One audit of one process, from its PID to a verdict."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TypedDict, Unpack

import msgspec

import offmap
from offmap.audit.btf import Unknown
from offmap.audit.classify import (
    CAME,
    Classified,
    ReachSets,
    classify,
    excluded_ranges,
    mapped_guest_ranges,
    reach_sets,
)
from offmap.audit.drgn_kernel import require_drgn
from offmap.audit.frames import resolve
from offmap.audit.guest_pages import GuestPages
from offmap.audit.guest_ram import GuestRam, RamRange, ask_kvm_list, find_guest_ram
from offmap.audit.host import HostFacts, host_facts, utc_now
from offmap.audit.join import join, physical_map
from offmap.audit.judge import judge
from offmap.audit.kcore import Kcore
from offmap.audit.kinds import Kinds, kinds_of, read_vmallocinfo
from offmap.audit.kvm_list import KvmList, Vm
from offmap.audit.kvm_moment import Moment
from offmap.audit.looks import (
    kvm_list_of,
    look_again,
    mapped_read_only,
    moment_of,
    shared_with,
    vms_under,
    what_changed,
)
from offmap.audit.mappings import KernelMappings
from offmap.audit.oracle import OracleDisagrees, Sample, ask_drgn
from offmap.audit.own_memory import OwnPage, check_control
from offmap.audit.process import NoSuchProcess, Process
from offmap.audit.reach import Kind, Reach
from offmap.audit.regions import Layout
from offmap.audit.result import AuditedRange, AuditResult
from offmap.audit.roots import walker_of
from offmap.audit.scan import Wanted, scan_memory
from offmap.audit.seen import SeenVm
from offmap.audit.verdict import Verdict
from offmap.audit.vmm_sandbox import vmm_sandbox
from offmap.audit.vms import vmm_facts
from offmap.audit.walks import SECONDS, Walked, walk_for
from offmap.errors import OffmapError, Undetermined
from offmap.log import Logger
from offmap.report.typed import Address

_log = Logger("offmap.audit")

_ATTEMPTS = 5  # memory hot-plugged in mid-audit changes kcore's segments
_MORE_LOOKS = 2  # at a VM whose guest took more memory meanwhile


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
        growing: all that stands against hidden is that pages came during the audit.
    """

    audit: AuditResult
    ram: GuestRam
    mappings: KernelMappings = field(repr=False)
    judged: Classified = field(repr=False)
    growing: bool = False

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
        seconds: over how long the page tables are walked again and again, ``walks.SECONDS`` unless given; 0 for one
            walk, which says nothing of a mapping that moves.
        since: no slot may have been replaced and no VM made since this moment (CLOCK_MONOTONIC, nanoseconds); None for
            this call's begin.
        seen: what an earlier audit saw of the VMs: memory under their slots that was exchanged since does not count as
            hidden. Without it, since they were made.
    """

    scan: Wanted | None
    ranges: Sequence[RamRange] | None
    progress: Progress | None
    sharers: bool
    threads: int | None
    oracle: Sample | None
    since: int | None
    seen: Sequence[SeenVm]
    seconds: float


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
    found = snapshot_processes([pid], **options)[pid]
    if isinstance(found, OffmapError):
        raise found
    return found


def snapshot_processes(pids: Sequence[int], **options: Unpack[Options]) -> dict[int, Snapshot | OffmapError]:
    """The same of many processes, with the same walks for all; for each the snapshot, or why there is none.

    Raises:
        Undetermined: this host does not let the question be answered.
        OracleDisagrees: drgn was asked, and says something else.
    """
    if options.get("oracle") is not None:
        require_drgn()
    if options.get("since") is None:
        options["since"] = time.monotonic_ns()
    found: dict[int, Snapshot | OffmapError] = {}
    with ExitStack() as stack:
        processes = []
        for pid in pids:
            try:
                processes.append(stack.enter_context(Process(pid)))
            except (NoSuchProcess, Undetermined) as error:
                found[pid] = error
        more_looks = 0 if options.get("scan") is not None else _MORE_LOOKS
        for _ in range(_ATTEMPTS):
            with Kcore() as kcore:
                found |= _snapshots(processes, kcore, options)
                if kcore.changed():
                    continue
            growing = {pid for pid, each in found.items() if isinstance(each, Snapshot) and each.growing}
            processes = [each for each in processes if each.pid in growing]
            if not processes or not more_looks:
                return found
            more_looks -= 1
        why = Undetermined("memory was hot-plugged or removed during each attempt", "run the audit again")
    return found | {process.pid: why for process in processes}


def _snapshots(processes: Sequence[Process], kcore: Kcore, options: Options) -> dict[int, Snapshot | OffmapError]:
    """One attempt: where the pages of each are, then the walks, then the same again."""
    tell: Progress = options.get("progress") or (lambda stage, share: None)
    layout = Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments)
    kvm, unlisted = kvm_list_of(kcore, layout)
    found: dict[int, Snapshot | OffmapError] = {}
    subjects = [_Subject(process, kcore, layout, kvm, unlisted, options) for process in processes]

    def each(step: Callable[[_Subject], None]) -> None:
        for subject in list(subjects):
            try:
                step(subject)
            except OracleDisagrees:
                raise
            except OffmapError as error:
                found[subject.process.pid] = error
                subjects.remove(subject)

    with OwnPage() as control:
        tell(Stage.FRAMES, 0.0)
        control.pfn()  # fails here, and loudly, where pagemap hides frames
        moment = moment_of(kvm, len(subjects))
        each(lambda subject: subject.begin(moment))
        tell(Stage.WALK, 0.0)
        walked = walk_for(
            walker_of(kcore, layout),
            options.get("seconds", SECONDS),
            lambda mappings: all(subject.seen_by(mappings) for subject in subjects),
            lambda share: tell(Stage.WALK, share),
        )
        kinds = kinds_of(walked.mappings, layout, read_vmallocinfo())
        check_control(control, kcore.read_virtual, walked.mappings)
        reach = reach_sets(walked.mappings, kinds)
        each(lambda subject: subject.end(walked, kinds, reach))
        moment = moment_of(kvm, len(subjects))  # after all that was read of any
        each(lambda subject: subject.look_again(moment))
    tell(Stage.WALK, 1.0)
    host = host_facts()
    each(lambda subject: found.update({subject.process.pid: subject.result(walked, kinds, host, tell)}))
    return found


class _Subject:
    """One process of an attempt."""

    def __init__(
        self,
        process: Process,
        kcore: Kcore,
        layout: Layout,
        kvm: KvmList | None,
        unlisted: str,
        options: Options,
    ) -> None:
        self.process, self._kcore, self._layout, self._kvm, self._unlisted = process, kcore, layout, kvm, unlisted
        self._options, self._started = options, time.monotonic()
        self._guest_memfd = None if kvm is None else kvm.guest_memfd_pages

    def _ask_kvm(self, moment: Moment | None, process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
        if self._kvm is None:
            raise Unknown(self._unlisted)
        return ask_kvm_list(self._kvm, process, links) if moment is None else moment.ask(process, links)

    def _find(self, moment: Moment | None) -> GuestRam:
        """What was asked for, with the VMs that have it; or what the process has."""
        ask = partial(self._ask_kvm, moment)
        if ranges := self._options.get("ranges"):
            vms, unlisted = vms_under(ranges, self.process, ask)
            # A kernel that tells it of no process is no doubt about this one; a list that it can make unreadable is.
            return GuestRam(tuple(ranges), vms, unlisted="" if self._kvm is None else unlisted)
        return find_guest_ram(self.process, ask)

    def begin(self, moment: Moment | None) -> None:
        """Find the guest's RAM and its frames, before the walks."""
        process = self.process
        process.check_alive()
        self._ram = self._find(moment)
        self._name = process.name()
        asked = bool(self._options.get("ranges"))
        self._facts = vmm_facts(process, vms=None if asked or self._ram.unlisted else self._ram.vms)
        self._excluded = excluded_ranges(self._ram)
        self._before = resolve(process, self._ram.ranges, self._kcore.page_flags, self._guest_memfd)

    def seen_by(self, mappings: KernelMappings) -> bool:
        """Whether these map a page of it: then more walks have nothing to add."""
        return bool(classify(self._before, self._before, self._excluded, mappings).counts().mapped_pages)

    def end(self, walked: Walked, kinds: Kinds, reach: ReachSets) -> None:
        """Look at the frames again, after the walks, and judge each page."""
        process, ram = self.process, self._ram
        self._after = resolve(process, ram.ranges, self._kcore.page_flags, self._guest_memfd)
        self._judged = classify(self._before, self._after, self._excluded, walked.mappings, kinds, reach)
        self._read_only = mapped_read_only(process, ram, self._kcore, walked.mappings, self._guest_memfd)

    def look_again(self, moment: Moment | None) -> None:
        """Ask KVM again, once everything was looked at."""
        find = partial(self._find, moment)
        self._ram, self._moved, ended = look_again(self.process, self._ram, self._kvm, find)
        since = self._options.get("since") or 0
        self._made = self._ram.made_since(since) and (self._kvm is None or self._kvm.ended_since(since))
        self._partial = self._before.ended or self._after.ended or ended

    def result(self, walked: Walked, kinds: Kinds, host: HostFacts, tell: Progress) -> Snapshot:
        """The published result. Raises Undetermined: it cannot be told."""
        ram, judged, mappings, kcore, layout = self._ram, self._judged, walked.mappings, self._kcore, self._layout
        ended, options = self._partial, self._options
        sharing, unshared = shared_with(self.process, ram, judged, kcore, options.get("sharers", False), ended)
        known = judged.known
        guest = GuestPages.of(judged.page[known], judged.pfn[known], judged.pages[known], ram.ranges)
        scan = opinion = None
        if (wanted := options.get("scan")) is not None:
            devices = sorted({*self._before.device_ranges, *self._after.device_ranges})
            threads = options.get("threads")
            scan = scan_memory(kcore, mappings, layout, wanted, guest, devices, lambda s: tell(Stage.SCAN, s), threads)
        if (sample := options.get("oracle")) is not None and not ended:
            tell(Stage.ORACLE, 0.0)
            opinion = ask_drgn(self.process, kcore, mappings, layout, guest, sample)
        pages = judged.counts()
        joined = join(judged, mappings, kinds, layout, ram)
        _log.debug("walked %d tables in %.2f s: %s", sum(mappings.tables.values()), mappings.seconds, pages)
        changed = what_changed(
            ram,
            options.get("seen", ()),
            options.get("since") or 0,
            moved=self._moved,
            made=self._made,
            named=bool(options.get("ranges")),
        )
        verdict, notes = judge(pages, ram, scan, ended, judged.plain, self._read_only, changed)
        notes += unshared
        if ended:
            seen = classify(self._before, self._before, self._excluded, mappings, kinds).counts()
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
            host=host,
            pid=self.process.pid,
            process=self._name,
            vmm=self._facts,
            verdict=verdict,
            notes=notes,
            partial=ended or None,
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
            kvm_clock_pages=ram.clock_pages,
            walk=mappings.facts(kcore.vmcoreinfo.levels),
            coverage=walked.coverage(),
            scan=scan,
            oracle=opinion,
            sandbox=vmm_sandbox(self.process),
            seconds=round(time.monotonic() - self._started, 4),
        )
        growing = verdict is Verdict.UNKNOWN and set(pages.unknown_reasons) == {CAME}
        return Snapshot(audit, ram, mappings, judged, growing and not (ended or changed))
