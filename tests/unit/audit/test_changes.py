"""What changed between two audits, page by page."""

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.audit import Snapshot
from offmap.audit.changes import compare
from offmap.audit.classify import classify
from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN
from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.intervals import Intervals
from offmap.audit.mappings import RUN, KernelMappings
from offmap.audit.reach import Kind
from offmap.audit.report.changes import render_changes
from offmap.audit.result import AuditResult, Source
from offmap.audit.result_sets import Difference
from offmap.audit.verdict import Verdict
from offmap.report.typed import decode

from .frames_of_pages import frames_of_pages
from .report.samples import vm

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
VA = 0x7F00_0000_0000
DIRECT = range(20)  # frames that the kernel has in its direct map

Page = tuple[int, int]  # state, frame


def audited(pages: list[Page], direct: range = DIRECT, first: int = 0) -> Snapshot:
    """The result for these pages, while the kernel maps these frames."""
    runs = np.zeros(1, dtype=RUN)
    runs[0] = (BASE + direct.start * PAGE, direct.start * PAGE, len(direct) * PAGE, 1, True, True, True)
    kernel = KernelMappings(runs, (), {}, BASE)
    seen = frames_of_pages(
        np.array([frame for _, frame in pages], dtype=np.int64),
        np.array([state for state, _ in pages], dtype=np.uint8),
        {"swapped out": [index for index, (state, _) in enumerate(pages) if state == UNKNOWN]},
    )
    nothing = np.zeros(0, dtype=np.int64)
    judged = classify(seen, seen, Intervals(nothing, nothing), kernel)
    ram = GuestRam((RamRange(VA + first * PAGE, len(pages) * PAGE, Source.MEMSLOT, first * PAGE),))
    counts = judged.counts()
    audit = msgspec.structs.replace(decode(AuditResult, vm()), pages=counts, verdict=Verdict.UNKNOWN)
    return Snapshot(audit, ram, kernel, judged)


def what(before: list[Page], after: list[Page], direct: range = DIRECT) -> dict[str, int]:
    changes = compare(audited(before), audited(after, direct))
    return {each.value: pages for each, pages in changes.pages.items()}


def test_each_change_has_its_name() -> None:
    mapped, hidden, empty, away = (POPULATED, 5), (POPULATED, 100), (EMPTY, 0), (UNKNOWN, 0)
    assert what([mapped, hidden, empty, away], [mapped, hidden, empty, away]) == {}
    assert what([empty], [mapped]) == {"populated": 1}
    assert what([mapped], [empty]) == {"gone": 1}
    assert what([away], [mapped]) == {"returned": 1}
    assert what([mapped], [away]) == {"lost": 1}
    assert what([away], [empty]) == {"gone": 1}
    assert what([mapped], [hidden]) == {"moved": 1}
    assert what([hidden], [hidden], range(90, 110)) == {"mapped": 1}
    assert what([mapped], [mapped], range(90, 110)) == {"unmapped": 1}


def test_a_stretch_is_one_change_and_says_where() -> None:
    before = [(POPULATED, 100 + n) for n in range(10)]
    changes = compare(audited(before), audited(before, range(103, 107)))
    (change,) = changes.changes
    assert (change.what, change.userspace_addr, change.bytes) == (Difference.MAPPED, VA + 3 * PAGE, 4 * PAGE)
    assert (change.guest_phys_addr, change.pa, change.kinds) == (3 * PAGE, 103 * PAGE, (Kind.DIRECT_MAP,))
    (line,) = render_changes(changes)
    assert line.split() == [
        *("mapped", f"{VA + 3 * PAGE:#x}", "(guest", "0x3000)", "16", "KiB,", "at", "0x67000:", "direct", "map")
    ]


def test_slots_that_come_and_go() -> None:
    one, two = audited([(POPULATED, 5)]), audited([(POPULATED, 5)] * 2, first=8)
    changes = compare(one, two)
    assert changes.pages == {Difference.SLOT_REMOVED: 1, Difference.SLOT_ADDED: 2}
    assert changes.to_json()["pages"] == {"slot removed": 1, "slot added": 2}


def test_why_a_page_cannot_be_seen_is_said() -> None:
    (line,) = render_changes(compare(audited([(POPULATED, 5)]), audited([(UNKNOWN, 0)])))
    assert line.endswith(": swapped out")


def test_many_changes_are_counted_and_a_few_are_shown() -> None:
    before = [(POPULATED, 100 + 2 * n) for n in range(100)]
    after = [(POPULATED, 101 + 2 * n) for n in range(100)]
    changes = compare(audited(before), audited(after))
    assert changes.pages == {Difference.MOVED: 100}
    lines = render_changes(changes)
    assert len(lines) == 9 and "92 more pages" in lines[-1]


STATES = st.lists(st.tuples(st.sampled_from([UNKNOWN, EMPTY, POPULATED]), st.integers(0, 30)), min_size=1, max_size=10)


@given(STATES)
def test_pages_that_did_not_change_are_never_named(before: list[Page]) -> None:
    after = [page if index % 2 else (POPULATED, 40 + index) for index, page in enumerate(before)]
    changes = compare(audited(before), audited(after))
    named = {
        (change.userspace_addr - VA) // PAGE + n for change in changes.changes for n in range(change.bytes // PAGE)
    }
    assert named == {index for index in range(len(before)) if index % 2 == 0}
