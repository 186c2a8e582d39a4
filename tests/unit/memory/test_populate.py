"""Giving a mapping its frames: all of it, by any number of threads, with the share that is done."""

import mmap

import pytest

from offmap.memory.backing import Backing
from offmap.memory.populate import PIECE, populate

ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [4096, PIECE, PIECE + 4096, 3 * PIECE])
def test_all_of_it_and_every_share(threads: int, size: int) -> None:
    with Backing("memory", -1, size, flags=ANON) as backing:
        for position in range(0, size, 4096):
            backing.view[position] = 1
        shares: list[float] = []
        populate(backing, threads, shares.append)
        assert bytes(backing.view) == bytes(size)
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_who_is_told_may_put_an_end_to_it() -> None:
    class Stop(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0:
            raise Stop

    with Backing("memory", -1, 8 * PIECE, flags=ANON) as backing, pytest.raises(Stop):
        populate(backing, 1, stop)
