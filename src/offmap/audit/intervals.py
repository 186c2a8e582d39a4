"""Sets of numbers as sorted, disjoint intervals, and what overlaps what: whole arrays at once.

The numbers are page frames or page indices, as int64; an interval is [start, end). Everything takes time in the number
of intervals, never in the number of pages.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Intervals:
    """A set: ``start`` ascending, ``start[i] < end[i] < start[i + 1]``."""

    start: Ints
    end: Ints

    @classmethod
    def union(cls, start: Ints, end: Ints) -> "Intervals":
        """The set that all these intervals, in any order and overlapping or not, make up together."""
        some = end > start
        start, end = start[some], end[some]
        if not len(start):
            return cls(start, end)
        order = np.argsort(start, kind="stable")
        start, reach = start[order], np.maximum.accumulate(end[order])
        first = run_starts(start[1:] > reach[:-1], len(start))
        last = np.append(first[1:] - 1, len(start) - 1)
        return cls(start[first], reach[last])

    def minus(self, other: "Intervals") -> "Intervals":
        """What is in this set and not in the other."""
        edges = distinct(self.edges, other.edges)
        start = edges[:-1]
        keep = self.contains(start) & ~other.contains(start)
        return Intervals.union(start[keep], edges[1:][keep])

    @property
    def edges(self) -> Ints:
        """All starts and ends, ascending."""
        return np.stack((self.start, self.end), axis=1).reshape(-1)

    @property
    def size(self) -> int:
        """How many numbers are in the set."""
        return int((self.end - self.start).sum())

    def contains(self, numbers: Ints) -> NDArray[np.bool_]:
        """Whether each number is in the set."""
        if not len(self.start):
            return np.zeros(len(numbers), dtype=np.bool_)
        index = np.searchsorted(self.start, numbers, side="right") - 1
        return np.asarray((index >= 0) & (numbers < self.end[np.maximum(index, 0)]), dtype=np.bool_)


def distinct(*numbers: Ints) -> Ints:
    """All these numbers, ascending, each once: np.unique hashes them, which takes ten times as long."""
    every = np.sort(np.concatenate(numbers), kind="stable")
    return np.asarray(every[run_starts(every[1:] != every[:-1], len(every))], dtype=np.int64)


def run_starts(breaks: NDArray[np.bool_], length: int) -> NDArray[np.intp]:
    """Where runs begin in a column of ``length`` rows, by whether a run ends between each row and the next."""
    return np.flatnonzero(np.concatenate((np.ones(min(length, 1), dtype=np.bool_), breaks)))


def cut(start: Ints, length: Ints, edges: Ints) -> tuple[NDArray[np.intp], Ints, Ints]:
    """Cut intervals wherever an edge lies inside.

    Args:
        start, length: the intervals, in any order; they may overlap.
        edges: ascending.

    Returns:
        (source, offset, length) of each piece, in order of their source and of their offset in it.
    """
    low = np.searchsorted(edges, start, side="right")
    high = np.maximum(np.searchsorted(edges, start + length, side="left"), low)
    inside = high - low
    source = np.repeat(np.arange(len(start)), inside + 1)
    # The n-th piece of a source begins at its n-th edge inside; the first at its start.
    nth = np.arange(len(source)) - np.repeat(np.cumsum(inside + 1) - inside - 1, inside + 1)
    offset = np.zeros(len(source), dtype=np.int64)
    later = nth > 0
    offset[later] = edges[low[source[later]] + nth[later] - 1] - start[source[later]]
    after = np.empty(len(source), dtype=np.int64)
    after[:-1] = offset[1:]
    last = nth == inside[source]
    after[last] = length[source[last]]
    return source, offset, after - offset


def overlaps(start: Ints, length: Ints, others: Ints, other_length: Ints) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of every pair of intervals, one of each list, that have a number in common, in no particular order.

    Either list may be in any order and may overlap itself.
    """
    # Of two that overlap, one begins inside the other: the second inside the first, or else the first strictly so.
    host, guest = _begins_inside(others, other_length, start, strictly=False)
    first, second = _begins_inside(start, length, others, strictly=True)
    return np.concatenate((guest, first)), np.concatenate((host, second))


def _begins_inside(
    start: Ints, length: Ints, points: Ints, *, strictly: bool
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs (interval, point) with the point in the interval; strictly: not at its start."""
    order = np.argsort(points, kind="stable")
    ordered = points[order]
    low = np.searchsorted(ordered, start, side="right" if strictly else "left")
    high = np.maximum(np.searchsorted(ordered, start + length, side="left"), low)
    count = high - low
    interval = np.repeat(np.arange(len(start)), count)
    nth = np.arange(len(interval)) - np.repeat(np.cumsum(count) - count, count)
    return interval, order[low[interval] + nth]
