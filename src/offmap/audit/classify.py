"""From page frames and kernel mappings to the state of each page, and to the counts that a verdict rests on.

The order matters. One mapped page makes the VM exposed. Otherwise one page that could not be judged makes it unknown.
It is hidden only if neither is the case and at least one page is populated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN, Frames
from offmap.audit.guest_ram import GuestRam
from offmap.audit.intervals import Intervals, Ints, cut, distinct
from offmap.audit.kinds import Kinds
from offmap.audit.mappings import KernelMappings
from offmap.audit.reach import KINDS, Kind
from offmap.audit.result import Pages
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_CHANGED = "came, went or moved during the audit"
CAME = "came during the audit"
"""Why a page is unknown that was not there before the walks: the next audit can tell."""

_NONE = Intervals(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

ReachSets = tuple[tuple[int, Intervals], ...]


@dataclass(frozen=True)
class Classified:
    """All pages of the ranges, in their order, as runs of pages with the same classification.

    Attributes:
        page, pages: the run's first page and how many it has.
        pfn: frame of the first, where ``state`` is POPULATED.
        state: EMPTY, POPULATED (known, and the same before and after the walk) or UNKNOWN.
        why: index into ``reasons``: why an UNKNOWN run is not known; what memory an EMPTY run will be that the kernel
            will map, 0 if it will not.
        excluded: whether the guest does not get it.
        reached: the kinds of kernel mapping that reach it, as a mask of 1 << index into ``KINDS``.
        blind: whether a part of the page tables could not be read, so that what nothing reaches is not hidden either.
    """

    page: Ints
    pages: Ints
    pfn: Ints
    state: NDArray[np.uint8]
    why: NDArray[np.uint16]
    excluded: NDArray[np.bool_]
    reached: NDArray[np.uint32]
    reasons: tuple[str, ...] = ("",)
    blind: str = ""

    DIRECT = np.uint32(1 << KINDS.index(Kind.DIRECT_MAP))

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which runs are of guest pages whose frames are known."""
        return np.asarray((self.state == POPULATED) & ~self.excluded, dtype=np.bool_)

    @property
    def frames(self) -> Intervals:
        """All frames of known guest pages, each once."""
        known = self.known
        return Intervals.union(self.pfn[known], (self.pfn + self.pages)[known])

    @property
    def plain(self) -> dict[str, int]:
        """Guest pages that are not there yet and that the kernel will map, by what memory they will be."""
        empty = (self.state == EMPTY) & (self.why != 0) & ~self.excluded
        return {
            self.reasons[why]: int(self.pages[empty & (self.why == why)].sum())
            for why in np.unique(self.why[empty]).tolist()
        }

    def counts(self) -> Pages:
        """Count the pages."""

        def count(mask: NDArray[np.bool_]) -> int:
            return int(self.pages[mask].sum())

        guest, mapped = ~self.excluded, self.reached != 0
        direct, alias = self.reached & self.DIRECT != 0, self.reached & ~self.DIRECT != 0
        unknown = guest & (self.state == UNKNOWN)
        unseen = self.known & ~mapped if self.blind else np.zeros_like(mapped)
        reasons = {
            self.reasons[why] or "for no reason that was noted": count(unknown & (self.why == why))
            for why in np.unique(self.why[unknown]).tolist()
        }
        if unseen.any():
            reasons[self.blind] = count(unseen)
        return Pages(
            ram_pages=int(self.pages.sum()),
            pages_populated=count(self.known),
            not_populated_pages=count(guest & (self.state == EMPTY)),
            not_populated_plain_pages=count(guest & (self.state == EMPTY) & (self.why != 0)),
            direct_map_pages=count(guest & direct),
            alias_pages=count(guest & alias),
            mapped_pages=count(guest & mapped),
            unknown_pages=count(unknown | unseen),
            excluded_pages=count(self.excluded),
            excluded_mapped_pages=count(self.excluded & mapped),
            excluded_direct_pages=count(self.excluded & direct),
            unknown_reasons=reasons,
            canaries_found=None,
        )


def excluded_ranges(ram: GuestRam) -> Intervals:
    """The pages, counted through all ranges, that the guest does not get: its VMM says so, and KVM's slots agree.

    A page of memory that any slot of any VM of the process has is its guest's, whatever the VMM says. So is each one
    where KVM's list could not be read.
    """
    if ram.unlisted:
        return _NONE
    return claimed_excluded(ram).minus(_in_slots(ram))


def claimed_excluded(ram: GuestRam) -> Intervals:
    """The pages, counted through all ranges, that the VMM says it keeps from its guest: whole ones."""
    starts, ends, position = [], [], 0
    for part in ram.ranges:
        if part.guest_phys_addr is not None:
            for start, size in part.excluded:
                first = max(-(-(start - part.guest_phys_addr) // PAGE_SIZE), 0)
                last = min((start + size - part.guest_phys_addr) // PAGE_SIZE, part.pages)
                starts.append(position + first)
                ends.append(position + max(first, last))
        position += part.pages
    return Intervals.union(np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64))


def _in_slots(ram: GuestRam) -> Intervals:
    """The pages, counted through all ranges, that lie in memory of some slot."""
    slots = [(slot.userspace_addr, slot.bytes) for vm in ram.vms for slot in vm.slots]
    va, size = np.array(slots, dtype=np.int64).reshape(-1, 2).T // PAGE_SIZE
    starts, ends, position = [va[:0]], [va[:0]], 0
    for part in ram.ranges:
        if part.excluded:
            first = va - part.va // PAGE_SIZE
            starts.append(np.clip(first, 0, part.pages) + position)
            ends.append(np.clip(first + size, 0, part.pages) + position)
        position += part.pages
    return Intervals.union(np.concatenate(starts), np.concatenate(ends))


def classify(
    before: Frames,
    after: Frames,
    excluded: Intervals,
    mappings: KernelMappings,
    kinds: Kinds | None = None,
    reach: ReachSets | None = None,
) -> Classified:
    """Classify each page.

    Args:
        before, after: the frames as they were before and after the walk; a page that differs is unknown.
        excluded: pages that the guest does not get; those that are unknown count all the same.
        kinds: of the mappings' runs; without them, all outside the direct map are OTHER.
        reach: ``reach_sets`` of these, for who classifies many times.
    """
    page = distinct(before.page, after.page, excluded.edges[excluded.edges < before.total])
    one, two = (np.searchsorted(frames.page, page, side="right") - 1 for frames in (before, after))
    state, why = before.state[one], before.why[one]
    pfn = np.where(state == POPULATED, before.pfn[one] + page - before.page[one], 0)
    same_frame = pfn == np.where(state == POPULATED, after.pfn[two] + page - after.page[two], 0)
    changed = (state != after.state[two]) | ~same_frame
    # The memory may have been exchanged where there was no page to tell it by.
    changed |= (state == EMPTY) & ((why == 0) != (after.why[two] == 0))
    # A page that was unknown before keeps its reason; any other that differs has changed.
    reasons = (*before.reasons, CAME, _CHANGED)
    reason = np.where(state == UNKNOWN, why.astype(np.int64), len(reasons) - 1)
    reason = np.where((state == EMPTY) & (after.state[two] == POPULATED), len(reasons) - 2, reason)
    if after.ended:
        reasons = (*reasons, f"{after.ended} before it was looked at again")
        reason = np.where((state != UNKNOWN) & (after.state[two] == UNKNOWN), len(reasons) - 1, reason)
    state = np.where(changed, UNKNOWN, state).astype(np.uint8)
    why = np.where(changed, reason, why)
    pages = np.diff(np.append(page, before.total))

    sets = reach_sets(mappings, kinds) if reach is None else reach
    edges = distinct(np.zeros(0, dtype=np.int64), *(frames.edges for _, frames in sets))
    populated = state == POPULATED
    # Runs without frames are cut by nothing.
    source, offset, length = cut(np.where(populated, pfn, -1 << 60), pages, edges)
    populated = populated[source]
    pfn = np.where(populated, pfn[source] + offset, 0)
    reached = np.zeros(len(source), dtype=np.uint32)
    for code, frames in sets:
        reached[populated & frames.contains(pfn)] |= np.uint32(1 << code)
    page = page[source] + offset
    state = state[source]
    blind = ""
    if mappings.unreadable:
        example = mappings.unreadable[0]
        blind = f"kernel page tables could not be read at {example.va:#x}: {example.reason}"
    return Classified(
        page,
        length,
        pfn,
        state,
        why[source].astype(np.uint16),
        # Exclusion excuses a known alias, never an unknown page.
        excluded.contains(page) & (state != UNKNOWN),
        reached,
        reasons,
        blind,
    )


def reach_sets(mappings: KernelMappings, kinds: Kinds | None) -> ReachSets:
    """The frames that each kind of mapping (index into ``KINDS``) reaches."""
    direct, other = KINDS.index(Kind.DIRECT_MAP), KINDS.index(Kind.OTHER)
    code = np.where(mappings.is_direct, direct, other) if kinds is None else kinds.kind
    start = (mappings.runs["pa"] >> PAGE_SHIFT).astype(np.int64)
    end = start + (mappings.runs["bytes"] >> PAGE_SHIFT).astype(np.int64)
    return tuple((each, Intervals.union(start[code == each], end[code == each])) for each in np.unique(code).tolist())


def mapped_guest_ranges(judged: Classified, ram: GuestRam) -> list[tuple[int, int]]:
    """Guest-physical (address, bytes) of all pages that the kernel maps, merged, where their address is known."""
    mapped = judged.reached != 0
    start = judged.page[mapped]
    found: list[tuple[int, int]] = []
    position = 0
    hit = Intervals.union(start, start + judged.pages[mapped])
    for part in ram.ranges:
        if part.guest_phys_addr is not None:
            low, high = np.maximum(hit.start, position), np.minimum(hit.end, position + part.pages)
            for first, end in zip(low[low < high].tolist(), high[low < high].tolist(), strict=True):
                found.append((part.guest_phys_addr + (first - position) * PAGE_SIZE, (end - first) * PAGE_SIZE))
        position += part.pages
    return sorted(found)
