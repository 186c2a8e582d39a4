"""Compare our walk with drgn's: does drgn translate a random sample of addresses to the same frames?

What is asked, of pages drawn from all guest pages whose frames are known:

- the frame: the page's address in the process must lead to the frame that the audit judged;
- every kernel address that the walk says the frame is mapped at must lead to it;
- its address in the direct map, and in the kernel image if the frame lies in that range, must lead nowhere if the walk
  says so.

And of addresses drawn from the whole kernel half: one in a run must lead where the run says; one in a gap between runs,
and those next to runs, must lead nowhere.

What it cannot check: that no *other* address leads to a page. Nobody can ask that by single translations; that is what
the gaps are drawn for. Both read the same /proc/kcore, and ``page_offset_base`` is ours.

The kernel works on meanwhile. So where the two differ, the page is looked up and the tables are walked anew, by the
same code of ours, and both are asked again; what differs three times over is a disagreement.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from offmap.audit.guest_pages import GuestPages
from offmap.audit.mappings import KernelMappings
from offmap.audit.result import OracleResult
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
    """How much to ask: so many guest pages, runs and gaps. The same seed draws the same; None is a fresh one."""

    pages: int = DEFAULT_PAGES
    seed: int | None = None


class Oracle(Protocol):
    """Translates addresses, as DrgnKernel does."""

    version: str

    def kernel(self, va: int) -> int | None:
        """Physical address behind a kernel address, None for none."""
        ...

    def process(self, pgd: int, va: int) -> int | None:
        """Physical address behind an address of the process with this top page table; None for none."""
        ...


class _Question(NamedTuple):
    """A kernel address, and what it is asked for."""

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
    runs = mappings.runs
    index = int(np.searchsorted(runs["va"], np.uint64(va), side="right")) - 1
    if index < 0:
        return None
    start, size = int(runs["va"][index]), int(runs["bytes"][index])
    return int(runs["pa"][index]) + va - start if va < start + size else None


def addresses_of(mappings: KernelMappings, pa: int) -> list[int]:
    """Every kernel address that the walk has this physical page at."""
    runs, wanted = mappings.runs, np.uint64(pa)
    here = runs[(runs["pa"] <= wanted) & (wanted - runs["pa"] < runs["bytes"])]
    found: list[int] = (here["va"] + (wanted - here["pa"])).tolist()
    return found


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
    runs = mappings.runs
    if not len(runs):
        return
    for _ in range(count):
        run = runs[draw.randrange(len(runs))]
        va, pages = int(run["va"]), int(run["bytes"]) // PAGE_SIZE
        yield _Question(va + draw.randrange(pages) * PAGE_SIZE, "an address that the walk found mapped")
        for beside in (va - PAGE_SIZE, va + pages * PAGE_SIZE):
            if _kernel_half(mappings, beside):
                yield _Question(beside, "the page next to a mapping")
        after = va + pages * PAGE_SIZE
        index = int(np.searchsorted(runs["va"], np.uint64(after), side="left")) if after >> 64 == 0 else len(runs)
        gap = (int(runs["va"][index]) if index < len(runs) else 1 << 64) - after
        if gap >= PAGE_SIZE:
            yield _Question(after + draw.randrange(gap // PAGE_SIZE) * PAGE_SIZE, "an address between mappings")


def _kernel_half(mappings: KernelMappings, va: int) -> bool:
    return int(mappings.runs["va"][0]) - PAGE_SIZE <= va < 1 << 64


def ask_oracle(
    oracle: Oracle,
    mappings: KernelMappings,
    guest: GuestPages,
    lookups: Lookups,
    sample: Sample,
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
    asking = _Asking(oracle, mappings, lookups)
    chosen = draw_pages(guest, sample.pages, draw)
    for va, frame in chosen:
        known = asking.frame(va, frame)
        if known is not None:
            asking.page(va, known)
    for question in draw_addresses(mappings, sample.pages, draw):
        asking.address(question)
    return OracleResult(
        name="drgn",
        version=oracle.version,
        seed=seed,
        pages=len(chosen),
        frames_agreed=asking.frames_agreed,
        frames_unasked=asking.frames_unasked,
        addresses=asking.mapped + asking.unmapped,
        mapped=asking.mapped,
        unmapped=asking.unmapped,
        retried=asking.retried,
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass
class _Asking:
    """The questions of one sample, and what was agreed on so far."""

    oracle: Oracle
    mappings: KernelMappings
    lookups: Lookups
    frames_agreed: int = 0
    frames_unasked: int = 0
    mapped: int = 0
    unmapped: int = 0
    retried: int = 0

    def frame(self, va: int, frame: int) -> int | None:
        """Whether the oracle finds the same frame behind the process's page; the frame, None if there is none now."""
        ours: int | None = frame
        for attempt in range(_ATTEMPTS):
            theirs = self.oracle.process(self.lookups.pgd, va) if self.lookups.pgd else None
            if theirs is None:
                # Not in the process's own page tables (its file has the page), or marked for NUMA balancing: an entry
                # without the present bit, whose frame pagemap tells all the same.
                self.frames_unasked += 1
                return ours
            if ours is not None and theirs == ours * PAGE_SIZE:
                self.frames_agreed += 1
                return ours
            if attempt < _ATTEMPTS - 1:
                self.retried += 1
                ours = self.lookups.frame(va)
                if ours is None:
                    return None
        raise _disagreement(
            f"the page at {va:#x} of the process", None if ours is None else ours * PAGE_SIZE, theirs, "its frame"
        )

    def page(self, va: int, frame: int) -> None:
        """Everything about one guest page's kernel addresses."""
        pa = frame * PAGE_SIZE
        name = f"the guest page at {va:#x} of the process (frame {frame:#x})"
        addresses = addresses_of(self.mappings, pa)
        for address in addresses:
            self.address(_Question(address, f"{name}, at an address that the walk found"))
        direct = self.mappings.direct_map_base + pa
        image = START_KERNEL_MAP + pa - self.lookups.phys_base
        for address, where in ((direct, "its address in the direct map"), (image, "its address in the kernel image")):
            inside = (
                where.endswith("direct map") or START_KERNEL_MAP <= image < START_KERNEL_MAP + self.lookups.image_bytes
            )
            if inside and address not in addresses:
                self.address(_Question(address, f"{name}, at {where}"))

    def address(self, question: _Question) -> None:
        """Whether both say the same of a kernel address."""
        for attempt in range(_ATTEMPTS):
            ours, theirs = translate(self.mappings, question.va), self.oracle.kernel(question.va)
            if ours == theirs:
                self.mapped += ours is not None
                self.unmapped += ours is None
                return
            if self._not_told(question.va, ours, theirs):
                return
            if attempt < _ATTEMPTS - 1:
                self.retried += 1
                self.mappings = self.lookups.walk()
        raise _disagreement(f"kernel address {question.va:#x}", ours, theirs, question.why)

    def _not_told(self, va: int, ours: int | None, theirs: int | None) -> bool:
        """Whether the walk itself says that it leaves this out: its verdict accounts for that."""
        if any(span.va <= va < span.va + span.bytes for span in self.mappings.unreadable):
            return True
        # Of a table with many references only the first are followed; then the page is known at all of these.
        surplus = ours is None and theirs is not None and self.mappings.surplus_references > 0
        return surplus and theirs is not None and len(addresses_of(self.mappings, theirs)) >= REFERENCES


def _disagreement(what: str, ours: int | None, theirs: int | None, why: str) -> OracleDisagrees:
    def said(pa: int | None) -> str:
        return "not mapped" if pa is None else f"mapped to {pa:#x}"

    return OracleDisagrees(
        f"drgn disagrees on {what} ({why}): it says {said(theirs)}, the audit says {said(ours)}",
        "rely on nothing that this audit says, and report both versions and the kernel's",
    )
