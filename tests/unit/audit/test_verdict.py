"""The verdict: hidden is said only of pages that were seen and that nothing maps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN, Frames
from offmap.audit.guest_ram import GuestRam, RamRange, Source
from offmap.audit.mappings import RUN, KernelMappings, Span
from offmap.audit.regions import VMALLOC, Layout
from offmap.audit.verdict import PageCounts, Verdict, alias_ranges, classify, excluded_pages, mapped_guest_ranges
from offmap.errors import ExitStatus

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
ALIAS = 0xFFFF_C900_0000_0000


def frames(*pages: tuple[int, int]) -> Frames:
    return Frames(
        np.array([pfn for pfn, _ in pages], dtype=np.uint64), np.array([state for _, state in pages], dtype=np.uint8)
    )


def mappings(
    direct: list[tuple[int, int]], alias: list[tuple[int, int]], unreadable: tuple[Span, ...] = ()
) -> KernelMappings:
    """From (first frame, pages) lists."""
    runs = np.zeros(len(direct) + len(alias), dtype=RUN)
    for index, (first, pages) in enumerate(direct):
        runs[index] = (BASE + first * PAGE, first * PAGE, pages * PAGE, 1, True, True)
    for index, (first, pages) in enumerate(alias, len(direct)):
        runs[index] = (ALIAS + index * (1 << 30), first * PAGE, pages * PAGE, 1, True, True)
    return KernelMappings(runs, unreadable, {}, BASE)


def judge(seen: Frames, found: KernelMappings, after: Frames | None = None, guessed: bool = False) -> Verdict:
    counts, _ = classify(seen, after or seen, np.zeros(len(seen.pfn), dtype=np.bool_), found)
    return counts.verdict(guessed)


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
    runs[0] = (BASE + 7 * PAGE, 100 * PAGE, PAGE, 1, True, True)
    seen = frames((100, POPULATED))
    counts, _ = classify(seen, seen, np.zeros(1, dtype=np.bool_), KernelMappings(runs, (), {}, BASE))
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


def test_nothing_populated_is_unknown_and_not_hidden() -> None:
    assert judge(frames((0, EMPTY), (0, EMPTY)), mappings([], [])) is Verdict.UNKNOWN


def test_unreadable_page_tables_make_absent_pages_unknown() -> None:
    blind = (Span(ALIAS, 2 << 20, "its page table could not be read"),)
    assert judge(frames((100, POPULATED)), mappings([], [], blind)) is Verdict.UNKNOWN
    assert judge(frames((5, POPULATED)), mappings([(0, 9)], [], blind)) is Verdict.EXPOSED


def test_guess_can_be_exposed_but_not_hidden() -> None:
    assert judge(frames((100, POPULATED)), mappings([], []), guessed=True) is Verdict.UNKNOWN
    assert judge(frames((5, POPULATED)), mappings([(0, 9)], []), guessed=True) is Verdict.EXPOSED


def test_excluded_pages_do_not_count_but_are_counted() -> None:
    seen = frames((5, POPULATED), (100, POPULATED))
    counts, guest = classify(seen, seen, np.array([True, False]), mappings([(0, 1)], [(5, 1)]))
    assert counts.verdict(False) is Verdict.HIDDEN
    assert (counts.excluded_pages, counts.excluded_mapped_pages, counts.pages_populated) == (1, 1, 1)
    assert guest.tolist() == [100]


def test_pages_of_the_direct_map_cannot_be_excluded_into_hidden() -> None:
    seen = frames((5, POPULATED), (100, POPULATED))
    counts, _ = classify(seen, seen, np.array([True, False]), mappings([(0, 9)], []))
    assert (counts.verdict(False), counts.excluded_direct_pages) == (Verdict.UNKNOWN, 1)


def test_all_pages_excluded_is_unknown() -> None:
    seen = frames((100, POPULATED))
    counts, _ = classify(seen, seen, np.array([True]), mappings([], []))
    assert counts.verdict(False) is Verdict.UNKNOWN


def test_page_is_excluded_only_if_all_of_it_is() -> None:
    part = RamRange(0x7000_0000, 8 * PAGE, Source.MEMSLOT, guest_phys_addr=0x10_0000)
    ram = GuestRam((part,), ((0x10_0000 + 100, 3 * PAGE),))
    assert excluded_pages(ram).tolist() == [False, True, True, False, False, False, False, False]


def test_excluded_range_outside_every_slot_excludes_nothing() -> None:
    part = RamRange(0x7000_0000, 2 * PAGE, Source.MEMSLOT, guest_phys_addr=0x10_0000)
    assert not excluded_pages(GuestRam((part,), ((0, 0x10_0000), (1 << 40, PAGE)))).any()


def test_aliases_are_listed_as_contiguous_ranges() -> None:
    layout = Layout([(ALIAS, ALIAS + (1 << 40), VMALLOC)])
    found = alias_ranges(np.array([10, 11, 13, 40], dtype=np.uint64), mappings([(0, 90)], [(9, 6)]), layout)
    va = ALIAS + (1 << 30)
    assert [(a.va, a.pa, a.bytes, a.region) for a in found] == [
        (va + PAGE, 10 * PAGE, 2 * PAGE, VMALLOC),
        (va + 4 * PAGE, 13 * PAGE, PAGE, VMALLOC),
    ]


STATE = st.sampled_from([UNKNOWN, EMPTY, POPULATED])
RUNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=4)


@given(st.lists(st.tuples(st.integers(0, 30), STATE, STATE, st.booleans()), max_size=12), RUNS, RUNS, st.booleans())
def test_hidden_is_said_only_where_every_page_was_seen_and_unmapped(
    pages: list[tuple[int, int, int, bool]],
    direct: list[tuple[int, int]],
    alias: list[tuple[int, int]],
    blind: bool,
) -> None:
    seen = frames(*((pfn, before) for pfn, before, _, _ in pages))
    after = frames(*((pfn, after) for pfn, _, after, _ in pages))
    excluded = np.array([out for _, _, _, out in pages], dtype=np.bool_)
    spans = (Span(ALIAS, 1 << 21, "blind"),) if blind else ()
    counts, _ = classify(seen, after, excluded, mappings(direct, alias, spans))
    verdict = counts.verdict(False)
    guest = [(pfn, before, later) for pfn, before, later, out in pages if not out]
    in_runs = {frame for first, count in direct + alias for frame in range(first, first + count)}
    exposed = any(before == later == POPULATED and pfn in in_runs for pfn, before, later in guest)
    if exposed:
        assert verdict is Verdict.EXPOSED
    elif verdict is Verdict.HIDDEN:
        assert not blind
        assert all(before == later != UNKNOWN for _, before, later in guest)
        assert any(before == POPULATED for _, before, _ in guest)
    else:
        assert verdict is Verdict.UNKNOWN
    inside = counts.pages_populated + counts.not_populated_pages + counts.excluded_pages
    assert inside <= counts.ram_pages == len(pages)


def test_default_counts_are_unknown() -> None:
    assert PageCounts().verdict(False) is Verdict.UNKNOWN


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
    found = mappings([(103, 1)], [(500, 4)])
    assert mapped_guest_ranges(seen, GuestRam(slots), found) == [(PAGE, 2 * PAGE), (4 << 30, 2 * PAGE)]
    assert mapped_guest_ranges(seen, GuestRam(slots), mappings([], [])) == []
