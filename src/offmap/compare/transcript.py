"""What the measuring program of a cell has printed so far. Each line is kept as it comes, as the host may die."""

import threading
from dataclasses import dataclass, field, replace

import msgspec

from offmap.compare.cell_result import CellOutcome
from offmap.compare.events import CellEvent, Report
from offmap.compare.facts import Guest, Host
from offmap.compare.job import Line
from offmap.compare.questions import CATALOGUE, Answer

_ITS_OUTCOMES = (CellOutcome.BOOTED, CellOutcome.REFUSED, CellOutcome.FAILED)
"""The outcomes that the program itself can report."""

_decoder = msgspec.json.Decoder(Line)


@dataclass(slots=True)
class Said:
    """What the program has printed.

    Attributes:
        stage: the last one.
        question: the one that was asked and not answered.
        outcome: None until the program reports it.
        complaint: what is wrong with the first malformed line (offmap.compare.job describes the form).
    """

    host: Host = field(default_factory=Host)
    guest: Guest = field(default_factory=Guest)
    answers: dict[str, Answer] = field(default_factory=dict)
    stage: str = ""
    question: str = ""
    outcome: CellOutcome | None = None
    reason: str = ""
    complaint: str = ""


class Transcript:
    """Takes the program's output. A malformed line is kept as the complaint, and the cell fails.

    Args:
        report: gets each stage, for the display.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()  # if the host hangs, the thread that reads its output lives on
        self._said = Said()
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the output, cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for text in lines:
            try:
                with self._lock:
                    line = _decoder.decode(text)
                    self._take(line)
            except ValueError as error:
                with self._lock:
                    self._said.complaint = self._said.complaint or f"it said {text[:80]!r}, which is no event: {error}"
                continue
            if line.stage:
                self._report(CellEvent(stage=line.stage, share=line.share if line.share else None))

    def _take(self, line: Line) -> None:
        """Take a line. Raises ValueError, and changes nothing, if its contents are impossible."""
        said = self._said
        if line.question and line.question not in CATALOGUE:
            raise ValueError("no such question")
        if line.outcome and line.outcome not in _ITS_OUTCOMES:
            raise ValueError("that is not for it to say")
        said.host = line.host or said.host
        said.guest = line.guest or said.guest
        said.stage = line.stage or said.stage
        said.question = line.question or said.question
        if line.answer:
            said.answers[line.answer.question] = line.answer
            if said.question == line.answer.question:
                said.question = ""
        if line.outcome:
            said.outcome, said.reason = line.outcome, line.reason or ""

    def said(self) -> Said:
        """A copy of the present state."""
        with self._lock:
            return replace(self._said, answers=dict(self._said.answers))
