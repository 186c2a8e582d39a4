"""Sets of intervals, compared with sets of numbers."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offmap.audit.intervals import Intervals, cut, distinct, overlaps

Ints = NDArray[np.int64]

LIST = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=10)


def columns(pairs: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def numbers(pairs: list[tuple[int, int]]) -> set[int]:
    return {number for start, length in pairs for number in range(start, start + length)}


@given(LIST)
def test_union(pairs: list[tuple[int, int]]) -> None:
    start, length = columns(pairs)
    union = Intervals.union(start, start + length)
    found = [n for a, b in zip(union.start.tolist(), union.end.tolist(), strict=True) for n in range(a, b)]
    assert found == sorted(numbers(pairs))
    assert union.size == len(found)
    assert (union.start[1:] > union.end[:-1]).all()  # neighbours that touch are one
    every = np.arange(60)
    assert np.flatnonzero(union.contains(every)).tolist() == found
    assert union.edges.tolist() == sorted([*union.start.tolist(), *union.end.tolist()])


@given(LIST, LIST)
def test_minus(pairs: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    one, other = (Intervals.union(start, start + length) for start, length in map(columns, (pairs, others)))
    every = np.arange(60)
    assert set(every[one.minus(other).contains(every)].tolist()) == numbers(pairs) - numbers(others)


@given(LIST, st.lists(st.integers(0, 50), max_size=8))
def test_cut(pairs: list[tuple[int, int]], at: list[int]) -> None:
    edges = distinct(np.array(at, dtype=np.int64))
    source, offset, length = cut(*columns(pairs), edges)
    expected = []
    for index, (start, pages) in enumerate(pairs):
        ends = [start, *sorted(edge for edge in set(at) if start < edge < start + pages), start + pages]
        expected += [(index, a - start, b - a) for a, b in itertools.pairwise(ends)]
    assert list(zip(source.tolist(), offset.tolist(), length.tolist(), strict=True)) == expected


@given(LIST, LIST)
def test_overlaps(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    one, two = overlaps(*columns(first), *columns(second))
    expected = {
        (i, j) for i, a in enumerate(first) for j, b in enumerate(second) if a[0] < b[0] + b[1] and b[0] < a[0] + a[1]
    }
    found = list(zip(one.tolist(), two.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(st.lists(st.lists(st.integers(0, 20), max_size=6), min_size=1, max_size=3))
def test_distinct(lists: list[list[int]]) -> None:
    assert distinct(*(np.array(each, dtype=np.int64) for each in lists)).tolist() == sorted(
        set(itertools.chain(*lists))
    )
