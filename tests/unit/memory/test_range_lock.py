"""Arbitration between VMMs: two processes never get the same memory, and one that is killed holds none."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.errors import KernelError
from offmap.memory.iomem import PhysicalRange
from offmap.memory.range_lock import RangeLock

MIB = 1 << 20
ALL = [PhysicalRange(256 * MIB, 512 * MIB)]

HOLDER = """
import sys
from pathlib import Path
from offmap.memory.iomem import PhysicalRange
from offmap.memory.range_lock import RangeLock
lock = RangeLock(Path(sys.argv[1]))
taken = lock.take([PhysicalRange(int(sys.argv[2]), int(sys.argv[3]))], int(sys.argv[4]), 4096)
print(taken.start if taken else None, flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that takes a range, and holds it until it is told to end or is killed."""

    def __init__(self, path: Path, size: int) -> None:
        words = [str(path), str(ALL[0].start), str(ALL[0].end), str(size)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.start = self.process.stdout.readline().strip()

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mem"
    file.touch()
    return file


@pytest.fixture
def holder(path: Path) -> Iterator[Holder]:
    one = Holder(path, 128 * MIB)
    yield one
    one.end()


def test_first_fit_and_no_overlap(path: Path) -> None:
    with RangeLock(path) as a, RangeLock(path) as b, RangeLock(path) as c:
        assert a.take(ALL, 64 * MIB, 2 * MIB) == PhysicalRange(256 * MIB, 320 * MIB)
        assert b.take(ALL, 128 * MIB, 2 * MIB) == PhysicalRange(320 * MIB, 448 * MIB)
        assert c.take(ALL, 128 * MIB, 2 * MIB) is None
        b.close()
        assert c.take(ALL, 128 * MIB, 2 * MIB) == PhysicalRange(320 * MIB, 448 * MIB)


def test_alignment_is_kept_beyond_a_holder(path: Path) -> None:
    with RangeLock(path) as a, RangeLock(path) as b:
        assert a.take(ALL, 3 * 4096, 4096)
        assert b.take(ALL, 2 * MIB, 2 * MIB) == PhysicalRange(258 * MIB, 260 * MIB)


def test_another_process_is_respected(path: Path, holder: Holder) -> None:
    assert holder.start == str(256 * MIB)
    with RangeLock(path) as lock:
        assert lock.held_by_others(ALL[0]) == [PhysicalRange(256 * MIB, 384 * MIB)]
        assert lock.take(ALL, 256 * MIB, 4096) is None
        assert lock.take(ALL, 128 * MIB, 4096) == PhysicalRange(384 * MIB, 512 * MIB)
        assert lock.held_by_others(ALL[0]) == [PhysicalRange(256 * MIB, 384 * MIB)], "our own lock is not another's"


def test_a_killed_process_holds_nothing_at_once(path: Path, holder: Holder) -> None:
    with RangeLock(path) as lock:
        assert lock.take(ALL, 256 * MIB, 4096) is None
        os.kill(holder.process.pid, signal.SIGKILL)
        # A pidfd is readable when the process is dead, and before anybody has waited for it.
        pidfd = os.pidfd_open(holder.process.pid)
        try:
            assert select.select([pidfd], [], [], 10)[0]
        finally:
            os.close(pidfd)
        assert lock.take(ALL, 256 * MIB, 4096) == ALL[0]


def test_a_child_that_was_not_told_of_it_does_not_prolong_it(path: Path) -> None:
    lock = RangeLock(path)
    lock.take(ALL, 256 * MIB, 4096)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        lock.close()
        with RangeLock(path) as after:
            assert after.take(ALL, 256 * MIB, 4096) == ALL[0]
    finally:
        child.communicate()


def test_many_at_once_share_without_overlap(path: Path) -> None:
    holders = [Holder(path, 48 * MIB) for _ in range(4)]
    try:
        starts = [int(one.start) for one in holders]
        assert len(set(starts)) == 4
        assert all(abs(a - b) >= 48 * MIB for a in starts for b in starts if a != b)
        late = Holder(path, 80 * MIB)
        late.end()
        assert late.start == "None"
    finally:
        for one in holders:
            one.end()


@settings(max_examples=50, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 4, 16]), st.booleans()), max_size=12),
    pieces=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 60)), min_size=1, max_size=3),
)
def test_ranges_are_disjoint_aligned_and_given_whenever_there_is_room(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int, bool]], pieces: list[tuple[int, int]]
) -> None:
    free = [
        PhysicalRange((200 * n + start) * 4096, (200 * n + start + size) * 4096)
        for n, (start, size) in enumerate(pieces)
    ]
    path = tmp_path_factory.mktemp("locks") / "lock"
    path.touch()
    held: list[tuple[RangeLock, PhysicalRange]] = []
    try:
        for pages, alignment, frees_one in requests:
            if frees_one and held:
                held.pop(0)[0].close()
            lock = RangeLock(path)
            taken = lock.take(free, pages * 4096, alignment * 4096)
            used = {page for _, r in held for page in range(r.start // 4096, r.end // 4096)}
            fits = [
                start
                for r in free
                for start in range(-(-r.start // 4096 // alignment) * alignment, r.end // 4096 - pages + 1, alignment)
                if not used & set(range(start, start + pages))
            ]
            if taken is None:
                lock.close()
                assert not fits
            else:
                held.append((lock, taken))
                assert taken == PhysicalRange(fits[0] * 4096, (fits[0] + pages) * 4096)
        with RangeLock(path) as other:
            seen = other.held_by_others(PhysicalRange(0, 4096 * 4096))
            assert seen == sorted(r for _, r in held)
    finally:
        for lock, _ in held:
            lock.close()


def test_no_file_to_lock_is_one_line_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"open of .*run as root"):
        RangeLock(tmp_path / "mem")
    assert not (tmp_path / "mem").exists()


def test_a_device_can_be_locked() -> None:
    device = Path("/dev/full")  # as /dev/mem is no file of any folder that could be cleaned
    with RangeLock(device) as one, RangeLock(device) as other:
        assert one.take(ALL, 256 * MIB, 4096)
        assert other.take(ALL, 4096, 4096) is None
        assert other.held_by_others(ALL[0]) == ALL


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelError, match="open of"):
        RangeLock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_one_that_lets_go_just_after_it_was_in_the_way_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "lock").touch()
    with RangeLock(file) as other, RangeLock(file) as ours:
        assert other.take(ALL, ALL[0].size, 4096)
        really = ours.take

        def take(free: list[PhysicalRange], size: int, alignment: int) -> PhysicalRange | None:
            taken = really(free, size, alignment)
            other.close()
            return taken

        monkeypatch.setattr(ours, "take", take)
        assert ours.take_soon(ALL, ALL[0].size, (4096,)) == ALL[0]
