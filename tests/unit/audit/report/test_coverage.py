"""What the page shows of the time that was looked at."""

from typing import Any

import msgspec

from offmap.audit.report.coverage import coverage_view
from offmap.audit.result import AuditResult, Coverage, Look
from offmap.report.typed import decode

from .samples import vm


def result(coverage: Coverage | None) -> AuditResult:
    return msgspec.structs.replace(decode(AuditResult, vm()), coverage=coverage)


def test_each_walk_has_its_place_in_time() -> None:
    looks = (Look(0.0, 0.1, True, True), Look(0.5, 0.1, False, False), Look(1.5, 0.5, True, False))
    found: Any = coverage_view(result(Coverage(2.0, 2, {"init_top_pgt": 1, "mm": 40}, looks)))
    assert [(walk["x"], walk["width"], walk["look"]) for walk in found["walks"]] == [
        (0.0, 50.0, "ram"),
        (250.0, 50.0, "unknown"),
        (750.0, 250.0, "ram"),
    ]
    assert found["text"] == (
        "2 walks of the page tables of 41 roots in 2.00 s; 1 more do not count, as tables changed meanwhile; "
        "the last one that found a new mapping began at 0.00 s"
    )
    assert "does not count" in found["walks"][1]["title"]


def test_a_day_of_walks_is_a_bounded_picture() -> None:
    looks = tuple(Look(float(number), 0.01, True, False) for number in range(20_000))
    found: Any = coverage_view(result(Coverage(20_000.0, 20_000, {}, looks)))
    assert len(found["walks"]) <= 400 and all(0 <= walk["x"] <= 998 for walk in found["walks"])


def test_older_results_have_none() -> None:
    assert coverage_view(result(None)) is None
