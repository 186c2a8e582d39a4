"""The scan: what is read, and that canaries and secrets are found wherever they stand."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.audit import scan as scanning
from offmap.audit import search as searching
from offmap.audit.canary import CANARY_LENGTH, PREFIX, CanaryKey, make_canary, new_key
from offmap.audit.kcore import Segment
from offmap.audit.mappings import RUN, KernelMappings
from offmap.audit.own_memory import LockedBuffer
from offmap.audit.readable import Piece, by_address, clip, image_tail, read_plan
from offmap.audit.regions import KERNEL_TEXT, Layout
from offmap.audit.scan import canary_pattern, secret_pattern
from offmap.audit.search import Lane, Seams, buffer_size, search
from offmap.audit.secret import Secret
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.errors import OffmapError

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
VMALLOC = 0xFFFF_C900_0000_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
KEY = new_key()


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30)), max_size=6),
    st.lists(st.integers(0, 140), unique=True, max_size=8).map(sorted),
)
def test_clip_divides_every_byte_once(pieces: list[tuple[int, int]], edges: list[int]) -> None:
    intervals = list(zip(edges[::2], edges[1::2], strict=False))
    inside, outside = clip([Piece(1000 + pa, pa, size) for pa, size in pieces], intervals)

    def addresses(parts: list[Piece]) -> list[int]:
        return sorted(pa for part in parts for pa in range(part.pa, part.pa + part.bytes))

    wanted = [pa for start, size in pieces for pa in range(start, start + size)]
    is_in = [any(start <= pa < end for start, end in intervals) for pa in wanted]
    assert addresses(inside) == sorted(pa for pa, hit in zip(wanted, is_in, strict=True) if hit)
    assert addresses(outside) == sorted(pa for pa, hit in zip(wanted, is_in, strict=True) if not hit)
    assert all(part.va - part.pa == 1000 for part in inside + outside)


def test_what_is_read_and_what_is_not() -> None:
    runs = np.zeros(6, dtype=RUN)
    runs[0] = (BASE, 0, 100 * PAGE, 1, True, True, True)
    runs[1] = (VMALLOC, 10 * PAGE, PAGE, 1, True, True, True)  # a page that is in the direct map too
    runs[2] = (VMALLOC + PAGE, 200 * PAGE, PAGE, 1, True, True, True)  # one that is not: must not be asked for
    runs[3] = (VMALLOC + 2 * PAGE, 11 * PAGE, PAGE, 1, True, True, True)  # an ioremap area
    runs[4] = (VMALLOC + 3 * PAGE, 900 * PAGE, PAGE, 1, True, True, True)  # a device: no RAM
    runs[5] = (0xFFFF_FE00_0000_0000, 12 * PAGE, PAGE, 1, True, True, True)  # cpu_entry_area: in no segment
    segments = [
        Segment(BASE, 0, 300 * PAGE, 0),
        Segment(VMALLOC, None, 32 << 40, 0),
    ]
    readable, unread = read_plan(
        KernelMappings(runs, (), {}, BASE),
        [(0, 300 * PAGE)],
        segments,
        VMEMMAP,
        [(50 * PAGE, 51 * PAGE)],
        [(VMALLOC + 2 * PAGE, VMALLOC + 4 * PAGE)],
    )
    assert readable == [
        Piece(BASE, 0, 50 * PAGE),
        Piece(BASE + 51 * PAGE, 51 * PAGE, 49 * PAGE),
        Piece(VMALLOC, 10 * PAGE, PAGE),
    ]
    assert sorted(piece.pa // PAGE for piece in unread) == [11, 12, 50, 200]


def test_what_lies_behind_the_kernels_image_is_read_if_it_is_mapped_nowhere_else() -> None:
    image = 0xFFFF_FFFF_8100_0000
    layout = Layout([(START_KERNEL_MAP, START_KERNEL_MAP + (1 << 30), KERNEL_TEXT)])
    tail, bad = Piece(image, 20 * PAGE, 4 * PAGE), Piece(image + 4 * PAGE, 24 * PAGE, PAGE)
    others = [Piece(VMALLOC, 7 * PAGE, PAGE), Piece(VMALLOC + PAGE, 21 * PAGE, PAGE)]
    unread, zeroes = [*others, tail, bad], [(24 * PAGE, 25 * PAGE)]
    assert image_tail(unread, [Piece(BASE, 20 * PAGE, 3 * PAGE)], layout, zeroes) == ([tail], [*others, bad])
    assert image_tail(unread, [Piece(BASE, 20 * PAGE, 4 * PAGE)], layout, zeroes) == ([], unread)


def test_a_read_is_divided_by_address() -> None:
    asked: list[tuple[str, int, int]] = []

    def reader(name: str) -> Callable[[int, memoryview], None]:
        return lambda va, buffer: asked.append((name, va, len(buffer)))

    read = by_address(reader("kcore"), reader("other"), [Piece(100, 0, 10), Piece(110, 50, 5), Piece(130, 90, 10)])
    for va, size in ((0, 100), (90, 60), (105, 7), (140, 1)):
        read(va, memoryview(bytearray(size)))
    assert asked == [
        ("kcore", 0, 100),
        *[("kcore", 90, 10), ("other", 100, 10), ("other", 110, 5), ("kcore", 115, 15), ("other", 130, 10)],
        *[("kcore", 140, 10), ("other", 105, 5), ("other", 110, 2), ("kcore", 140, 1)],
    ]


class Memory:
    """Kernel memory from ``va`` on."""

    def __init__(self, size: int, va: int = BASE) -> None:
        self.va, self.bytes = va, bytearray(size)

    def read(self, va: int, buffer: memoryview) -> None:
        at = va - self.va
        buffer[:] = self.bytes[at : at + len(buffer)]


@contextmanager
def lanes(read: Callable[[int, memoryview], None], span: int, count: int = 1) -> Iterator[list[Lane]]:
    """What ``count`` threads read with."""
    buffers = [LockedBuffer(buffer_size(span)) for _ in range(count)]
    try:
        yield [Lane(read, buffer) for buffer in buffers]
    finally:
        for buffer in buffers:
            buffer.close()


def canaries(pieces: list[Piece], memory: Memory, key: CanaryKey, threads: int = 1) -> list[tuple[int, int, int]]:
    """(address, physical address, number) of each canary."""
    with LockedBuffer(PAGE) as prefix, lanes(memory.read, CANARY_LENGTH, threads) as readers:
        hits = search(pieces, readers, canary_pattern(prefix, (key,)))
    return [(hit.va, hit.pa, what[1].number) for hit, what in hits]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("buffer", [PAGE, 2 * PAGE])
def test_canary_is_found_at_any_offset_of_a_page_and_across_two(
    buffer: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_BUFFER", buffer)
    for offset in [0, 1, 7, PAGE - CANARY_LENGTH, *range(PAGE - CANARY_LENGTH + 1, PAGE + 1, 5), 2 * PAGE - 1]:
        memory = Memory(4 * PAGE)
        memory.bytes[offset : offset + CANARY_LENGTH] = make_canary(KEY, 5)
        found = canaries([Piece(BASE, 0x7000, 4 * PAGE)], memory, KEY, threads)
        assert found == [(BASE + offset, 0x7000 + offset, 5)]


def test_canary_is_found_once_where_pieces_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_BUFFER", PAGE)
    memory = Memory(3 * PAGE)
    memory.bytes[2 * PAGE - 10 : 2 * PAGE - 10 + CANARY_LENGTH] = make_canary(KEY, 1)
    memory.bytes[0:CANARY_LENGTH] = make_canary(KEY, 2)
    pieces = [Piece(BASE, 0x9000, 2 * PAGE), Piece(BASE + 2 * PAGE, 0x20_0000, PAGE)]
    found = canaries(pieces, memory, KEY)
    assert [(pa, number) for _, pa, number in found] == [(0x9000, 2), (0x9000 + 2 * PAGE - 10, 1)]


def test_halves_on_both_sides_of_a_gap_are_no_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_BUFFER", PAGE)
    canary = make_canary(KEY, 1)
    memory = Memory(4 * PAGE)
    memory.bytes[PAGE - 20 : PAGE] = canary[:20]
    memory.bytes[2 * PAGE : 2 * PAGE + len(canary) - 20] = canary[20:]
    assert canaries([Piece(BASE, 0, PAGE), Piece(BASE + 2 * PAGE, 0x9000, PAGE)], memory, KEY) == []


def test_prefix_alone_other_keys_and_nested_prefixes() -> None:
    memory = Memory(2 * PAGE)
    memory.bytes[0 : len(PREFIX)] = PREFIX
    memory.bytes[100 : 100 + CANARY_LENGTH] = make_canary(new_key(), 1)
    memory.bytes[300 - len(PREFIX) : 300] = PREFIX
    memory.bytes[300 : 300 + CANARY_LENGTH] = make_canary(KEY, 9)
    found = canaries([Piece(BASE, 0, 2 * PAGE)], memory, KEY)
    assert [(pa, number) for _, pa, number in found] == [(300, 9)]


def test_progress_ends_at_all() -> None:
    shares: list[float] = []
    with LockedBuffer(PAGE) as prefix, lanes(Memory(8 << 20).read, CANARY_LENGTH, 2) as readers:
        search([Piece(BASE, 0, 8 << 20)], readers, canary_pattern(prefix, (KEY,)), shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_failing_thread_ends_the_search() -> None:
    def read(va: int, buffer: memoryview) -> None:
        if va >= BASE + (4 << 20):
            raise OffmapError("gone")

    with LockedBuffer(PAGE) as prefix, lanes(read, CANARY_LENGTH, 3) as readers, pytest.raises(OffmapError):
        search([Piece(BASE, 0, 64 << 20)], readers, canary_pattern(prefix, (KEY,)))


def test_bytes_that_stand_everywhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_MOST_PLACES", 10)
    memory = Memory(2 * PAGE)
    memory.bytes[:] = (b"repeated" * PAGE)[: 2 * PAGE]
    with (
        Secret(b"repeated") as secret,
        lanes(memory.read, secret.length) as readers,
        pytest.raises(OffmapError, match="more than 10"),
    ):
        search([Piece(BASE, 0, 2 * PAGE)], readers, secret_pattern(secret))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_secret_is_found_exactly_where_it_stands(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([8, 9, 64, 65, 300, PAGE]))
    pages = 12
    secret_bytes = random.Random(length).randbytes(length)
    memory = Memory(pages * PAGE)
    places, at = [], 0
    for gap in data.draw(st.lists(st.integers(0, 2 * PAGE), max_size=8)):
        if at + gap + length <= pages * PAGE:
            places.append(at + gap)
            memory.bytes[at + gap : at + gap + length] = secret_bytes
            at += gap + length
    with Secret(secret_bytes) as secret, lanes(memory.read, length, 2) as readers:
        hits = search([Piece(BASE, 0x10_0000, pages * PAGE)], readers, secret_pattern(secret))
    assert [hit.pa - 0x10_0000 for hit, _ in hits] == places


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_secret_across_pages_that_only_the_guest_sees_side_by_side(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([8, 13, 64, 200, 1000, PAGE]))
    split = data.draw(st.integers(1, length - 1))
    pages = 16
    frames = data.draw(st.permutations(range(pages)))
    seams = [(a, b) for a, b in pairwise(frames) if b != a + 1]
    if not seams:
        return
    first, second = data.draw(st.sampled_from(seams))
    secret_bytes = random.Random(length).randbytes(length)
    memory = Memory(pages * PAGE)
    memory.bytes[(first + 1) * PAGE - split : (first + 1) * PAGE] = secret_bytes[:split]
    memory.bytes[second * PAGE : second * PAGE + length - split] = secret_bytes[split:]
    order = sorted(seams)
    with Secret(secret_bytes) as secret, lanes(memory.read, length, 2) as readers:
        pairs = Seams(
            np.array([a for a, _ in order], dtype=np.uint64),
            np.array([b for _, b in order], dtype=np.uint64),
            secret.view,
        )
        # Pieces of different addresses, so that what is neighbouring physically need not be so virtually.
        pieces = [Piece(BASE, 0, pages * PAGE)]
        hits = search(pieces, readers, secret_pattern(secret), seams=pairs)
    assert [(hit.pa, hit.pa2) for hit, _ in hits] == [((first + 1) * PAGE - split, second * PAGE)]
