"""``--oracle drgn``: does drgn translate a random sample of addresses to the same frames as our walk?

The sample is drawn from all guest pages whose frames are known. drgn is asked:

- the frame: the page's address in the process must lead to the frame that the audit judged;
- every kernel address that the walk says the frame is mapped at must lead to it;
- its address in the direct map, and in the kernel image if the frame lies in that range, must lead nowhere if the walk
  says so.

And of addresses drawn from the whole kernel half: one in a run must lead where the run says; one in a gap between runs,
and those next to runs, must lead nowhere.

What it cannot check: that no *other* address leads to a page. Single translations cannot show that; the gaps are a
sample of it. Both read the same /proc/kcore, and ``page_offset_base`` is ours.

The kernel works on meanwhile. So where the two differ, our own code looks the page up and walks the tables again, and
both are asked again. What differs three times is a disagreement.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from offmap.audit.btf import Unknown, host_types
from offmap.audit.drgn_kernel import DrgnKernel
from offmap.audit.frames import POPULATED, resolve
from offmap.audit.guest_pages import GuestPages
from offmap.audit.guest_ram import RamRange
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.mappings import KernelMappings
from offmap.audit.process import Process
from offmap.audit.regions import Layout
from offmap.audit.result import OracleResult, Source
from offmap.audit.roots import walk_kcore
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.audit.walk import REFERENCES
from offmap.errors import OffmapError
from offmap.uapi.page import PAGE_SIZE

DEFAULT_PAGES = 256
_ATTEMPTS = 3


class OracleDisagrees(OffmapError):
    """drgn says something else: nothing that this audit says can be relied on."""


@dataclass(frozen=True)
class Sample:
    """How many guest pages, runs and gaps to ask about. The same seed draws the same; None is a fresh one."""

    pages: int = DEFAULT_PAGES
    seed: int | None = None


class Oracle(Protocol):
    """Translates addresses to physical ones, None for none, as DrgnKernel does."""

    version: str

    def kernel(self, va: int) -> int | None:
        """The physical address behind a kernel address."""
        ...

    def process(self, pgd: int, va: int) -> int | None:
        """The physical address behind an address of the process with this top page table."""
        ...


class _Question(NamedTuple):
    """A kernel address, and why it is asked for."""

    va: int
    why: str


@dataclass
class Lookups:
    """Where our own answers come from; asked anew where the oracle's differ.

    Attributes:
        frame: of a guest page, by its address in the process; None if it has none (any more).
        walk: the kernel's mappings now.
        pgd: kernel address of the process's top page table; 0 if it cannot be told.
        phys_base, image_bytes: of the kernel image (VMCOREINFO).
    """

    frame: Callable[[int], int | None]
    walk: Callable[[], KernelMappings]
    pgd: int
    phys_base: int
    image_bytes: int


def translate(mappings: KernelMappings, va: int) -> int | None:
    """Physical address behind a kernel address as the walk has it; None for none."""
    runs = mappings.main
    index = int(np.searchsorted(runs["va"], np.uint64(va), side="right")) - 1
    if index < 0:
        return None
    start, size = int(runs["va"][index]), int(runs["bytes"][index])
    return int(runs["pa"][index]) + va - start if va < start + size else None


def draw_pages(guest: GuestPages, count: int, draw: random.Random) -> list[tuple[int, int]]:
    """(address in the process, frame) of up to ``count`` different pages, each page as likely as any other."""
    ends = np.cumsum(guest.pages)
    total = int(ends[-1]) if len(ends) else 0
    chosen = []
    for number in sorted(draw.sample(range(total), min(count, total))):
        run = int(np.searchsorted(ends, number, side="right"))
        within = number - (int(ends[run]) - int(guest.pages[run]))
        chosen.append((int(guest.va[run]) + within * PAGE_SIZE, int(guest.pfn[run]) + within))
    return chosen


def draw_addresses(mappings: KernelMappings, count: int, draw: random.Random) -> Iterator[_Question]:
    """Kernel addresses: of ``count`` runs one within and both next to it, and of as many gaps one within."""
    runs = mappings.main
    for _ in range(count if len(runs) else 0):
        index = draw.randrange(len(runs))
        va, pages = int(runs["va"][index]), int(runs["bytes"][index]) // PAGE_SIZE
        after = va + pages * PAGE_SIZE
        yield _Question(va + draw.randrange(pages) * PAGE_SIZE, "an address that the walk found mapped")
        for beside in (va - PAGE_SIZE, after):
            if beside < 1 << 64:
                yield _Question(beside, "the page next to a mapping")
        gap = (int(runs["va"][index + 1]) if index + 1 < len(runs) else 1 << 64) - after
        if gap >= PAGE_SIZE:
            yield _Question(after + draw.randrange(gap // PAGE_SIZE) * PAGE_SIZE, "an address between mappings")


def ask_drgn(
    process: Process, kcore: Kcore, mappings: KernelMappings, layout: Layout, guest: GuestPages, sample: Sample
) -> OracleResult:
    """Ask drgn about a sample of what was found.

    Raises:
        OracleDisagrees: it says something else.
        OffmapError: drgn is not installed.
        Undetermined: it cannot look at this kernel.
    """

    def frame(va: int) -> int | None:
        found = resolve(process, [RamRange(va, PAGE_SIZE, Source.REQUESTED)], kcore.page_flags)
        return int(found.pfn[0]) if found.state[0] == POPULATED else None

    top, info = 0, kcore.vmcoreinfo
    with suppress(Unknown):
        top = KernelObjects(kcore, layout, host_types()).page_table_of(process.pid)
    lookups = Lookups(frame, lambda: walk_kcore(kcore), top, info.phys_base, info.kernel_image_size)
    return ask_oracle(DrgnKernel(), mappings, guest, lookups, sample)


def ask_oracle(
    oracle: Oracle, mappings: KernelMappings, guest: GuestPages, lookups: Lookups, sample: Sample
) -> OracleResult:
    """Ask about a random sample.

    Args:
        mappings: what the walk found.
        guest: pages whose frames are known.
        lookups: where our own answers come from.

    Raises:
        OracleDisagrees: on the first page or address on which the two differ.
        Undetermined: the oracle cannot tell.
    """
    started = time.monotonic()
    seed = random.SystemRandom().randrange(1 << 32) if sample.seed is None else sample.seed
    draw = random.Random(seed)
    asked = _Answers(oracle, mappings, lookups)
    chosen = draw_pages(guest, sample.pages, draw)
    for va, frame in chosen:
        known = asked.frame(va, frame)
        if known is not None:
            asked.page(va, known)
    for question in draw_addresses(mappings, sample.pages, draw):
        asked.address(question)
    return OracleResult(
        name="drgn",
        version=oracle.version,
        seed=seed,
        pages=len(chosen),
        addresses=asked.count["mapped"] + asked.count["unmapped"],
        **{name: asked.count[name] for name in ("frames_agreed", "frames_unasked", "mapped", "unmapped", "retried")},
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass
class _Answers:
    """What was agreed on so far."""

    oracle: Oracle
    mappings: KernelMappings
    lookups: Lookups
    count: Counter[str] = field(default_factory=Counter)

    def frame(self, va: int, frame: int) -> int | None:
        """Compare the frame behind the process's page; the frame, None if there is none now."""
        ours: int | None = frame
        for attempt in range(_ATTEMPTS):
            theirs = self.oracle.process(self.lookups.pgd, va) if self.lookups.pgd else None
            if theirs is None:
                # Not in the process's own page tables (its file has the page), or marked for NUMA balancing: an entry
                # without the present bit, whose frame pagemap tells all the same.
                self.count["frames_unasked"] += 1
                return ours
            if ours is not None and theirs == ours * PAGE_SIZE:
                self.count["frames_agreed"] += 1
                return ours
            if attempt < _ATTEMPTS - 1:
                self.count["retried"] += 1
                ours = self.lookups.frame(va)
                if ours is None:
                    return None
        raise _disagreement(
            f"the page at {va:#x} of the process", None if ours is None else ours * PAGE_SIZE, theirs, "its frame"
        )

    def page(self, va: int, frame: int) -> None:
        """Compare all kernel addresses of one guest page."""
        pa = frame * PAGE_SIZE
        name = f"the guest page at {va:#x} of the process (frame {frame:#x})"
        addresses = self.mappings.addresses_of(pa)
        for address in addresses:
            self.address(_Question(address, f"{name}, at an address that the walk found"))
        direct, in_image = self.mappings.direct_map_base + pa, pa - self.lookups.phys_base
        if direct not in addresses:
            self.address(_Question(direct, f"{name}, at its address in the direct map"))
        image = START_KERNEL_MAP + in_image
        if 0 <= in_image < self.lookups.image_bytes and image not in addresses:
            self.address(_Question(image, f"{name}, at its address in the kernel image"))

    def address(self, question: _Question) -> None:
        """Compare what both say of a kernel address."""
        for attempt in range(_ATTEMPTS):
            ours, theirs = translate(self.mappings, question.va), self.oracle.kernel(question.va)
            if ours == theirs:
                self.count["unmapped" if ours is None else "mapped"] += 1
                return
            if self._not_told(question.va, ours, theirs):
                return
            if attempt < _ATTEMPTS - 1:
                self.count["retried"] += 1
                self.mappings = self.lookups.walk()
        raise _disagreement(f"kernel address {question.va:#x}", ours, theirs, question.why)

    def _not_told(self, va: int, ours: int | None, theirs: int | None) -> bool:
        """Whether the walk itself says that it leaves this out: its verdict accounts for that."""
        if any(span.va <= va < span.va + span.bytes for span in self.mappings.unreadable):
            return True
        if ours is not None or theirs is None or not self.mappings.surplus_references:
            return False
        # Of a table with many references only the first are followed; then the page is known at all of these.
        return len(self.mappings.addresses_of(theirs)) >= REFERENCES


def _disagreement(what: str, ours: int | None, theirs: int | None, why: str) -> OracleDisagrees:
    def said(pa: int | None) -> str:
        return "not mapped" if pa is None else f"mapped to {pa:#x}"

    return OracleDisagrees(
        f"drgn disagrees on {what} ({why}): it says {said(theirs)}, the audit says {said(ours)}",
        "rely on nothing that this audit says, and report both versions and the kernel's",
    )
