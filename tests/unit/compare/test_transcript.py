"""What is kept of what a measuring program says."""

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.compare.cell_result import CellOutcome
from offmap.compare.events import CellEvent
from offmap.compare.facts import Guest, Host
from offmap.compare.job import Job, Line
from offmap.compare.questions import Answer
from offmap.compare.spec import NATIVE, CellSpec
from offmap.compare.transcript import Said, Transcript


def told(*events: dict[str, Any]) -> tuple[Said, list[CellEvent]]:
    shown: list[CellEvent] = []
    transcript = Transcript(shown.append)
    for event in events:
        transcript.feed(json.dumps(event).encode() + b"\n")
    return transcript.said(), shown


def test_all_of_it() -> None:
    first, second = Answer("costs.boot", 2.0), Answer("costs.boot", 3.0)
    said, shown = told(
        {"host": {"kernel": "6.12"}},
        {"stage": "booting", "share": 0.5},
        {"question": "costs.boot"},
        {"guest": {"kernel": "6.1", "clocksource": "tsc"}},
        {"answer": msgspec.to_builtins(first)},
        {"answer": msgspec.to_builtins(second)},
        {"question": "works.vsock"},
        {"outcome": "refused", "reason": "no"},
    )
    answers = {"costs.boot": second}
    assert said == Said(
        Host("6.12"), Guest("6.1", "tsc"), answers, "booting", "works.vsock", CellOutcome.REFUSED, "no", ""
    )
    assert shown == [CellEvent(stage="booting", share=0.5)]


@pytest.mark.parametrize(
    "event",
    [
        {"question": "costs.unheard_of"},
        {"answer": {"question": "works.boot", "value": 1}},
        {"answer": {"question": "works.boot", "value": 3}},
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
    transcript.feed(b'{"answer": {"question": "works.boot", "value": true}}\n')
    assert transcript.said().answers
    assert before.answers == {}


def test_jobs_go_through_the_command_line() -> None:
    job = Job(CellSpec("memfd", NATIVE), "/k/vm linuz", "/m", "/tmp/x")
    assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job and job.native
    for text in ("", "[]", "{}", json.dumps({"spec": {}})):
        with pytest.raises(ValueError, match=r"object|field|truncated"):
            msgspec.json.decode(text, type=Job)


@given(st.lists(st.text(min_size=1), max_size=5), st.lists(st.integers(0, 500), max_size=9))
def test_lines_come_whole_however_they_are_cut(stages: list[str], cuts: list[int]) -> None:
    stream = b"".join(msgspec.json.encode(Line(stage=stage)) + b"\n" for stage in stages)
    heard: list[CellEvent] = []
    transcript = Transcript(heard.append)
    places = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(places):
        transcript.feed(stream[start:end])
    assert [event.stage for event in heard] == stages and not transcript.said().complaint


def test_half_a_line_is_no_event() -> None:
    heard: list[CellEvent] = []
    Transcript(heard.append).feed(b'{"stage": "boo')
    assert heard == []


@pytest.mark.parametrize("line", [b"Traceback (most recent call last):\n", b"[1, 2]\n", b"\xff\xfe\n", b"\n"])
def test_a_line_that_is_no_event_is_said_in_one_line(line: bytes) -> None:
    transcript = Transcript(lambda _: None)
    transcript.feed(line)
    complaint = transcript.said().complaint
    assert complaint.startswith(f"it said {line[:-1]!r}, which is no event") and "\n" not in complaint
