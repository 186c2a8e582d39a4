"""The verdict: hidden is said only of pages that were seen and that nothing maps."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.classify import classify, excluded_ranges, mapped_guest_ranges
from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN, Frames
from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.intervals import Intervals
from offmap.audit.join import join, physical_map
from offmap.audit.kinds import kinds_of
from offmap.audit.mappings import RUN, KernelMappings
from offmap.audit.reach import Kind
from offmap.audit.regions import VMALLOC, Layout
from offmap.audit.result import Source, Span
from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus
from offmap.report.typed import Address

from .frames_of_pages import frames_of_pages
from .report.samples import page_counts

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
ALIAS = 0xFFFF_C900_0000_0000


def frames(*pages: tuple[int, int]) -> Frames:
    return frames_of_pages(
        np.array([pfn for pfn, _ in pages], dtype=np.int64), np.array([state for _, state in pages], dtype=np.uint8)
    )


def pages(mask: list[bool]) -> Intervals:
    """The set of pages that the mask has."""
    index = np.flatnonzero(np.array(mask, dtype=np.bool_))
    return Intervals.union(index, index + 1)


NONE = pages([])


def mappings(
    direct: list[tuple[int, int]], alias: list[tuple[int, int]], unreadable: tuple[Span, ...] = ()
) -> KernelMappings:
    """From (first frame, pages) lists."""
    runs = np.zeros(len(direct) + len(alias), dtype=RUN)
    for index, (first, pages) in enumerate(direct):
        runs[index] = (BASE + first * PAGE, first * PAGE, pages * PAGE, 1, True, True, True)
    for index, (first, pages) in enumerate(alias, len(direct)):
        runs[index] = (ALIAS + index * (1 << 30), first * PAGE, pages * PAGE, 1, True, True, True)
    return KernelMappings(runs, unreadable, {}, BASE)


def judge(seen: Frames, found: KernelMappings, after: Frames | None = None, guessed: bool = False) -> Verdict:
    return classify(seen, after or seen, NONE, found).counts().verdict(guessed)


def test_exit_status_of_each_verdict() -> None:
    assert [verdict.exit_status for verdict in (Verdict.HIDDEN, Verdict.EXPOSED, Verdict.UNKNOWN)] == [
        ExitStatus.DONE,
        ExitStatus.EXPOSED,
        ExitStatus.UNDETERMINED,
    ]


def test_unmapped_pages_are_hidden() -> None:
    assert judge(frames((100, POPULATED), (101, POPULATED)), mappings([(0, 100)], [(102, 1)])) is Verdict.HIDDEN


def test_one_direct_mapping_exposes() -> None:
    assert judge(frames((100, POPULATED), (99, POPULATED)), mappings([(0, 100)], [])) is Verdict.EXPOSED


def test_one_alias_exposes() -> None:
    assert judge(frames((100, POPULATED), (500, POPULATED)), mappings([(0, 100)], [(500, 1)])) is Verdict.EXPOSED


def test_mapping_at_another_place_of_the_direct_map_is_an_alias() -> None:
    runs = np.zeros(1, dtype=RUN)
    runs[0] = (BASE + 7 * PAGE, 100 * PAGE, PAGE, 1, True, True, True)
    seen = frames((100, POPULATED))
    counts = classify(seen, seen, NONE, KernelMappings(runs, (), {}, BASE)).counts()
    assert (counts.direct_map_pages, counts.alias_pages) == (0, 1)


def test_one_unknown_page_makes_the_rest_unknown() -> None:
    assert judge(frames((100, POPULATED), (0, UNKNOWN)), mappings([], [])) is Verdict.UNKNOWN


def test_exposed_wins_over_unknown() -> None:
    assert judge(frames((5, POPULATED), (0, UNKNOWN)), mappings([(0, 9)], [])) is Verdict.EXPOSED


def test_page_that_moved_during_the_walk_is_unknown() -> None:
    seen, after = frames((100, POPULATED)), frames((101, POPULATED))
    assert judge(seen, mappings([], []), after) is Verdict.UNKNOWN


def test_page_that_came_during_the_walk_is_unknown() -> None:
    seen, after = frames((100, POPULATED), (0, EMPTY)), frames((100, POPULATED), (101, POPULATED))
    assert judge(seen, mappings([], []), after) is Verdict.UNKNOWN


def test_process_that_ended_leaves_unknown_pages_and_the_reason() -> None:
    seen = frames((100, POPULATED), (101, POPULATED), (0, EMPTY))
    unseen = {"process 7 ended before it was looked at": range(3)}
    after = frames_of_pages(np.zeros(3, np.int64), np.full(3, UNKNOWN), unseen)
    after.ended = "process 7 ended"
    counts = classify(seen, after, NONE, mappings([(0, 200)], [])).counts()
    assert (counts.unknown_pages, counts.mapped_pages, counts.pages_populated) == (3, 0, 0)
    assert counts.unknown_reasons == {"process 7 ended before it was looked at again": 3}
    assert counts.verdict(False) is Verdict.UNKNOWN


def test_nothing_populated_is_unknown_and_not_hidden() -> None:
    assert judge(frames((0, EMPTY), (0, EMPTY)), mappings([], [])) is Verdict.UNKNOWN


def test_unreadable_page_tables_make_absent_pages_unknown() -> None:
    blind = (Span(Address(ALIAS), 2 << 20, "its page table could not be read"),)
    assert judge(frames((100, POPULATED)), mappings([], [], blind)) is Verdict.UNKNOWN
    assert judge(frames((5, POPULATED)), mappings([(0, 9)], [], blind)) is Verdict.EXPOSED


def test_guess_can_be_exposed_but_not_hidden() -> None:
    assert judge(frames((100, POPULATED)), mappings([], []), guessed=True) is Verdict.UNKNOWN
    assert judge(frames((5, POPULATED)), mappings([(0, 9)], []), guessed=True) is Verdict.EXPOSED


def test_excluded_pages_do_not_count_but_are_counted() -> None:
    seen = frames((5, POPULATED), (100, POPULATED))
    judged = classify(seen, seen, pages([True, False]), mappings([(0, 1)], [(5, 1)]))
    counts = judged.counts()
    assert counts.verdict(False) is Verdict.HIDDEN
    assert (counts.excluded_pages, counts.excluded_mapped_pages, counts.pages_populated) == (1, 1, 1)
    assert judged.frames.edges.tolist() == [100, 101]


def test_pages_of_the_direct_map_cannot_be_excluded_into_hidden() -> None:
    seen = frames((5, POPULATED), (100, POPULATED))
    counts = classify(seen, seen, pages([True, False]), mappings([(0, 9)], [])).counts()
    assert (counts.verdict(False), counts.excluded_direct_pages) == (Verdict.UNKNOWN, 1)


def test_pages_that_nobody_could_see_cannot_be_excluded_into_hidden() -> None:
    seen = frames((0, UNKNOWN), (100, POPULATED))
    counts = classify(seen, seen, pages([True, False]), mappings([(0, 9)], [])).counts()
    assert (counts.verdict(False), counts.unknown_pages, counts.excluded_pages) == (Verdict.UNKNOWN, 1, 0)


def test_as_many_reasons_as_there_can_be() -> None:
    reasons: dict[str, Sequence[int]] = {f"reason {number}": [number] for number in range(400)}
    seen = frames_of_pages(np.zeros(401, np.int64), np.array([UNKNOWN] * 400 + [POPULATED], np.uint8), reasons)
    after = frames_of_pages(np.ones(401, np.int64), np.array([UNKNOWN] * 400 + [POPULATED], np.uint8), reasons)
    counts = classify(seen, after, NONE, mappings([], [])).counts()
    assert (counts.unknown_pages, sum(counts.unknown_reasons.values())) == (401, 401)
    assert counts.unknown_reasons["came, went or moved during the audit"] == 1


def test_a_page_that_came_is_told_from_one_that_went_or_moved() -> None:
    before = frames((0, EMPTY), (100, POPULATED), (101, POPULATED))
    after = frames((99, POPULATED), (0, EMPTY), (102, POPULATED))
    counts = classify(before, after, NONE, mappings([], [])).counts()
    assert counts.unknown_reasons == {"came during the audit": 1, "came, went or moved during the audit": 2}


def test_all_pages_excluded_is_unknown() -> None:
    seen = frames((100, POPULATED))
    counts = classify(seen, seen, pages([True]), mappings([], [])).counts()
    assert counts.verdict(False) is Verdict.UNKNOWN


def test_page_is_excluded_only_if_all_of_it_is() -> None:
    hole = (0x10_0000 + 100, 3 * PAGE)
    part = RamRange(0x7000_0000, 8 * PAGE, Source.MEMSLOT, guest_phys_addr=0x10_0000, excluded=(hole,))
    other = RamRange(0x9000_0000, 8 * PAGE, Source.KVM, guest_phys_addr=0x10_0000)  # of another VM of the process
    ram = GuestRam((part, other))
    assert excluded_ranges(ram).edges.tolist() == [1, 3]


def test_excluded_range_outside_every_slot_excludes_nothing() -> None:
    holes = ((0, 0x10_0000), (1 << 40, PAGE))
    part = RamRange(0x7000_0000, 2 * PAGE, Source.MEMSLOT, guest_phys_addr=0x10_0000, excluded=holes)
    assert not excluded_ranges(GuestRam((part,))).size


def test_aliases_are_listed_as_contiguous_ranges() -> None:
    layout = Layout([(ALIAS, ALIAS + (1 << 40), VMALLOC)])
    seen = frames(*((pfn, POPULATED) for pfn in (40, 10, 11, 13)))
    kernel = mappings([(0, 90)], [(9, 6)])
    kinds = kinds_of(kernel, layout, ())
    ram = GuestRam((RamRange(0x7000_0000, 4 * PAGE, Source.MEMSLOT, guest_phys_addr=0x10_0000),))
    joined = join(classify(seen, seen, NONE, kernel, kinds), kernel, kinds, layout, ram)
    va = ALIAS + (1 << 30)
    assert [(a.va, a.pa, a.bytes, a.region, a.kind) for a in joined.aliases] == [
        (va + PAGE, 10 * PAGE, 2 * PAGE, VMALLOC, Kind.VMALLOC_SPACE),
        (va + 4 * PAGE, 13 * PAGE, PAGE, VMALLOC, Kind.VMALLOC_SPACE),
    ]
    assert [(a.userspace_addr, a.guest_phys_addr) for a in joined.aliases] == [
        (0x7000_1000, 0x10_1000),
        (0x7000_3000, 0x10_3000),
    ]
    assert [(d.va, d.pa, d.bytes) for d in joined.direct_map_ranges] == [
        (BASE + 10 * PAGE, 10 * PAGE, 2 * PAGE),
        (BASE + 13 * PAGE, 13 * PAGE, PAGE),
        (BASE + 40 * PAGE, 40 * PAGE, PAGE),
    ]
    assert [(total.kind, total.pages, total.ranges) for total in joined.reach] == [
        (Kind.DIRECT_MAP, 4, 3),
        (Kind.VMALLOC_SPACE, 3, 2),
    ]
    assert joined.omitted == (0, 0)


STATE = st.sampled_from([UNKNOWN, EMPTY, POPULATED])
RUNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=4)


@given(st.lists(st.tuples(st.integers(0, 30), STATE, STATE, st.booleans()), max_size=12), RUNS, RUNS, st.booleans())
def test_every_page_is_judged_as_if_it_were_the_only_one(
    guest: list[tuple[int, int, int, bool]],
    direct: list[tuple[int, int]],
    alias: list[tuple[int, int]],
    blind: bool,
) -> None:
    seen = frames(*((pfn, before) for pfn, before, _, _ in guest))
    after = frames(*((pfn, after) for pfn, _, after, _ in guest))
    spans = (Span(Address(ALIAS), 1 << 21, "blind"),) if blind else ()
    kernel = mappings(direct, alias, spans)
    judged = classify(seen, after, pages([out for _, _, _, out in guest]), kernel)
    counts = judged.counts()
    in_direct, in_alias = ({f for first, n in runs for f in range(first, first + n)} for runs in (direct, alias))
    expected = Counter(ram_pages=len(guest))
    for pfn, before, later, out in guest:
        known = before == later == POPULATED
        mapped = known and pfn in in_direct | in_alias
        if out and before == later != UNKNOWN:
            expected["excluded_pages"] += 1
            expected["excluded_mapped_pages"] += mapped
            expected["excluded_direct_pages"] += known and pfn in in_direct
            continue
        expected["pages_populated"] += known
        expected["not_populated_pages"] += before == later == EMPTY
        expected["direct_map_pages"] += known and pfn in in_direct
        expected["alias_pages"] += known and pfn in in_alias
        expected["mapped_pages"] += mapped
        expected["unknown_pages"] += before != later or before == UNKNOWN or (blind and known and not mapped)
    assert counts == page_counts(**expected, unknown_reasons=counts.unknown_reasons)
    assert sum(counts.unknown_reasons.values()) == counts.unknown_pages
    if counts.verdict(False) is Verdict.HIDDEN:
        assert not blind and not counts.unknown_pages and not counts.mapped_pages and counts.pages_populated

    ram = GuestRam((RamRange(0x7000_0000, max(len(guest), 1) * PAGE, Source.REQUESTED),))
    joined = join(judged, kernel, kinds_of(kernel, Layout([]), ()), Layout([]), ram)
    shown = [pfn for pfn, before, later, out in guest if before == later == POPULATED and not out]
    for runs, listed in ((direct, joined.direct_map_ranges), (alias, joined.aliases)):
        times = sum(first <= pfn < first + count for pfn in shown for first, count in runs)
        # Two runs of the direct map at one address are one mapping to the processor, but two here.
        assert sum(each.bytes for each in listed) == times * PAGE
        for each in listed:
            assert guest[(each.userspace_addr - 0x7000_0000) // PAGE][0] == each.pa // PAGE

    for cells in (100, 3):
        drawn = physical_map(judged, [], cells)
        assert len(drawn.cells) <= cells
        assert sum(cell.guest_pages for cell in drawn.cells) == len(set(shown)) == judged.frames.size
        assert sum(cell.direct_map_pages for cell in drawn.cells) == len(set(shown) & in_direct)
        assert sum(cell.alias_pages for cell in drawn.cells) == len(set(shown) & in_alias)
        assert sum(cell.mapped_pages for cell in drawn.cells) == len(set(shown) & (in_direct | in_alias))
        for cell in drawn.cells:
            inside = {pfn for pfn in shown if cell.pa <= pfn * PAGE < cell.pa + cell.bytes}
            assert cell.guest_pages == len(inside) > 0
            assert (Kind.DIRECT_MAP in cell.kinds) == bool(inside & in_direct)


def test_default_counts_are_unknown() -> None:
    assert page_counts().verdict(False) is Verdict.UNKNOWN


def test_mapped_pages_are_named_by_guest_physical_address() -> None:
    """What the VMM is to keep from its guest: merged, by slot, and only where the slot's address is known."""
    slots = (
        RamRange(0x10000, 4 * PAGE, Source.MEMSLOT, guest_phys_addr=0),
        RamRange(0x90000, 2 * PAGE, Source.MEMSLOT, guest_phys_addr=4 << 30),
        RamRange(0xF0000, PAGE, Source.REQUESTED),
    )
    seen = frames(
        *((100, POPULATED), (500, POPULATED), (501, POPULATED), (102, UNKNOWN)),
        *((103, POPULATED), (502, POPULATED), (503, POPULATED)),
    )
    ram = GuestRam(slots)
    judged = classify(seen, seen, NONE, mappings([(103, 1)], [(500, 4)]))
    assert mapped_guest_ranges(judged, ram) == [(PAGE, 2 * PAGE), (4 << 30, 2 * PAGE)]
    assert mapped_guest_ranges(classify(seen, seen, NONE, mappings([], [])), ram) == []
