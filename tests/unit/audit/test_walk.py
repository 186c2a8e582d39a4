"""The walk, over page-table images built here."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from offmap.audit.mappings import RUN, KernelMappings, covered, merge_runs, with_runs
from offmap.audit.tops import TOP_ENTRY, Tops
from offmap.audit.walk import Walker

PAGE = 4096
GIB = 1 << 30
P, RW, PSE, PAT_LARGE, NX = 1, 2, 1 << 7, 1 << 12, 1 << 63
TABLE = P | RW
SIZE = {1: PAGE, 2: 2 << 20, 3: GIB}
BASE = {4: 0xFFFF_8880_0000_0000, 5: 0xFF11_0000_0000_0000}
VMALLOC = {4: 0xFFFF_C900_0000_0000, 5: 0xFFA0_0000_0000_0000}
IMAGE = 0xFFFF_FFFF_8000_0000
MASK = (1 << 64) - 1


@dataclass
class Image:
    """Page tables in the first gigabyte of RAM, which the direct map covers with one 1 GiB leaf."""

    levels: int = 4
    sme: int = 0
    ram_end: int = GIB
    pages: dict[int, NDArray[np.uint64]] = field(default_factory=dict)
    zero: set[int] = field(default_factory=set)
    on_read: list[int] = field(default_factory=list)
    direct: bool = True

    def __post_init__(self) -> None:
        self.root = self.table()
        if self.direct:
            self.map(self.base, 0, 3, RW | NX)

    @property
    def base(self) -> int:
        return BASE[self.levels]

    def table(self) -> int:
        pa = 0x10_0000 + len(self.pages) * PAGE
        self.pages[pa] = np.zeros(512, dtype=np.uint64)
        return pa

    def slot(self, va: int, level: int) -> tuple[int, int]:
        """Table and index of the entry for ``va`` at ``level``; tables above it are made."""
        pa = self.root
        for depth in range(self.levels, level, -1):
            index = va >> 12 + 9 * (depth - 1) & 511
            entry = int(self.pages[pa][index])
            if not entry & P:
                entry = self.table() | TABLE | self.sme
                self.pages[pa][index] = entry
            pa = entry & 0xF_FFFF_FFFF_F000 & ~self.sme
        return pa, va >> 12 + 9 * (level - 1) & 511

    def put(self, va: int, level: int, entry: int) -> None:
        pa, index = self.slot(va, level)
        self.pages[pa][index] = entry

    def map(self, va: int, pa: int, level: int = 1, flags: int = RW | NX) -> None:
        self.put(va, level, pa | P | flags | self.sme | (PSE if level > 1 else 0))

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.asarray(pa < self.ram_end)

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        assert (np.diff(pa.astype(np.int64)) > 0).all()
        for row, address in enumerate(pa.tolist()):
            out[row] = 0 if address in self.zero else self.pages.get(address, np.zeros(512, dtype=np.uint64))
            self.on_read.append(address)

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.array([address in self.zero for address in pa.tolist()], dtype=np.bool_)

    def walk(self, passes: int = 1) -> KernelMappings:
        walker = Walker(self, self.root, self.levels, self.base, self.sme)
        for _ in range(passes):
            walker.walk()
        return walker.mappings()


Row = tuple[int, int, int, int, bool, bool]


def rows(mappings: KernelMappings) -> list[Row]:
    """Runs without the direct map's."""
    return [
        (int(r[0]), int(r[1]), int(r[2]), int(r[3]), bool(r[4]), bool(r[5]))
        for r in mappings.runs[~mappings.is_direct].tolist()
    ]


def mapped(mappings: KernelMappings, frames: Iterable[int]) -> list[bool]:
    return [bool(hit) for hit in covered(mappings.runs[~mappings.is_direct], np.array(list(frames), dtype=np.uint64))]


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_leaf_of_each_size_is_found_where_it_is(levels: int, level: int) -> None:
    image = Image(levels)
    va = VMALLOC[levels] + 3 * SIZE[level]
    image.map(va, 8 * GIB + 5 * SIZE[level], level, NX)
    result = image.walk()
    assert rows(result) == [(va, 8 * GIB + 5 * SIZE[level], SIZE[level], level, False, True)]
    assert result.unreadable == ()
    assert result.tables[levels] == 1


@pytest.mark.parametrize("levels", [4, 5])
def test_first_and_last_page_of_the_kernel_half(levels: int) -> None:
    image = Image(levels)
    first = MASK + 1 - (1 << 11 + 9 * levels)
    image.map(first, 0x7000)
    image.map(MASK + 1 - PAGE, 0x9000)
    assert [(row[0], row[1]) for row in rows(image.walk())] == [(first, 0x7000), (MASK + 1 - PAGE, 0x9000)]


def test_user_half_is_left_alone() -> None:
    image = Image()
    image.map(0x7F00_0000_0000, 8 * GIB)
    image.put(0x5500_0000_0000, 4, 500 * GIB | TABLE)  # no table there: must not even be looked at
    result = image.walk()
    assert rows(result) == [] and result.unreadable == ()


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("large", [0, PSE])
def test_not_present_entry_with_inverted_frame_is_never_decoded(level: int, large: int) -> None:
    image = Image()
    inverted = ~(8 * GIB) & 0xF_FFFF_FFFF_F000
    image.put(VMALLOC[4], level, inverted | RW | large | NX)
    result = image.walk()
    assert rows(result) == [] and result.unreadable == ()


def test_sme_bit_is_not_part_of_an_address() -> None:
    image = Image(sme=1 << 47)
    image.map(VMALLOC[4], 8 * GIB)
    image.map(VMALLOC[4] + GIB, 9 * GIB, 3)
    assert [row[1] for row in rows(image.walk())] == [8 * GIB, 9 * GIB]


@pytest.mark.parametrize("level", [2, 3])
def test_pat_bit_of_a_large_leaf_is_not_part_of_its_address(level: int) -> None:
    image = Image()
    image.map(VMALLOC[4], 8 * GIB, level, PAT_LARGE | NX)
    assert rows(image.walk()) == [(VMALLOC[4], 8 * GIB, SIZE[level], level, False, True)]


def test_bit_7_of_a_4k_entry_is_pat_and_not_a_size() -> None:
    image = Image()
    image.map(VMALLOC[4], 8 * GIB, 1, PSE)
    assert [row[2:4] for row in rows(image.walk())] == [(PAGE, 1)]


def test_rights_are_those_of_all_levels_together() -> None:
    image = Image()
    image.map(VMALLOC[4], 8 * GIB, 1, RW)
    image.map(VMALLOC[4] + (2 << 20), 9 * GIB, 1, RW)
    pa, index = image.slot(VMALLOC[4] + (2 << 20), 2)
    image.pages[pa][index] = (int(image.pages[pa][index]) & ~RW) | NX
    assert [row[4:] for row in rows(image.walk())] == [(True, False), (False, True)]


def test_neighbours_merge_across_tables_but_not_across_rights_or_sizes() -> None:
    image = Image()
    start = VMALLOC[4]
    for page in range(1024):
        image.map(start + page * PAGE, 8 * GIB + page * PAGE)
    image.map(start + 1024 * PAGE, 8 * GIB + 1024 * PAGE, 1, NX)
    image.map(start + (6 << 20), 8 * GIB + (6 << 20), 2, NX)
    assert [(row[0], row[2]) for row in rows(image.walk())] == [
        (start, 1024 * PAGE),
        (start + 1024 * PAGE, PAGE),
        (start + (6 << 20), 2 << 20),
    ]


def test_table_outside_ram_is_unreadable_and_the_rest_is_still_seen() -> None:
    image = Image()
    image.put(VMALLOC[4], 2, 900 * GIB | TABLE)
    image.map(VMALLOC[4] + (2 << 20), 8 * GIB)
    result = image.walk()
    assert [(span.va, span.bytes) for span in result.unreadable] == [(VMALLOC[4], 2 << 20)]
    assert mapped(result, [8 * GIB // PAGE]) == [True]


def test_reserved_size_bit_in_an_upper_entry_is_unreadable() -> None:
    image = Image()
    image.put(VMALLOC[4], 4, 8 * GIB | TABLE | PSE)
    assert [(span.va, span.bytes) for span in image.walk().unreadable] == [(VMALLOC[4], 512 * GIB)]


def test_table_that_was_zero_filled_is_unreadable() -> None:
    image = Image()
    image.map(VMALLOC[4], 8 * GIB)
    image.zero.add(image.slot(VMALLOC[4], 1)[0])
    result = image.walk()
    assert rows(result) == []
    assert [(span.va, span.bytes) for span in result.unreadable] == [(VMALLOC[4], 2 << 20)]


def test_table_that_is_really_empty_is_just_empty() -> None:
    image = Image()
    image.slot(VMALLOC[4], 1)
    assert image.walk().unreadable == ()


def test_empty_table_that_is_not_in_the_direct_map_was_not_read() -> None:
    image = Image(direct=False)
    image.slot(VMALLOC[4], 1)
    assert [span.va for span in image.walk().unreadable] == [VMALLOC[4]]


def test_table_shared_by_thousands_of_entries_is_expanded_a_few_times() -> None:
    image = Image()
    shared, index = image.slot(VMALLOC[4], 1)
    image.pages[shared][:] = np.arange(512, dtype=np.uint64) * PAGE + np.uint64(8 * GIB | TABLE)
    middle = image.slot(VMALLOC[4], 2)[0]
    image.pages[middle][:] = shared | TABLE
    upper = image.slot(VMALLOC[4], 3)[0]
    image.pages[upper][:] = middle | TABLE
    result = image.walk()
    assert index == 0
    assert len(result.runs) < 300
    assert result.surplus_references > 0
    assert all(mapped(result, range(8 * GIB // PAGE, 8 * GIB // PAGE + 512)))


def test_table_that_refers_to_itself_ends() -> None:
    image = Image()
    pa, index = image.slot(VMALLOC[4], 2)
    image.pages[pa][index] = pa | TABLE
    image.pages[image.root][300] = image.root | TABLE
    assert image.walk().tables[4] == 1


class Changing(Image):
    """A 2 MiB leaf is made a table of nothing after it was read, for the first ``times`` reads."""

    times = 1

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        super().read_pages(pa, out)
        table, index = self.slot(VMALLOC[4], 2)
        if self.times and table in pa.tolist():
            self.times -= 1
            self.pages[table][index] ^= np.uint64(2 << 20)


def test_walk_starts_again_when_an_upper_entry_changed() -> None:
    image = Changing()
    image.map(VMALLOC[4], 8 * GIB, 2)
    result = image.walk()
    assert result.unreadable == ()
    assert [row[1] for row in rows(result)] == [8 * GIB + (2 << 20)]


def test_entry_that_keeps_changing_is_unreadable() -> None:
    image = Changing()
    image.times = 1000
    image.map(VMALLOC[4], 8 * GIB, 2)
    assert [(span.va, span.bytes) for span in image.walk().unreadable] == [(VMALLOC[4], 2 << 20)]


def test_accessed_and_dirty_bits_are_not_a_change() -> None:
    class Touched(Image):
        def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
            super().read_pages(pa, out)
            table, index = self.slot(VMALLOC[4], 2)
            self.pages[table][index] ^= np.uint64(1 << 5 | 1 << 6)

    image = Touched()
    image.map(VMALLOC[4], 8 * GIB, 2)
    assert image.walk().unreadable == ()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 5]),
    st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 3000), st.sampled_from([1, 1, 1, 2]), st.booleans()),
        max_size=40,
    ),
)
def test_every_page_is_found_mapped_exactly_if_an_entry_maps_it(
    levels: int, wanted: list[tuple[int, int, int, bool]]
) -> None:
    image = Image(levels)
    entries: dict[tuple[int, int], int] = {}
    for slot, frame, level, nx in wanted:
        # 2 MiB leaves stay out of the gigabyte of the 4 KiB ones, so that none replaces a table.
        va = VMALLOC[levels] + (slot * PAGE if level == 1 else GIB + (slot & 511) * SIZE[2])
        pa = 8 * GIB + (frame * PAGE if level == 1 else (frame & 7) * SIZE[2])
        image.map(va, pa, level, RW | (NX if nx else 0))
        entries[va, level] = pa
    expected: set[int] = set()
    for (_, level), pa in entries.items():
        expected.update(range(pa // PAGE, (pa + SIZE[level]) // PAGE))
    result = image.walk()
    frames = range(8 * GIB // PAGE - 4, 8 * GIB // PAGE + 5000)
    assert mapped(result, frames) == [frame in expected for frame in frames]
    assert int(result.runs[~result.is_direct]["bytes"].sum()) == sum(SIZE[level] for _, level in entries)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12),
    st.lists(st.integers(0, 90), max_size=30),
)
def test_covered_agrees_with_asking_run_by_run(runs: list[tuple[int, int]], frames: list[int]) -> None:
    table = np.zeros(len(runs), dtype=RUN)
    for index, (first, pages) in enumerate(runs):
        table[index]["pa"], table[index]["bytes"] = first * PAGE, pages * PAGE
    naive = [any(first <= frame < first + pages for first, pages in runs) for frame in frames]
    assert covered(table, np.array(frames, dtype=np.uint64)).tolist() == naive


_RUNS = st.lists(
    st.builds(
        lambda va, pa, pages, level, writable: (va * PAGE, pa * PAGE, pages * PAGE, level, writable, True, True),
        *(st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.integers(1, 2), st.booleans()),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(known=_RUNS, found=_RUNS)
def test_runs_of_another_walk_are_added_as_if_all_were_merged(known: list[object], found: list[object]) -> None:
    first, second = merge_runs(np.array(known, dtype=RUN)), np.array(found, dtype=RUN)
    assert with_runs(first, [second]).tolist() == merge_runs(np.concatenate((first, second))).tolist()
    again = with_runs(first, [second])
    if again.size and len({run[0] for run in again.tolist()}) == len(again):
        assert with_runs(again, [again]) is again


def test_runs_are_divided_by_how_they_are_cached() -> None:
    image = Image()
    for index, flags in enumerate([0, 1 << 4, 1 << 4, 0]):  # PCD: UC-
        image.map(VMALLOC[4] + index * PAGE, 0x5000_0000 + index * PAGE, 1, RW | NX | flags)
    image.map(VMALLOC[4] + GIB, 0xC000_0000, 3, RW | NX | PAT_LARGE)  # WB by another entry of the PAT
    runs = image.walk().runs
    found = [(int(run["pa"]), int(run["bytes"]), bool(run["cached"])) for run in runs if run["va"] >= VMALLOC[4]]
    assert found == [
        (0x5000_0000, PAGE, True),
        (0x5000_1000, 2 * PAGE, False),
        (0x5000_3000, PAGE, True),
        (0xC000_0000, GIB, True),
    ]


def test_a_page_that_moves_so_that_it_is_always_mapped_is_seen_by_many_passes() -> None:
    # At each read of a table of the last level it is at the other address, so that no single pass sees it.
    image = Image()
    here, there = VMALLOC[4], VMALLOC[4] + (4 << 30)
    image.map(here, 8 * GIB)
    image.map(there, 9 * GIB)
    tables = [image.slot(va, 1) for va in (here, there)]
    page = int(image.pages[tables[0][0]][tables[0][1]])
    for pa, index in tables:
        image.pages[pa][index] = 0
    read, moments = image.read_pages, iter([0, 0] + [0] * 8 + [1] + [0] * 20)

    def moving(pas: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        read(pas, out)
        for row, pa in enumerate(pas.tolist()):
            if pa == tables[0][0]:
                out[row][tables[0][1]] = page if next(moments) else 0

    image.read_pages = moving  # type: ignore[assignment,method-assign]
    assert not mapped(image.walk(), [8 * GIB >> 12])[0]
    found = image.walk(passes=20)
    assert mapped(found, [8 * GIB >> 12])[0]
    assert found.passes == 20


def test_what_any_pass_saw_is_kept_once() -> None:
    image = Image()
    image.map(VMALLOC[4], 8 * GIB)
    walker = Walker(image, image.root, 4, image.base)
    assert walker.walk() and not walker.walk()
    image.map(VMALLOC[4] + PAGE, 9 * GIB)
    assert walker.walk()
    image.put(VMALLOC[4], 1, 0)
    walker.walk()
    result = walker.mappings()
    assert [(row[0], row[1], row[2]) for row in rows(result)] == [
        (VMALLOC[4], 8 * GIB, PAGE),
        (VMALLOC[4] + PAGE, 9 * GIB, PAGE),
    ]
    assert (result.passes, result.unreadable) == (4, ())


@pytest.mark.parametrize("levels", [4, 5])
def test_what_other_roots_have_is_found_and_what_they_share_is_not_counted_twice(levels: int) -> None:
    image, other = Image(levels), Image(levels)
    other.pages = image.pages
    other.root = other.table()
    low, high = 0x1000_0000, VMALLOC[levels] + (1 << 44)
    image.map(VMALLOC[levels], 7 * GIB)
    other.map(low, 8 * GIB)
    other.map(high + PAGE, 9 * GIB)
    page = image.pages[other.root]
    shift = 12 + 9 * (levels - 1)
    shared = VMALLOC[levels] >> shift & 511
    page[shared] = page[shared] or image.pages[image.root][shared]
    page[3] = image.pages[image.root][shared]  # in its lower half, as the trampoline has the direct map
    index = np.flatnonzero(page).astype(np.uint16)
    entries = np.array([(number, page[number]) for number in index.tolist()], dtype=TOP_ENTRY)
    walker = Walker(image, image.root, levels, image.base, tops=lambda: Tops(entries, {"mm": 1}))
    walker.walk()
    result = walker.mappings()
    assert {8 * GIB, 9 * GIB} <= {row[1] for row in rows(result)}
    assert len([row for row in rows(result) if row[1] == 7 * GIB]) == 1
    assert [row[0] for row in rows(result) if row[1] == 8 * GIB] == [low]
    assert result.unreadable == () and result.roots == {"init_top_pgt": 1, "mm": 1}
    assert 8 * GIB not in result.main["pa"].tolist()


def test_a_root_that_cannot_be_found_leaves_nothing_hidden() -> None:
    image = Image()
    walker = Walker(image, image.root, 4, image.base, tops=lambda: Tops(np.empty(0, TOP_ENTRY), {}, ("why",)))
    walker.walk()
    assert [span.reason for span in walker.mappings().unreadable] == ["why"]


def test_a_top_entry_that_goes_meanwhile_spoils_the_pass() -> None:
    image = Image()
    table = image.table()
    answers = iter(range(100))

    def tops() -> Tops:
        return Tops(np.array([(300, table | TABLE)] if next(answers) % 2 == 0 else [], dtype=TOP_ENTRY), {})

    walker = Walker(image, image.root, 4, image.base, tops=tops)
    walker.walk()
    assert (walker.passes, walker.failed) == (1, 0)
