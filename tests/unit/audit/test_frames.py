"""Runs of frames, compared with what each page's own entry says; over pagemap files made here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.audit import frames as module
from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN, Frames, _Building, _drop_huge_zero_page, _look
from offmap.audit.pageflags import KPF_ZERO_PAGE, PageFlags
from offmap.audit.pagemap import PagemapEnds

from .frames_of_pages import frames_of_pages

PRESENT, SWAPPED, FILE, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 55
MISSING = module._MISSING
ZERO = 7  # the frame of the page of zeroes
AWAY = 3

ENTRY = st.one_of(
    st.tuples(st.just(POPULATED), st.integers(1, 12)),
    st.tuples(st.sampled_from([UNKNOWN, MISSING]), st.just(0)),
)


@contextmanager
def pagemap_of(entries: list[int], folder: Path) -> Iterator[int]:
    path = folder / "pagemap"
    path.write_bytes(np.array(entries, dtype=np.uint64).tobytes())
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def entry(state: int, frame: int) -> int:
    # What stands in the low bits of a swapped page is its place in the swap, and no frame.
    return {POPULATED: PRESENT | FILE | SOFT_DIRTY | frame, UNKNOWN: SWAPPED | 0x1234, MISSING: SOFT_DIRTY}[state]


def by_page(frames: Frames) -> list[tuple[int, int, int]]:
    """(state, frame, reason) of each page."""
    found: list[tuple[int, int, int]] = []
    for first, pages, pfn, state, why in zip(
        frames.page, frames.pages, frames.pfn, frames.state, frames.why, strict=True
    ):
        assert first == len(found)
        found += [(int(state), int(pfn) + n if state == POPULATED else 0, int(why)) for n in range(pages)]
    assert len(found) == frames.total
    return found


def check_runs(frames: Frames) -> None:
    """Neighbours that could be one run are."""
    end = frames.pfn + frames.pages
    same = (frames.state[1:] == frames.state[:-1]) & (frames.why[1:] == frames.why[:-1])
    assert not (same & ((frames.state[1:] != POPULATED) | (frames.pfn[1:] == end[:-1]))).any()


@settings(max_examples=200)
@given(st.lists(ENTRY, min_size=1, max_size=20))
def test_runs_say_of_each_page_what_pagemap_does(
    tmp_path_factory: pytest.TempPathFactory, pages: list[tuple[int, int]]
) -> None:
    with pagemap_of([entry(*page) for page in pages], tmp_path_factory.getbasetemp()) as fd:
        frames = _look(fd, 0, len(pages), ZERO, AWAY)
    expected = [
        (EMPTY, 0, 0) if page == (POPULATED, ZERO) else (*page, AWAY if page[0] == UNKNOWN else 0) for page in pages
    ]
    assert by_page(frames) == expected
    check_runs(frames)


def test_pagemap_that_ends_is_not_taken_for_missing_pages(tmp_path: Path) -> None:
    with pagemap_of([entry(POPULATED, 5)], tmp_path) as fd, pytest.raises(PagemapEnds):
        _look(fd, 0, 2, ZERO, AWAY)


@given(st.lists(st.tuples(st.sampled_from([UNKNOWN, EMPTY, POPULATED]), st.integers(1, 9)), max_size=20))
def test_pages_become_the_fewest_runs(pages: list[tuple[int, int]]) -> None:
    frames = frames_of_pages(np.array([pfn for _, pfn in pages]), np.array([state for state, _ in pages]))
    assert [page[:2] for page in by_page(frames)] == [(s, pfn if s == POPULATED else 0) for s, pfn in pages]
    check_runs(frames)


def test_pieces_join_but_ranges_do_not() -> None:
    building = _Building()
    building.begin_range()
    building.add_run(4, POPULATED, 100)
    building.add_run(4, POPULATED, 104)
    building.add_unknown(2, "why")
    building.add_unknown(1, "why")
    building.begin_range()
    building.add_unknown(3, "why")
    building.add_run(0, EMPTY)
    frames = building.frames()
    assert (frames.page.tolist(), frames.pages.tolist()) == ([0, 8, 11], [8, 3, 3])
    assert [frames.reasons[why] for why in frames.why] == ["", "why", "why"]


def test_reasons_that_a_process_makes_up_have_a_limit() -> None:
    building = _Building()
    for number in range(1000):
        building.add_unknown(1, f"in no page table ({number})")
    frames = building.frames()
    assert frames.total == 1000 and len(frames.reasons) <= 256
    assert frames.reasons[int(frames.why[-1])] == "for too many different reasons to list"


def test_huge_page_of_zeroes_is_told_by_standing_in_two_places(tmp_path: Path) -> None:
    path = tmp_path / "kpageflags"
    flags = np.zeros(6 * 512, dtype=np.uint64)
    flags[2 * 512 : 3 * 512] = 1 << KPF_ZERO_PAGE
    path.write_bytes(flags.tobytes())
    building = _Building()
    building.add_run(512, POPULATED, 1024)
    # A page of the guest's that happens to follow it in physical memory must not go with it.
    building.add_run(600, POPULATED, 1024)
    building.add_run(512, POPULATED, 2048)
    building.add_run(512, POPULATED, 2048)
    with PageFlags(str(path)) as page_flags:
        frames = _drop_huge_zero_page(building.frames(), page_flags)
    assert list(zip(frames.page.tolist(), frames.state.tolist(), frames.pfn.tolist(), strict=True)) == [
        (0, EMPTY, 0),
        (512, EMPTY, 0),
        (1024, POPULATED, 1536),
        (1112, POPULATED, 2048),
        (1624, POPULATED, 2048),
    ]
