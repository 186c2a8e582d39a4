"""What an attack's result says as answers: an end is a yes, a secret that was read a no, all else is not determined."""

import pytest

from offmap.attack.result import AttackResult, Attempt, Outcome
from offmap.audit.host import host_facts
from offmap.compare.probes.attack import answers_of
from offmap.report.typed import Count, Seconds


def attempt(outcome: str, reads: int) -> Attempt:
    return Attempt(
        pid=Count(7),
        target="a secret",
        outcome=outcome,
        stage="guest: kernel",
        reason="it is not mapped",
        stages=(),
        reads=Count(reads),
        bytes=Count(8 * reads),
        failures=Count(0),
        seconds=Seconds(1.0),
    )


def attacked(outcome: str, control: Attempt | None) -> AttackResult:
    return AttackResult(
        offmap="1",
        time="2026-01-01T00:00:00Z",
        host=host_facts(),
        primitive="kcore",
        knowledge=(),
        outcome=outcome,
        reason="why",
        attempt=attempt(outcome, 90_000),
        control=control,
    )


RECOVERED = attempt("recovered", 20_000)


def test_an_end_is_a_yes_beside_a_plain_guest() -> None:
    ends, reads = answers_of(attacked("ends", RECOVERED))
    assert (ends.value, ends.reason) == (True, 'ends at "guest: kernel": it is not mapped')
    assert (reads.value, reads.samples, reads.baseline) == (90_000, (90_000.0,), (20_000.0,))
    assert "recovered in 20,000 reads" in ends.detail


def test_a_secret_that_was_read_is_a_no() -> None:
    ends, reads = answers_of(attacked("recovered", RECOVERED))
    assert (ends.value, ends.reason, reads.value) == (False, "recovered in 90,000 reads", 90_000)


@pytest.mark.parametrize("outcome", [Outcome.REACHED, Outcome.UNKNOWN])
def test_all_else_is_not_determined(outcome: Outcome) -> None:
    ends, reads = answers_of(attacked(outcome, RECOVERED))
    assert (ends.value, reads.value, reads.reason) == (None, None, ends.reason)
    assert ends.reason == f"{outcome.value}: why"
