"""The differences between one audit of a process and the next: which pages, where they are now, what reaches them.

Pages that nothing can be said of in either are no change.
"""

from collections.abc import Iterator

import numpy as np

from offmap.audit.audit import Snapshot
from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN
from offmap.audit.guest_ram import RamRange
from offmap.audit.intervals import distinct
from offmap.audit.reach import KINDS, LISTED, Kind
from offmap.audit.result_sets import Change, Changes, Difference
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SIZE

_MOST_REACHES = 8  # mappings that a change lists
_ORDER = tuple(Difference)


def compare(before: Snapshot, after: Snapshot) -> Changes:
    """What changed from one audit of a process to a later one."""
    found: list[Change] = []
    pages: dict[Difference, int] = {}
    omitted = 0
    old, new = _parts(before), _parts(after)
    for part in dict.fromkeys([*before.ram.ranges, *after.ram.ranges]):
        if part not in old or part not in new:
            what = Difference.SLOT_ADDED if part in new else Difference.SLOT_REMOVED
            pages[what] = pages.get(what, 0) + part.pages
            found.append(Change(what, Address(part.va), part.bytes, part.guest_phys_addr))
            continue
        for what, first, count, then, now in _differences(old[part], new[part]):
            pages[what] = pages.get(what, 0) + count
            if len(found) >= LISTED:
                omitted += 1
                continue
            pa = new[part].address(now, first)
            found.append(
                Change(
                    what=what,
                    userspace_addr=Address(part.va + first * PAGE_SIZE),
                    bytes=count * PAGE_SIZE,
                    guest_phys_addr=None if (gpa := part.guest_phys_addr) is None else gpa + first * PAGE_SIZE,
                    pa=pa,
                    pa_before=old[part].address(then, first),
                    kinds=new[part].kinds(now),
                    kinds_before=old[part].kinds(then),
                    reaches=() if pa is None else tuple(after.aliases_of(pa, count * PAGE_SIZE)[:_MOST_REACHES]),
                    why=new[part].reason(now),
                )
            )
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


def _parts(snapshot: Snapshot) -> "dict[RamRange, _Part]":
    at, parts = 0, {}
    for part in snapshot.ram.ranges:
        parts[part] = _Part(snapshot, at, part.pages)
        at += part.pages
    return parts


class _Part:
    """The runs of one range, their pages counted from its first."""

    def __init__(self, snapshot: Snapshot, first: int, pages: int) -> None:
        judged = snapshot.judged
        rows = slice(*np.searchsorted(judged.page, [first, first + pages]).tolist())
        self.page = judged.page[rows] - first
        self.pfn, self.state = judged.pfn[rows], judged.state[rows]
        self.reached = judged.reached[rows]
        self._why, self._reasons = judged.why[rows], judged.reasons
        self.total = pages

    def address(self, row: int, page: int) -> Address | None:
        """The physical address of a page of this run; None if it is not known."""
        if self.state[row] != POPULATED:
            return None
        return Address(int(self.pfn[row] + page - self.page[row]) * PAGE_SIZE)

    def kinds(self, row: int) -> tuple[Kind, ...]:
        return tuple(kind for code, kind in enumerate(KINDS) if int(self.reached[row]) >> code & 1)

    def reason(self, row: int) -> str:
        return self._reasons[int(self._why[row])]


def _differences(one: _Part, two: _Part) -> Iterator[tuple[Difference, int, int, int, int]]:
    """(what, first page, pages, row of the one, row of the other) of each stretch that is not as it was."""
    page = distinct(one.page, two.page)
    a, b = (np.searchsorted(part.page, page, side="right") - 1 for part in (one, two))
    then, now = one.state[a], two.state[b]
    both = (then == POPULATED) & (now == POPULATED)
    cases = {  # the first that applies
        Difference.MOVED: both & (one.pfn[a] - one.page[a] != two.pfn[b] - two.page[b]),
        Difference.MAPPED: both & (two.reached[b] & ~one.reached[a] != 0),
        Difference.UNMAPPED: both & (one.reached[a] & ~two.reached[b] != 0),
        Difference.POPULATED: (then == EMPTY) & (now == POPULATED),
        Difference.RETURNED: (then == UNKNOWN) & (now == POPULATED),
        Difference.GONE: (then != EMPTY) & (now == EMPTY),
        Difference.LOST: (then != UNKNOWN) & (now == UNKNOWN),
    }
    what = np.select(list(cases.values()), [_ORDER.index(each) for each in cases], -1)
    end = np.append(page[1:], one.total)
    for index in np.flatnonzero(what >= 0).tolist():
        first = int(page[index])
        yield _ORDER[what[index]], first, int(end[index]) - first, int(a[index]), int(b[index])
