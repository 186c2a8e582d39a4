"""The second opinion: it agrees where both see the same, and fails loudly on one page or address where they do not."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from offmap.audit.guest_pages import GuestPages
from offmap.audit.mappings import RUN, KernelMappings
from offmap.audit.oracle import (
    Lookups,
    OracleDisagrees,
    Sample,
    ask_oracle,
    draw_addresses,
    draw_pages,
    translate,
)
from offmap.audit.result import OracleResult, Span
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.errors import ExitStatus
from offmap.report.typed import Address

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
VMALLOC = 0xFFFF_C900_0000_0000
PHYS_BASE = 0
IMAGE = 512 << 20
PGD = BASE + 0x5000
VA = 0x7F00_0000_0000
# Frames 100 to 163 are the guest's: 100 to 131 in the direct map, 140 also in vmalloc space, 110 in the kernel image.
FRAMES = range(100, 164)


def mappings(*more: tuple[int, int, int], hidden: range = range(132, 164)) -> KernelMappings:
    """The direct map of 16 MiB without the hidden frames, and what else is given as (va, pa, bytes)."""
    parts = [
        (BASE, 0, hidden.start * PAGE),
        (BASE + hidden.stop * PAGE, hidden.stop * PAGE, (4096 - hidden.stop) * PAGE),
    ]
    parts += more
    runs = np.zeros(len(parts), dtype=RUN)
    for row, (va, pa, size) in zip(runs, sorted(parts), strict=True):
        row["va"], row["pa"], row["bytes"], row["level"] = va, pa, size, 1
    return KernelMappings(runs, (), {}, BASE)


ALIASED = mappings((VMALLOC, 140 * PAGE, PAGE), (START_KERNEL_MAP + 110 * PAGE, 110 * PAGE, PAGE))
GUEST = GuestPages(
    np.array([100], dtype=np.int64),
    np.array([64], dtype=np.int64),
    np.array([VA], dtype=np.int64),
    np.array([-1], dtype=np.int64),
)


class Fake:
    """An oracle that sees the truth, but for what a test says."""

    version = "0"

    def __init__(self, truth: KernelMappings, lies: dict[int, int | None] | None = None) -> None:
        self.truth, self.lies = truth, lies or {}

    def kernel(self, va: int) -> int | None:
        return self.lies[va] if va in self.lies else translate(self.truth, va)

    def process(self, pgd: int, va: int) -> int | None:
        assert pgd == PGD
        return self.lies[va] if va in self.lies else (100 + (va - VA) // PAGE) * PAGE


def ask(
    oracle: Fake,
    walked: KernelMappings = ALIASED,
    frame: Callable[[int], int | None] = lambda va: 100 + (va - VA) // PAGE,
    pgd: int = PGD,
    walk: Callable[[], KernelMappings] | None = None,
) -> OracleResult:
    lookups = Lookups(frame, walk or (lambda: walked), pgd, PHYS_BASE, IMAGE)
    return ask_oracle(oracle, walked, GUEST, lookups, Sample(64, 7))


def test_agreement_is_counted() -> None:
    result = ask(Fake(ALIASED))
    assert (result.pages, result.frames_agreed, result.frames_unasked, result.retried) == (64, 64, 0, 0)
    assert result.addresses == result.mapped + result.unmapped
    assert result.mapped > 32 and result.unmapped > 32
    assert result.seed == 7


@pytest.mark.parametrize(
    ("va", "said", "named"),
    [
        (VA + 5 * PAGE, 0x123000, "of the process"),  # another frame
        (BASE + 105 * PAGE, None, "direct map|found"),  # a page that we say is mapped
        (BASE + 150 * PAGE, 150 * PAGE, "direct map"),  # a page that we say is not
        (BASE + 105 * PAGE, 106 * PAGE, "found"),  # mapped elsewhere
        (VMALLOC, None, "found"),  # an alias
        (START_KERNEL_MAP + 150 * PAGE, 150 * PAGE, "kernel image"),
    ],
)
def test_one_disagreement_is_enough(va: int, said: int | None, named: str) -> None:
    with pytest.raises(OracleDisagrees, match=named) as caught:
        ask(Fake(ALIASED, {va: said}))
    assert caught.value.exit_status is ExitStatus.FAILED
    assert f"{va:#x}" in str(caught.value) or f"{VA:#x}"[:6] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_that_the_walk_missed_next_to_another() -> None:
    with pytest.raises(OracleDisagrees, match=f"{VMALLOC + PAGE:#x}"):
        ask(Fake(ALIASED, {VMALLOC + PAGE: 0x5000}))


def test_what_changed_meanwhile_is_asked_again() -> None:
    # The walk is old: by now frame 140 is not in vmalloc space any more.
    now = mappings((START_KERNEL_MAP + 110 * PAGE, 110 * PAGE, PAGE))
    result = ask(Fake(now), walk=lambda: now)
    assert result.retried >= 1
    # A page has moved: both see its new frame.
    moved = {VA + 3 * PAGE: 20 * PAGE}
    result = ask(Fake(ALIASED, dict(moved)), frame=lambda va: 20 if va in moved else 100 + (va - VA) // PAGE)
    assert result.retried == 1 and result.frames_agreed == 64
    # One is gone.
    result = ask(Fake(ALIASED, dict(moved)), frame=lambda va: None)
    assert result.frames_agreed == 63


def test_frames_that_cannot_be_asked_are_counted() -> None:
    assert ask(Fake(ALIASED), pgd=0).frames_unasked == 64
    result = ask(Fake(ALIASED, {VA + 9 * PAGE: None}))
    assert (result.frames_agreed, result.frames_unasked) == (63, 1)


def test_what_the_walk_could_not_tell_is_no_disagreement() -> None:
    blind = replace(ALIASED, unreadable=(Span(Address(VMALLOC), 2 << 20, "its page table changed"),))
    ask(Fake(ALIASED, {VMALLOC + PAGE: 0x5000}), walked=blind)


def test_a_table_with_many_references_is_followed_sixteen_times() -> None:
    copies = [(VMALLOC + index * 2 * PAGE, 8 * PAGE, PAGE) for index in range(1, 17)]
    walked = replace(mappings(*copies), surplus_references=5)
    beyond = VMALLOC + 33 * PAGE
    assert len(walked.addresses_of(8 * PAGE)) == 17
    ask(Fake(walked, {beyond: 8 * PAGE}), walked=walked)
    with pytest.raises(OracleDisagrees):
        ask(Fake(walked, {beyond: 9 * PAGE}), walked=walked)


def test_translation_is_the_inverse_of_the_addresses() -> None:
    for frame in range(4100):
        for va in ALIASED.addresses_of(frame * PAGE):
            assert translate(ALIASED, va) == frame * PAGE
    assert ALIASED.addresses_of(140 * PAGE) == [VMALLOC]
    assert translate(ALIASED, BASE - PAGE) is None and translate(ALIASED, BASE + 133 * PAGE) is None
    assert translate(ALIASED, BASE + 123) == 123


def test_the_draw_is_of_the_seed_and_covers_every_page() -> None:
    first, again = (draw_pages(GUEST, 10, random.Random(3)) for _ in range(2))
    assert first == again and len(set(first)) == 10
    assert draw_pages(GUEST, 1000, random.Random(3)) == [(VA + index * PAGE, 100 + index) for index in range(64)]
    assert draw_pages(GuestPages.none(), 5, random.Random(3)) == []
    drawn = list(draw_addresses(ALIASED, 50, random.Random(3)))
    assert drawn == list(draw_addresses(ALIASED, 50, random.Random(3)))
    assert all(1 << 63 <= question.va < 1 << 64 for question in drawn)
    assert any(translate(ALIASED, question.va) is None for question in drawn)
