"""What is different between one audit of a process and the next: which pages, where they are now, what reaches them.

Pages that nothing can be said of in either are no change.
"""

from collections.abc import Iterator

import numpy as np

from offmap.audit.audit import Snapshot
from offmap.audit.classify import Judged
from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN
from offmap.audit.guest_ram import RamRange
from offmap.audit.intervals import distinct
from offmap.audit.reach import LISTED, Kind, Reach
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import Change, Changes, Difference
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SIZE

_KINDS = tuple(Kind)

_ORDER = tuple(Difference)


def compare(before: Snapshot, after: Snapshot) -> Changes:
    """What changed from one audit of a process to a later one."""
    found: list[Change] = []
    pages: dict[Difference, int] = {}
    omitted = 0
    old, new = _positions(before), _positions(after)
    for part in dict.fromkeys([*before.ram.ranges, *after.ram.ranges]):
        if part not in old or part not in new:
            what = Difference.SLOT_ADDED if part in new else Difference.SLOT_REMOVED
            pages[what] = pages.get(what, 0) + part.pages
            found.append(Change(what, Address(part.va), part.bytes, part.guest_phys_addr))
            continue
        one, two = _Part(before.judged, old[part], part.pages), _Part(after.judged, new[part], part.pages)
        for what, first, count, row_one, row_two in _differences(one, two):
            pages[what] = pages.get(what, 0) + count
            if len(found) < LISTED:
                found.append(_change(what, part, first, count, (one, row_one), (two, row_two), after))
            else:
                omitted += 1
    audit = after.audit
    return Changes(
        time=audit.time,
        pid=audit.pid,
        process=audit.process,
        verdict=audit.verdict,
        mapped_pages=audit.pages.mapped_pages,
        pages=pages,
        changes=tuple(found),
        changes_omitted=omitted,
    )


def _positions(result: Snapshot) -> dict[RamRange, int]:
    """First page of each range, counted through all of them."""
    at, positions = 0, {}
    for part in result.ram.ranges:
        positions[part] = at
        at += part.pages
    return positions


class _Part:
    """The runs of one range, their pages counted from its first."""

    def __init__(self, judged: Judged, first: int, pages: int) -> None:
        rows = slice(*np.searchsorted(judged.page, [first, first + pages]).tolist())
        self.page = judged.page[rows] - first
        self.pfn, self.state = judged.pfn[rows], judged.state[rows]
        self.why, self.reached = judged.why[rows], judged.reached[rows]
        self.reasons = judged.reasons
        self.total = pages

    def frame(self, row: int, page: int) -> int | None:
        if self.state[row] != POPULATED:
            return None
        return int(self.pfn[row] + page - self.page[row])

    def kinds(self, row: int) -> tuple[Kind, ...]:
        return tuple(kind for code, kind in enumerate(_KINDS) if int(self.reached[row]) >> code & 1)


def _differences(one: _Part, two: _Part) -> Iterator[tuple[Difference, int, int, int, int]]:
    """(what, first page, pages, row of the one, row of the other) of each stretch that is not as it was."""
    page = distinct(one.page, two.page)
    a, b = (np.searchsorted(part.page, page, side="right") - 1 for part in (one, two))
    then, now = one.state[a], two.state[b]
    both = (then == POPULATED) & (now == POPULATED)
    moved = both & (one.pfn[a] - one.page[a] != two.pfn[b] - two.page[b])
    more, less = two.reached[b] & ~one.reached[a], one.reached[a] & ~two.reached[b]
    what = np.select(
        [
            moved,
            both & (more != 0),
            both & (less != 0),
            (then == EMPTY) & (now == POPULATED),
            (then == UNKNOWN) & (now == POPULATED),
            (then != EMPTY) & (now == EMPTY),
            (then != UNKNOWN) & (now == UNKNOWN),
        ],
        [
            _ORDER.index(each)
            for each in (
                *(Difference.MOVED, Difference.MAPPED, Difference.UNMAPPED, Difference.POPULATED),
                *(Difference.RETURNED, Difference.GONE, Difference.LOST),
            )
        ],
        -1,
    )
    end = np.append(page[1:], one.total)
    for index in np.flatnonzero(what >= 0).tolist():
        first = int(page[index])
        yield _ORDER[what[index]], first, int(end[index]) - first, int(a[index]), int(b[index])


def _change(
    what: Difference,
    part: RamRange,
    first: int,
    pages: int,
    then: tuple[_Part, int],
    now: tuple[_Part, int],
    after: Snapshot,
) -> Change:
    old, new = then[0].frame(then[1], first), now[0].frame(now[1], first)
    pa = None if new is None else Address(new * PAGE_SIZE)
    return Change(
        what=what,
        userspace_addr=Address(part.va + first * PAGE_SIZE),
        bytes=pages * PAGE_SIZE,
        guest_phys_addr=None if part.guest_phys_addr is None else part.guest_phys_addr + first * PAGE_SIZE,
        pa=pa,
        pa_before=None if old is None else Address(old * PAGE_SIZE),
        kinds=now[0].kinds(now[1]),
        kinds_before=then[0].kinds(then[1]),
        reaches=() if pa is None else _aliases_between(after.audit, pa, pa + pages * PAGE_SIZE)[:8],
        why=now[0].reasons[int(now[0].why[now[1]])],
    )


def _aliases_between(audit: AuditResult, start: int, end: int) -> tuple[Reach, ...]:
    """The aliases of guest RAM that lie at least in part in the physical addresses from ``start`` to ``end``."""
    return tuple(alias for alias in audit.aliases if alias.pa < end and start < alias.pa + alias.bytes)
