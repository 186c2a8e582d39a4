"""The guest's pages by their frames."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.guest_pages import GuestPages
from offmap.audit.guest_ram import RamRange
from offmap.audit.result import Source

PAGE = 4096


def of(frames: list[int], gpa: int | None = 0x10_0000, va: int = 0x7000_0000) -> GuestPages:
    """One range with these frames, a run each."""
    count = len(frames)
    ranges = [RamRange(va, count * PAGE, Source.MEMSLOT, gpa)]
    return GuestPages.of(
        np.arange(count, dtype=np.int64), np.array(frames, dtype=np.int64), np.ones(count, dtype=np.int64), ranges
    )


@given(st.lists(st.integers(0, 500), unique=True, min_size=1, max_size=40))
def test_every_frame_is_found_and_no_other(frames: list[int]) -> None:
    guest = of(frames)
    for frame in range(501):
        expected = None
        if frame in frames:
            index = frames.index(frame)
            expected = (0x7000_0000 + index * PAGE, 0x10_0000 + index * PAGE)
        assert guest.find(frame) == expected
        assert (frame in guest) == (expected is not None)


@given(st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=40))
def test_seams_are_the_neighbours_that_are_none_in_ram(frames: list[int]) -> None:
    first, second = of(frames).seams()
    expected = {(a, b) for a, b in pairwise(frames) if b != a + 1}
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
    assert first.tolist() == sorted(first.tolist())


def test_ranges_without_guest_addresses_and_gaps_between_ranges() -> None:
    ranges = [RamRange(0x1000, 2 * PAGE, Source.REQUESTED), RamRange(0x9000, PAGE, Source.REQUESTED)]
    guest = GuestPages.of(np.array([0, 2]), np.array([50, 70]), np.array([2, 1]), ranges)
    assert guest.find(51) == (0x2000, None)
    assert guest.find(70) == (0x9000, None)
    assert not len(guest.seams()[0])


def test_a_frame_that_stands_behind_two_pages_is_the_guests() -> None:
    guest = GuestPages(np.array([10, 12]), np.array([5, 1]), np.array([0x1000, 0x9000]), np.array([-1, -1]))
    assert 13 in guest and guest.find(13) == (0x4000, None)


def test_no_guest_at_all() -> None:
    assert 0 not in GuestPages.none() and not len(GuestPages.none().seams()[0])
