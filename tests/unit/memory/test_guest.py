"""GuestMemory: nothing outside RAM can be reached, whatever is asked for."""

import itertools
import mmap
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.errors import BackendRefused
from offmap.kvm import Vm
from offmap.memory.backing import Backing
from offmap.memory.guest import (
    DEVICE_SLOTS,
    MMIO_HOLE_END,
    MMIO_HOLE_START,
    GuestAddressError,
    GuestMemory,
    layout,
)
from offmap.memory.iomem import PhysicalRange
from offmap.uapi.mman import MAP_NORESERVE

PAGE = 4096
GIB = 1 << 30
ADDRESS = st.one_of(
    st.integers(-PAGE, 7 * GIB),
    st.sampled_from([0, MMIO_HOLE_START, MMIO_HOLE_END, 6 * GIB, 1 << 32, 1 << 63, 1 << 64]).flatmap(
        lambda edge: st.integers(edge - 3, edge + 3)
    ),
)
SIZE = st.one_of(st.integers(-3, 2 * PAGE), st.integers(0, 8 * GIB), st.just(1 << 64))


def backing(size: int) -> Backing:
    """Address space that costs nothing until it is touched."""
    return Backing("test", -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    """Give 5 GiB in two pieces: RAM at 0 to 3 GiB and 4 to 6 GiB, the second piece from 4.5 GiB on."""
    with GuestMemory([backing(7 * GIB // 2), backing(3 * GIB // 2)]) as memory:
        yield memory


def model_regions() -> list[tuple[int, int]]:
    return [(0, 3 * GIB), (4 * GIB, 9 * GIB // 2), (9 * GIB // 2, 6 * GIB)]


def test_ram_goes_around_the_hole(memory: GuestMemory) -> None:
    assert [(r.guest_phys_addr, r.end) for r in memory.regions] == model_regions()
    assert memory.size == 5 * GIB
    first, second, third = memory.regions
    assert second.userspace_addr == first.userspace_addr + 3 * GIB
    assert (third.backing, third.offset) == (memory.backings[1], 0)


class Slots(Vm):
    """Notes the slots that it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int]] = []

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, size: int, userspace_addr: int, *, readonly: bool = False
    ) -> None:
        self.asked.append((slot, guest_phys_addr, size, userspace_addr))


def test_what_is_excluded_is_in_no_slot(memory: GuestMemory) -> None:
    vm, start = Slots(), [region.userspace_addr for region in memory.regions]
    memory.map_into(vm, [PhysicalRange(2 * PAGE, 3 * PAGE), PhysicalRange(4 * GIB, 4 * GIB + PAGE)])
    assert vm.asked == [
        (0, 0, 2 * PAGE, start[0]),
        (1, 3 * PAGE, 3 * GIB - 3 * PAGE, start[0] + 3 * PAGE),
        (2, 4 * GIB + PAGE, GIB // 2 - PAGE, start[1] + PAGE),
        (3, 9 * GIB // 2, 3 * GIB // 2, start[2]),
    ]


def test_more_slots_than_there_are_for_ram_are_refused(memory: GuestMemory) -> None:
    holes = [PhysicalRange(n * PAGE, (n + 1) * PAGE) for n in range(1, 2 * DEVICE_SLOTS, 2)]
    with pytest.raises(BackendRefused, match="memory slots"):
        memory.map_into(Slots(), holes)


@given(ADDRESS, SIZE)
def test_an_access_is_inside_one_region_or_refused(memory: GuestMemory, address: int, size: int) -> None:
    inside = size >= 0 and any(start <= address and address + size <= end for start, end in model_regions())
    if inside:
        view = memory.view(address, size)
        assert len(view) == size
        view.release()
    else:
        with pytest.raises(GuestAddressError):
            memory.view(address, size)


@given(ADDRESS, st.binary(max_size=2 * PAGE))
def test_reads_and_writes_are_bounded_too(memory: GuestMemory, address: int, data: bytes) -> None:
    inside = any(start <= address and address + len(data) <= end for start, end in model_regions())
    if inside:
        memory.write(address, data)
        assert memory.read(address, len(data)) == data
    else:
        with pytest.raises(GuestAddressError):
            memory.write(address, data)
        with pytest.raises(GuestAddressError):
            memory.read(address, len(data))


def test_an_access_across_a_border_names_the_address(memory: GuestMemory) -> None:
    with pytest.raises(GuestAddressError, match="0xbfffffff, 2 bytes"):
        memory.read(MMIO_HOLE_START - 1, 2)
    with pytest.raises(GuestAddressError):
        memory.read(9 * GIB // 2 - 1, 2)  # RAM on both sides, but not next to each other in this process


def test_what_is_written_is_where_the_memslot_says(memory: GuestMemory) -> None:
    memory.write(MMIO_HOLE_END, b"above")
    region = memory.regions[1]
    assert bytes(region.backing.view[region.offset : region.offset + 5]) == b"above"
    memory.write(9 * GIB // 2, b"second")
    assert bytes(memory.backings[1].view[:6]) == b"second"


@given(st.lists(st.integers(1, 2 * GIB // PAGE), min_size=1, max_size=5))
def test_layout_is_contiguous_but_for_the_hole(pages: list[int]) -> None:
    backings = [backing(number * PAGE) for number in pages]
    try:
        regions = layout(backings)
        assert sum(region.size for region in regions) == sum(pages) * PAGE
        assert regions[0].guest_phys_addr == 0
        for before, after in itertools.pairwise(regions):
            assert after.guest_phys_addr == (MMIO_HOLE_END if before.end == MMIO_HOLE_START else before.end)
        for region in regions:
            assert region.size > 0
            assert region.end <= MMIO_HOLE_START or region.guest_phys_addr >= MMIO_HOLE_END
            assert 0 <= region.offset <= region.backing.size - region.size
    finally:
        for one in backings:
            one.close()


def test_three_gib_exactly_leave_no_empty_region() -> None:
    with backing(3 * GIB) as one:
        assert [(r.guest_phys_addr, r.size) for r in layout([one])] == [(0, 3 * GIB)]


def test_closed_memory_is_not_read() -> None:
    memory = GuestMemory([backing(PAGE)])
    memory.close()
    with pytest.raises(ValueError, match="released"):
        memory.read(0, 1)
    memory.close()
