"""What physical memory is: /proc/iomem, memmap=, and the arithmetic of ranges against a model of sets."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.errors import OffmapError
from offmap.memory.iomem import (
    PhysicalRange,
    intersect,
    memmap_reservations,
    merged,
    parse_iomem,
    subtract,
    suggest_reservation,
)

TOP = 64
RANGES = st.lists(
    st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(lambda pair: PhysicalRange(min(pair), max(pair))),
    max_size=6,
)

IOMEM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
000f0000-000fffff : System ROM
00100000-5fffffff : System RAM
  01000000-01ffffff : Kernel code
  02000000-02ffffff : Reserved
60000000-6fffffff : Reserved
fee00000-fee00fff : Local APIC
100000000-17fffffff : System RAM
"""


def addresses(ranges: list[PhysicalRange]) -> set[int]:
    return {address for r in ranges for address in range(r.start, r.end)}


@given(RANGES, RANGES)
def test_intersect_and_subtract_are_those_of_sets(left: list[PhysicalRange], right: list[PhysicalRange]) -> None:
    both, rest = intersect(left, right), subtract(left, right)
    assert addresses(both) == addresses(left) & addresses(right)
    assert addresses(rest) == addresses(left) - addresses(right)
    for result in (both, rest):
        assert result == sorted(result)
        assert all(r.size > 0 for r in result if right or result is both)


@given(RANGES, RANGES)
def test_disjoint_ranges_give_disjoint_results(left: list[PhysicalRange], right: list[PhysicalRange]) -> None:
    disjoint: list[PhysicalRange] = []
    for r in left:
        disjoint += subtract([r], disjoint)
    for result in (subtract(disjoint, right), intersect(disjoint, [PhysicalRange(3, 40)])):
        assert sum(r.size for r in result) == len(addresses(result))


@given(RANGES)
def test_merged_ranges_do_not_touch(ranges: list[PhysicalRange]) -> None:
    result = merged(ranges)
    assert addresses(result) == addresses(ranges)
    assert all(before.end < after.start for before, after in pairwise(result))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 64))
def test_aligned_is_the_whole_pages_inside(start: int, size: int, page: int) -> None:
    r = PhysicalRange(start, start + size)
    aligned = r.aligned(page)
    wanted = {p for p in range(0, 2000, page) if r.start <= p and p + page <= r.end}
    assert {p for p in range(0, 2100, page) if aligned.start <= p < aligned.end} == wanted
    assert aligned.size == len(wanted) * page


def test_iomem_shows_top_level_resources_only() -> None:
    assert parse_iomem(IOMEM, "Reserved") == [PhysicalRange(0, 0x1000), PhysicalRange(0x60000000, 0x70000000)]
    ram = parse_iomem(IOMEM, "System RAM")
    assert ram[-1] == PhysicalRange(0x100000000, 0x180000000)
    assert parse_iomem(IOMEM, "Kernel code") == []
    assert parse_iomem("", "System RAM") == []


def test_iomem_without_the_capability_is_refused() -> None:
    hidden = "".join(f"00000000-00000000 : {line.split(' : ')[1]}\n" for line in IOMEM.splitlines())
    with pytest.raises(OffmapError, match="CAP_SYS_ADMIN"):
        parse_iomem(hidden, "Reserved")


@given(st.text(max_size=200))
def test_iomem_takes_any_text(text: str) -> None:
    try:
        ranges = parse_iomem(text, "Reserved")
    except OffmapError:
        return
    assert all(r.size > 0 for r in ranges)


@pytest.mark.parametrize(
    ("command_line", "ranges"),
    [
        ("memmap=256M$0x60000000", [(0x60000000, 0x70000000)]),
        ("quiet memmap=1G$4G root=/dev/sda", [(4 << 30, 5 << 30)]),
        ("memmap=0x1000$0x2000,64K$1M", [(0x2000, 0x3000), (1 << 20, (1 << 20) + (64 << 10))]),
        ("memmap=1M$16M memmap=1M$32M", [(16 << 20, 17 << 20), (32 << 20, 33 << 20)]),
        ("memmap=256m$1g", [(1 << 30, (1 << 30) + (256 << 20))]),
        ("memmap=1M@16M memmap=1M#16M memmap=1M!16M memmap=exactmap", []),
        ("memmap=1M@16M,1M$32M", [(32 << 20, 33 << 20)]),
        ("memmap=64M memmap=$ memmap=1M$ memmap=$1M memmap= memmap", []),
        ("memmap=1M$soon xmemmap=1M$16M memmapx=1M$16M", []),
        (r"memmap=256M\$0x60000000", []),  # a shell's quoting that reached the kernel: it does not reserve either
        ("", []),
    ],
)
def test_memmap_reservations(command_line: str, ranges: list[tuple[int, int]]) -> None:
    assert memmap_reservations(command_line) == [PhysicalRange(*pair) for pair in ranges]


@given(st.text(max_size=100))
def test_memmap_takes_any_text(text: str) -> None:
    for r in memmap_reservations(f"memmap={text}"):
        assert r.size >= 0


def test_suggestion_is_at_the_top_of_the_largest_stretch() -> None:
    text = """00001000-0009fbff : System RAM
00100000-7ffdffff : System RAM
  01000000-01ffffff : Kernel code
100000000-27fffffff : System RAM
"""
    there = suggest_reservation(text)
    assert there == PhysicalRange(0x240000000, 0x280000000)


def test_suggestion_avoids_the_crash_kernel() -> None:
    text = """00100000-7fffffff : System RAM
  60000000-7fffffff : Crash kernel
"""
    there = suggest_reservation(text)
    assert there is not None
    assert there.end <= 0x60000000


def test_no_suggestion_for_a_tiny_host() -> None:
    assert suggest_reservation("00100000-0fffffff : System RAM\n") is None
