"""What is kept of what a measuring program says."""

import json
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.cell_result import CellOutcome
from offmap.compare.job import Job
from offmap.compare.matrix import NATIVE, CellSpec
from offmap.compare.questions import Answer
from offmap.compare.transcript import Said, Transcript


def told(*events: dict[str, Any]) -> tuple[Said, list[dict[str, Any]]]:
    shown: list[dict[str, Any]] = []
    transcript = Transcript(shown.append)
    for event in events:
        transcript.event(event)
    return transcript.said(), shown


def test_all_of_it() -> None:
    first, second = Answer("costs.boot", 2.0), Answer("costs.boot", 3.0)
    said, shown = told(
        {"host": {"kernel": "6.12"}},
        {"stage": "booting", "share": 0.5},
        {"question": "costs.boot"},
        {"answer": first.to_json()},
        {"answer": second.to_json()},
        {"question": "works.vsock"},
        {"outcome": "refused", "reason": "no"},
    )
    assert said == Said(
        {"kernel": "6.12"}, {"costs.boot": second}, "booting", "works.vsock", CellOutcome.REFUSED, "no", ""
    )
    assert shown == [{"stage": "booting", "share": 0.5}]


@pytest.mark.parametrize(
    "event",
    [
        {"question": "costs.unheard_of"},
        {"answer": {"question": "works.boot", "value": 1}},
        {"answer": Answer("works.boot", True).to_json() | {"value": 3}},
        {"answer": None},
        {"host": 3},
        {"outcome": "oops"},  # a host that oopsed cannot say so
        {"outcome": "fine"},
    ],
)
def test_what_is_no_event_is_complained_of_and_counts_for_nothing(event: dict[str, Any]) -> None:
    said, _ = told({"question": "works.boot"}, event, {"outcome": "booted"})
    assert said.complaint and "\n" not in said.complaint
    assert (said.answers, said.question, said.outcome) == ({}, "works.boot", CellOutcome.BOOTED)


def test_what_it_says_later_changes_no_copy() -> None:
    transcript = Transcript(lambda _: None)
    before = transcript.said()
    transcript.event({"answer": Answer("works.boot", True).to_json()})
    assert before.answers == {}


def test_jobs_go_through_the_command_line() -> None:
    job = Job(CellSpec("memfd", NATIVE), Path("/k/vm linuz"), Path("/m"), "6.12", Path("/tmp/x"))
    assert Job.loads(job.dumps()) == job and job.native
    for text in ("", "[]", "{}", json.dumps({"spec": {}})):
        with pytest.raises(ValueError, match=r"job|cell|Expecting"):
            Job.loads(text)
