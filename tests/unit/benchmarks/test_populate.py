"""What of the measuring of guest RAM needs no RAM."""

from collections.abc import Callable
from types import ModuleType

import pytest

from offmap.memory.backend import BACKENDS


@pytest.fixture
def populate(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("populate")


def test_every_backend_is_measured_somewhere(populate: ModuleType) -> None:
    assert list(populate.ram.KINDS) == list(BACKENDS)
    assert {kind for kinds in populate.WHERE.values() for kind in kinds} == set(BACKENDS)
    assert populate.ram.SELF_THREADED.keys() <= BACKENDS.keys()
    assert set(populate.WHERE) == set(populate.PLACES)


@pytest.mark.parametrize("size", [2 << 20, 64 << 20, (64 << 20) + 4096])
@pytest.mark.parametrize("threads", [1, 2, 3, 200])
def test_threads_share_all_of_it_in_whole_units(populate: ModuleType, size: int, threads: int) -> None:
    shares = populate.ram.shares(size, threads, 2 << 20)
    assert 1 <= len(shares) <= threads
    end = 0
    for start, length in shares:
        assert start == end
        assert start % (2 << 20) == 0
        assert length > 0
        end += length
    assert end == size


def test_by_turns_alternates_and_leaves_the_warming_up_out(populate: ModuleType) -> None:
    calls: list[str] = []

    def take(name: str) -> tuple[float, float]:
        calls.append(name)
        return float(len(calls)), 0.0

    ours, peer = populate.by_turns(2, lambda: take("ours"), lambda: take("peer"))
    assert calls == ["peer", "ours", "ours", "peer", "peer", "ours"]
    assert (populate.got(ours), populate.got(peer)) == ([3.0, 6.0], [4.0, 5.0])


def test_two_threads_only_where_they_can_help(populate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate.os, "cpu_count", lambda: 1)
    assert populate.thread_counts("memfd") == (1,)
    monkeypatch.setattr(populate.os, "cpu_count", lambda: 4)
    assert populate.thread_counts("memfd") == (1, 2)
    assert populate.thread_counts("unplugged") == (1,)


def test_no_more_secret_memory_than_may_be_locked(populate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for hard, size in ((populate.resource.RLIM_INFINITY, 64 << 20), ((8 << 20) + 5, 8 << 20), (1 << 40, 64 << 20)):
        monkeypatch.setattr(populate.resource, "getrlimit", lambda _, hard=hard: (0, hard))
        assert populate.secret_size() == size
