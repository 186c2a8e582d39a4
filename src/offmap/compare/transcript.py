"""What the measuring program of a cell has said so far: kept as it comes, for the host may not live to the end."""

import threading
from dataclasses import dataclass, field
from typing import Any

from offmap.compare.cell_result import CellOutcome
from offmap.compare.events import Report
from offmap.compare.questions import CATALOGUE, Answer

__all__ = ["Said", "Transcript"]

_SAYS = (CellOutcome.BOOTED, CellOutcome.REFUSED, CellOutcome.FAILED)
"""The outcomes that it can tell itself."""


@dataclass(slots=True)
class Said:
    """All of it: `question` is the one that was asked and not answered, `outcome` is None until it was said."""

    host: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    stage: str = ""
    question: str = ""
    outcome: CellOutcome | None = None
    reason: str = ""
    complaint: str = ""


class Transcript:
    """Takes the events that offmap.compare.job describes.

    An event that is not as described is the program's fault and no answer: it is remembered as the complaint, and the
    cell fails.

    Args:
        report: gets each stage, for the display.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()  # a host that hangs leaves the reader of its output behind
        self._said = Said()

    def event(self, data: dict[str, Any]) -> None:
        """Take one."""
        with self._lock:
            try:
                self._take(data)
            except (ValueError, TypeError) as error:
                self._said.complaint = self._said.complaint or f"it said {str(data)[:80]}: {error}"
        if "stage" in data:
            self._report({"stage": str(data["stage"]), "share": data.get("share")})

    def _take(self, data: dict[str, Any]) -> None:
        said = self._said
        if "host" in data:
            said.host = dict(data["host"])
        if "stage" in data:
            said.stage = str(data["stage"])
        if "question" in data:
            if data["question"] not in CATALOGUE:
                raise ValueError("no such question")
            said.question = data["question"]
        if "answer" in data:
            answer = Answer.from_json(data["answer"])
            said.answers[answer.question] = answer
            if said.question == answer.question:
                said.question = ""
        if "outcome" in data:
            outcome = CellOutcome(data["outcome"])
            if outcome not in _SAYS:
                raise ValueError("that is not for it to say")
            said.outcome, said.reason = outcome, str(data.get("reason", ""))

    def said(self) -> Said:
        """A copy of what there is by now."""
        with self._lock:
            now = self._said
            return Said(
                dict(now.host), dict(now.answers), now.stage, now.question, now.outcome, now.reason, now.complaint
            )
