"""Which of the traced mappings are of guest pages, and how long each lived."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from offmap.audit.guest_pages import GuestPages
from offmap.audit.trace.events import Event
from offmap.audit.trace.probes import ARRAYS, BY_EVENT, LISTED_PAGES, Role
from offmap.audit.trace.result import TracedMapping
from offmap.report.typed import Address, plain
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_STRUCT_PAGE = 64  # sizeof(struct page), include/linux/mm_types.h; the positive control would show another one
_MOST_KEPT = 1 << 16  # mappings that wait for the frames of the next walk


@dataclass
class Made:
    """A mapping.

    Attributes:
        event: that made it.
        spans: first frame and number of frames of each stretch.
        va: kernel address; 0 if that is not told.
        since_us, until_us: on the monotonic clock; until_us is None while it is there.
        endless: its end is not traced.
        match: first guest frame that it maps, number of them, and where the guest has it; None if it maps none.
        old: it was there at an earlier walk.
        told: it was reported.
    """

    event: Event
    spans: list[tuple[int, int]]
    va: int = 0
    since_us: int = 0
    until_us: int | None = None
    endless: bool = False
    match: tuple[int, int, int | None] | None = None
    old: bool = False
    told: bool = False


@dataclass
class Judge:
    """Takes events in their order, and says what they mean for one process's guest.

    Attributes:
        pid: of the process.
        vmemmap: address of frame 0's struct page.
        direct_map: address of frame 0 in the direct map.
        init_mm: address of the kernel's own mm; 0 if it is not known.
        count: mappings that were made, of whatever memory.
        ended_us: when the process's memory went; None as long as it is there.
        has_memory: says whether the process has memory now. A process can be made to end another's memory.
        vms: kernel addresses of its VMs (``struct kvm``), as far as they are known.
    """

    pid: int
    vmemmap: int
    direct_map: int
    init_mm: int = 0
    count: int = 0
    ended_us: int | None = None
    has_memory: Callable[[], bool] = lambda: False
    guest: GuestPages = field(default_factory=GuestPages.none)
    vms: frozenset[int] = frozenset()
    _begun: dict[int, list[Made]] = field(default_factory=dict)
    _open: dict[int, Made] = field(default_factory=dict)
    _kept: list[Made] = field(default_factory=list)
    _doubts: dict[str, int] = field(default_factory=dict)

    def doubt(self, reason: str, times: int = 1) -> None:
        """Note why the present stretch of time is undetermined."""
        self._doubts[reason] = self._doubts.get(reason, 0) + times

    def take_doubts(self) -> tuple[str, ...]:
        """Why the stretch since the last call is undetermined."""
        found = tuple(f"{reason} ({times} times)" if times > 1 else reason for reason, times in self._doubts.items())
        self._doubts = {}
        return found

    def feed(self, events: Iterable[Event]) -> None:
        """Take these events."""
        for event in events:
            probe = BY_EVENT.get(event.name)
            # What is done with the memory of a VM that has ended, like clearing it, exposes nothing of a running guest.
            if probe is not None and self.ended_us is None:
                self._take(event, probe.role)

    def _take(self, event: Event, role: Role) -> None:
        if role is Role.EXIT:
            if event.tgid == self.pid and not self.has_memory():
                self.ended_us = event.time_us
        elif role is Role.SLOTS:
            # Another process that shares its memory (CLONE_VM) can change the slots of its VMs too.
            if event.tgid in {self.pid, 0} or event.number("kvm") in self.vms:
                self.doubt("the memory slots of its VM were changed")
        elif role is Role.GONE:
            if (va := event.number("va")) is not None and (made := self._open.pop(va, None)):
                made.until_us = event.time_us
        elif role is Role.RETURN:
            self._returned(event)
        elif role is Role.BLIND:
            self._blind(event)
        else:
            self._made(event, role)

    def _blind(self, event: Event) -> None:
        # Only the kernel's own page tables matter, and where vmap_pfn calls it, it was told before.
        mm = event.number("mm")
        if mm is not None and self.init_mm and mm != self.init_mm:
            return
        self.count += 1
        self.doubt(f"{event.name} mapped memory, and which is not told")

    def _made(self, event: Event, role: Role) -> None:
        if event.number("on") == 0:
            return
        self.count += 1
        spans = self._spans(event, role)
        if spans is None:
            # Its pages may be the guest's. If some of those that are told are, it is reported all the same.
            self.doubt(f"{event.name} mapped memory, and which is not told")
            spans = []
        made = Made(event, spans, since_us=event.time_us)
        if role is Role.PAGES:
            self._begun.setdefault(event.tid, []).append(made)
        else:
            if role is Role.PHYSICAL:
                made.va = event.number("va") or 0
                if not self._opens(made):
                    self.count -= 1
                    return
            else:
                made.endless = True
                made.va = event.number("va") or 0
            self._keep(made)

    def _returned(self, event: Event) -> None:
        begun = self._begun.get(event.tid)
        if not begun:
            self.doubt(f"{event.name.removesuffix('_ret')} returned, and its call was not seen")
            return
        made = begun.pop()
        if not begun:
            del self._begun[event.tid]
        made.va, made.since_us = event.number("va") or 0, event.time_us
        if made.va and self._opens(made):  # without an address it has failed, and mapped nothing
            self._keep(made)

    def _opens(self, made: Made) -> bool:
        """Record a mapping that was made. Returns False for one that is known: an inner function told of it again."""
        before = self._open.get(made.va)
        if before is not None:
            if (before.event.tid, before.spans) == (made.event.tid, made.spans):
                return False  # one function has called the other
            before.until_us = made.since_us  # its end was not seen
        self._open[made.va] = made
        return True

    def _keep(self, made: Made) -> None:
        if len(self._kept) >= _MOST_KEPT:
            self.doubt("more was mapped than is kept until the next walk")
            return
        self._kept.append(made)

    def _spans(self, event: Event, role: Role) -> list[tuple[int, int]] | None:
        """The frames that an event is about; None if it does not tell all."""
        if role is Role.PAGES:
            return self._array(event)
        count = event.number("n")
        if role is Role.DIRECT:
            frame = self._frame(event.number("page"))
            return None if frame is None else [(frame, 1 if count is None else count)]
        if role is Role.DIRECT_ADDRESS:
            va = event.number("va")
            if va is None or count is None or va < self.direct_map:
                return None
            return [((va - self.direct_map) >> PAGE_SHIFT, count)]
        pa = event.number("pa")
        if pa is None:
            return None
        if role is Role.FIXMAP:
            return [(pa >> PAGE_SHIFT, 1)]
        end, start = event.number("end"), pa if role is Role.DIRECT_RANGE else event.number("va")
        if end is None or start is None or end < start:
            return None
        return [(pa >> PAGE_SHIFT, -(-(end - start) // PAGE_SIZE))]

    def _array(self, event: Event) -> list[tuple[int, int]] | None:
        count = event.number("n")
        if count is None or count > LISTED_PAGES:
            return None
        pointers = [pointer for n in range(ARRAYS) for pointer in event.numbers(f"p{n}")][:count]
        frames = [self._frame(pointer) for pointer in pointers]
        if len(frames) < count:
            return None
        known = [frame for frame in frames if frame is not None]
        return [(frame, 1) for frame in known] if len(known) == count else None

    def _frame(self, page: int | None) -> int | None:
        """The frame of a struct page; None for what is none."""
        offset = -1 if page is None else page - self.vmemmap
        return offset // _STRUCT_PAGE if 0 <= offset < 1 << 46 and offset % _STRUCT_PAGE == 0 else None

    def mapped(self, physical: int) -> bool:
        """Say whether any mapping that is kept was of this frame: for the positive control."""
        return any(first <= physical < first + count for made in self._kept for first, count in made.spans)

    def ended_mappings(self) -> int:
        """How many of the kept mappings have been seen to end: for the positive control."""
        return sum(made.until_us is not None for made in self._kept)

    def unmatched(self) -> int:
        """How many of the kept mappings are not known to be of the guest."""
        return sum(not made.told for made in self._kept)

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def hits(self, final: bool) -> list[TracedMapping]:
        """Mappings of guest pages that were not told yet.

        Args:
            final: also those that have not ended; without it, they wait for their end, which tells how long they lived.
        """
        found = []
        for made in self._kept:
            self._match(made)
            if made.match and not made.told and (final or made.until_us is not None or made.endless):
                made.told = True
                found.append(_told(made, *made.match))
        return found

    def walked(self, guest: GuestPages) -> list[TracedMapping]:
        """Take the frames that a new walk has found, which may have been the guest's for some time.

        What was kept is judged by the frames of both walks, and then forgotten, but for what has not ended. That is
        told if it was there at the walk before too.
        """
        for made in self._kept:
            self._match(made)
        self.guest = guest
        found = self.hits(final=False)
        self._kept = [made for made in self._kept if made.until_us is None and not made.endless]
        for made in self._kept:
            self._match(made)
            if made.old and made.match and not made.told:
                made.told = True
                found.append(_told(made, *made.match))
            made.old = True
        return found

    def _match(self, made: Made) -> None:
        if made.match is None and len(frames := self._guest_frames(made.spans)):
            place = self.guest.find(int(frames[0]))
            made.match = int(frames[0]), len(frames), None if place is None else place[1]

    def _guest_frames(self, spans: Sequence[tuple[int, int]]) -> "np.typing.NDArray[np.int64]":
        """Those of these frames that the guest has, in order."""
        found: list[np.typing.NDArray[np.int64]] = []
        for first, count in spans:
            begin = np.maximum(self.guest.pfn, first)
            end = np.minimum(self.guest.pfn + self.guest.pages, first + count)
            found += [np.arange(begin[at], end[at], dtype=np.int64) for at in np.flatnonzero(begin < end)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _told(made: Made, first: int, pages: int, guest_phys_addr: int | None) -> TracedMapping:
    return TracedMapping(
        event=made.event.name,
        va=Address(made.va),
        pa=Address(first << PAGE_SHIFT),
        pages=pages,
        guest_phys_addr=guest_phys_addr,
        life_us=None if made.until_us is None else max(0, made.until_us - made.since_us),
        task=plain(made.event.task),
        tid=made.event.tid,
        stack=tuple(plain(name) for name in made.event.stack),
    )
