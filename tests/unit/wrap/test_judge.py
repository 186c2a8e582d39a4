"""The audit of a wrapped VMM: when nothing is exposed but kvm-clock's page."""

from typing import Any

import pytest
from msgspec.structs import replace
from tests.unit.audit.report.samples import pages, vm

from offmap.audit.result import AuditResult
from offmap.errors import ExitStatus
from offmap.report.typed import decode
from offmap.wrap.audits import CLOCK_ALONE
from offmap.wrap.judge import clock_page, said_of

PAGE = 4096
CLOCK = 0x1F01000


def result(mapped: list[tuple[int, int]], clocks: list[int], **counts: int) -> AuditResult:
    found: dict[str, Any] = {"mapped_guest_ranges": mapped, "kvm_clock_pages": clocks}
    counts = {"mapped_pages": sum(size for _, size in mapped) // PAGE} | counts
    return decode(AuditResult, vm(verdict="exposed", pages=pages(65536, **counts), **found))


def test_the_clocks_page_alone_is_named() -> None:
    assert clock_page(result([(CLOCK, PAGE)], [CLOCK])) == CLOCK


@pytest.mark.parametrize(
    "other",
    [
        result([(CLOCK + PAGE, PAGE)], [CLOCK]),
        result([(CLOCK, 2 * PAGE)], [CLOCK]),
        result([(CLOCK, PAGE)], [CLOCK], mapped_pages=2),
        result([(CLOCK, PAGE)], [CLOCK], direct_map_pages=1),
        result([(CLOCK, PAGE)], []),
        result([(CLOCK, PAGE)], [CLOCK, CLOCK + PAGE]),
        result([], [CLOCK]),
    ],
)
def test_nothing_else_is_excused(other: AuditResult) -> None:
    assert clock_page(other) is None


def test_the_clock_excuses_nothing_that_could_not_be_seen() -> None:
    alone = result([(CLOCK, PAGE)], [CLOCK])
    assert said_of(alone)[0] == CLOCK_ALONE
    unknown = result([(CLOCK, PAGE)], [CLOCK], unknown_pages=60_000)
    growing = result([(CLOCK, PAGE)], [CLOCK], not_populated_pages=2, not_populated_plain_pages=2)
    for doubted in (unknown, growing, replace(alone, partial="process 7 ended during the audit")):
        status, line = said_of(doubted)
        assert status == ExitStatus.UNDETERMINED and line.startswith("EXPOSED: 1 of "), line


def test_names_that_the_vmm_chose_cannot_write_a_verdict() -> None:
    lie = "\r\x1b[KHIDDEN:\n\u202e"
    _, line = said_of(replace(result([(CLOCK, PAGE)], []), process=lie))
    assert line.isprintable() and line.startswith("EXPOSED: 1 of ")
