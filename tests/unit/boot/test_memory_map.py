"""Where things go in guest memory, and what the guest is told of it."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.boot.memory_map import ACPI_AREA, HIGH_MEMORY_START, LOW_MEMORY_END, MemoryMap
from offmap.errors import OffmapError
from offmap.memory.iomem import PhysicalRange
from offmap.uapi.bootparam import E820_ACPI, E820_RAM, E820_RESERVED
from offmap.uapi.page import PAGE_SIZE

MIB = 1 << 20
FIRST_PAGE = HIGH_MEMORY_START // PAGE_SIZE
PAGES = 600
RAM = [PhysicalRange(0, (FIRST_PAGE + PAGES) * PAGE_SIZE)]
HIGH_RAM = [PhysicalRange(4 << 30, (4 << 30) + 64 * PAGE_SIZE)]

EXCLUDED = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40)).map(
        lambda pair: PhysicalRange(
            (FIRST_PAGE + pair[0]) * PAGE_SIZE, (FIRST_PAGE + min(pair[0] + pair[1], PAGES)) * PAGE_SIZE
        )
    ),
    max_size=12,
)
REQUEST = st.tuples(
    st.integers(0, 100 * PAGE_SIZE),
    st.one_of(st.none(), st.integers(0, PAGES + FIRST_PAGE).map(lambda page: page * PAGE_SIZE)),
    st.sampled_from([PAGE_SIZE, 16 * PAGE_SIZE, 2 * MIB]),
    st.sampled_from([1 << 32, 2 * MIB, 1 << 62, 0]),
)


def pages(ranges: list[PhysicalRange]) -> set[int]:
    return {page for r in ranges for page in range(r.start // PAGE_SIZE, -(-r.end // PAGE_SIZE))}


@given(EXCLUDED, st.lists(REQUEST, max_size=12), st.booleans())
def test_what_is_placed_is_ram_disjoint_and_outside_the_excluded(
    excluded: list[PhysicalRange], requests: list[tuple[int, int | None, int, int]], high: bool
) -> None:
    ram = RAM + (HIGH_RAM if high else [])
    memory_map = MemoryMap(ram, excluded)
    usable = pages(ram) - pages(excluded)
    usable -= {0} | set(range(LOW_MEMORY_END // PAGE_SIZE, FIRST_PAGE))
    free = set(usable)
    for size, at, alignment, below in requests:
        count = max(-(-size // PAGE_SIZE), 1)
        try:
            address = memory_map.take("it", size, at=at, alignment=alignment, below=below)
        except OffmapError as error:
            assert "does not fit" in str(error)
            if at is not None:
                assert not free >= set(range(at // PAGE_SIZE, at // PAGE_SIZE + count))
            else:
                step = alignment // PAGE_SIZE
                starts = (start for start in free if start % step == 0 and (start + count) * PAGE_SIZE <= below)
                assert not any(free >= set(range(start, start + count)) for start in starts)
            continue
        taken = set(range(address // PAGE_SIZE, address // PAGE_SIZE + count))
        assert taken <= free
        free -= taken
        if at is None:
            assert address % alignment == 0
            assert address + count * PAGE_SIZE <= below
        else:
            assert address == at
    assert pages(memory_map.free) == free


@given(EXCLUDED, st.booleans())
def test_e820_is_sorted_disjoint_and_complete(excluded: list[PhysicalRange], high: bool) -> None:
    ram = RAM + (HIGH_RAM if high else [])
    entries = MemoryMap(ram, excluded).e820()
    assert entries == sorted(entries)
    assert all(start + size <= after for (start, size, _), (after, _, _) in pairwise(entries))
    by_kind = {
        kind: pages([PhysicalRange(start, start + size) for start, size, k in entries if k == kind])
        for kind in (E820_RAM, E820_RESERVED, E820_ACPI)
    }
    assert by_kind[E820_RESERVED] == pages(excluded)
    assert by_kind[E820_ACPI] == pages([ACPI_AREA])
    not_ram = {0} | set(range(LOW_MEMORY_END // PAGE_SIZE, FIRST_PAGE))
    assert by_kind[E820_RAM] == pages(ram) - pages(excluded) - not_ram


def test_excluded_pages_next_to_each_other_are_one_entry() -> None:
    one_by_one = [PhysicalRange(2 * MIB + n * PAGE_SIZE, 2 * MIB + (n + 1) * PAGE_SIZE) for n in range(200)]
    entries = MemoryMap([PhysicalRange(0, 64 * MIB)], one_by_one).e820()
    assert (2 * MIB, 200 * PAGE_SIZE, E820_RESERVED) in entries
    assert len(entries) == 5


def test_excluded_pages_outside_ram_do_not_appear() -> None:
    entries = MemoryMap(RAM, [PhysicalRange(1 << 30, 2 << 30)]).e820()
    assert {kind for _, _, kind in entries} == {E820_RAM, E820_ACPI}


def holes(count: int, at: int = 2 * MIB) -> list[PhysicalRange]:
    """Pages with pages between them: one at first, then each time one more."""
    starts = accumulate(range(2, count + 1), lambda start, n: start + n * PAGE_SIZE, initial=at)
    return [PhysicalRange(start, start + PAGE_SIZE) for start in starts]


def test_more_holes_than_e820_can_say_are_joined_where_they_are_near() -> None:
    ram = [PhysicalRange(0, 64 * MIB)]
    # Low memory, the ACPI tables, RAM up to the first hole, and two entries for each hole.
    assert len(MemoryMap(ram, holes(62)).e820()) == 127
    memory_map = MemoryMap(ram, excluded := holes(70))
    assert len(memory_map.e820()) == 127
    assert memory_map.excluded == [PhysicalRange(excluded[0].start, excluded[8].end), *excluded[9:]]
    assert pages(memory_map.free) == pages(memory_map.ram) - pages(memory_map.excluded)


def test_holes_are_not_joined_across_what_is_no_ram() -> None:
    ram = [PhysicalRange(0, 64 * MIB), PhysicalRange(64 * MIB + PAGE_SIZE, 128 * MIB)]
    excluded = [*holes(70), PhysicalRange(64 * MIB - PAGE_SIZE, 64 * MIB), *holes(70, 64 * MIB + PAGE_SIZE)]
    memory_map = MemoryMap(ram, excluded)
    assert 100 < len(memory_map.e820()) <= 128
    assert pages(excluded) <= pages(memory_map.excluded) <= pages(ram)


@pytest.mark.parametrize("page", [0, 0x7000, 0x9F000, 0xFF000])
def test_pages_that_every_pc_needs_cannot_be_excluded(page: int) -> None:
    with pytest.raises(OffmapError, match=f"{page:#x} is needed to boot"):
        MemoryMap(RAM, [PhysicalRange(page, page + PAGE_SIZE)])


@pytest.mark.parametrize("size", [0, PAGE_SIZE, 64 * PAGE_SIZE, MIB])
def test_small_ram_is_no_error_in_itself(size: int) -> None:
    memory_map = MemoryMap([PhysicalRange(0, size)])
    with pytest.raises(OffmapError, match=r"the kernel needs 16 MiB .* does not fit into .*--memory-size"):
        memory_map.take("the kernel", 16 * MIB)
