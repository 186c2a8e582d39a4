"""Counting and naming who shares pages; over a made-up /proc/kpagecount, and this process's own children."""

import itertools
import mmap
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit import sharers
from offmap.audit.intervals import Intervals
from offmap.audit.process import parse_maps
from offmap.audit.sharers import count_sharing
from offmap.errors import Undetermined


def counted(tmp: Path, counts: list[int], runs: list[tuple[int, int]]) -> tuple[int, int, int]:
    """(shared, uncounted, extra) of a process that maps these (first, pages) runs, all of them the guest's."""
    path = tmp / "kpagecount"
    path.write_bytes(np.array(counts, dtype=np.uint64).tobytes())
    first, pages = (np.array(column, dtype=np.int64) for column in zip(*runs, strict=True))
    sharing, extra = count_sharing((first, pages), (first, pages), str(path))
    return sharing.shared_pages, sharing.uncounted_pages, extra


def test_what_is_counted_beyond_the_processs_own_is_shared(tmp_path: Path) -> None:
    counts = [9, 1, 3, 2, 0, 1, 7]
    assert counted(tmp_path, counts, [(1, 5)]) == (2, 1, 3)
    # A frame that stands behind two of the guest's pages (KSM) is mapped twice by it, and is two pages.
    assert counted(tmp_path, counts, [(1, 5), (2, 2)]) == (2, 1, 1)


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 8)), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_windows_cover_the_set_once_and_little_else(runs: list[tuple[int, int]], window: int, gap: int) -> None:
    first, pages = (np.array(column, dtype=np.int64) for column in zip(*runs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharers, "_WINDOW", window)
        patch.setattr(sharers, "_GAP", gap)
        windows = list(sharers._windows(Intervals.union(first, first + pages)))
    assert all(0 < length.sum() < 2 * window for _, length in windows)
    stretches = [each for start, length in windows for each in zip(start.tolist(), length.tolist(), strict=True)]
    assert all(one[0] + one[1] <= two[0] for one, two in itertools.pairwise(stretches))
    covered = {frame for low, count in stretches for frame in range(low, low + count)}
    wanted = {frame for start, count in runs for frame in range(start, start + count)}
    assert covered >= wanted
    # What else is read lies between two of its pages, no further apart than that.
    for frame in covered - wanted:
        below, above = max(each for each in wanted if each < frame), min(each for each in wanted if each > frame)
        assert above - below - 1 <= gap


def test_no_kpagecount_is_undetermined(tmp_path: Path) -> None:
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(Undetermined, match="CONFIG_PROC_PAGE_MONITOR"):
        count_sharing((one, one), (one, one), str(tmp_path / "none"))


def test_parts_of_a_mapping_outside_the_ranges() -> None:
    (mapping,) = parse_maps("7f0000000000-7f0000008000 rw-s 00000000 00:01 99 /memfd:ram\n")
    ranges = [(0x7F00_0000_0000 + start, 0x7F00_0000_0000 + end) for start, end in ((0, 0x1000), (0x3000, 0x5000))]
    assert [(start & 0xFFFF, end & 0xFFFF) for start, end in sharers._outside(mapping, ranges)] == [
        (0x1000, 0x3000),
        (0x5000, 0x8000),
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: which process shares a page was not tried")
def test_process_that_shares_a_file_is_named() -> None:
    from offmap.audit import pagemap
    from offmap.audit.own_memory import OwnPage
    from offmap.audit.process import Process
    from offmap.audit.sharers import name_sharers

    try:
        with OwnPage() as own:
            own.pfn()
    except Undetermined as error:
        pytest.skip(f"which process shares a page was not tried: {error}")
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8 * 4096)
    ready, tell = os.pipe()
    with mmap.mmap(fd, 8 * 4096) as memory:
        memory[:] = b"x" * len(memory)
        pid = os.fork()
        if pid == 0:
            with mmap.mmap(fd, 8 * 4096) as again:
                for page in range(8):
                    again[page * 4096]
                os.write(tell, b"!")
                signal.pause()
        os.read(ready, 1)
        try:
            with Process(os.getpid()) as process:
                mapping = next(each for each in process.maps() if each.path.startswith("/memfd:ram"))
                entries = pagemap.read_pagemap(process.pagemap, mapping.start, 8)
            frames = pagemap.pfn(entries).astype(np.int64)
            found, _ = name_sharers(
                Intervals.union(frames, frames + 1), {os.getpid()}, {(mapping.device, mapping.inode)}, None
            )
            assert [(each.pid, each.pages) for each in found] == [(pid, 8)]
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            for each in (fd, ready, tell):
                os.close(each)


def test_memory_that_is_not_the_kernels_has_no_count_and_is_not_asked_for() -> None:
    runs = (np.array([0, 10, 90], dtype=np.int64), np.array([4, 20, 5], dtype=np.int64))
    (first, pages), uncounted = sharers._online(runs, [(2 * 4096, 15 * 4096), (20 * 4096, 25 * 4096)])
    assert (first.tolist(), pages.tolist(), uncounted) == ([2, 10, 20], [2, 5, 5], 2 + 5 + 5 + 5)
    assert sharers._online(runs, [])[1] == 29
