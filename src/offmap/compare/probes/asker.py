"""Asking the questions of one cell: what is being asked is said first, and each answer as soon as it is known."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from offmap.compare.questions import Answer, question
from offmap.errors import OffmapError

__all__ = ["Asker", "Emit", "failed", "measured", "no", "paired", "undetermined", "yes"]

Emit = Callable[[dict[str, Any]], None]
"""Takes one line of what offmap.compare.job describes."""


def print_line(event: dict[str, Any]) -> None:
    """To standard output, at once: the host may not live to write a second line."""
    print(json.dumps(event), flush=True)


def yes(id: str, detail: str = "", reason: str = "") -> Answer:
    return Answer(id, True, reason, detail=detail)


def no(id: str, reason: str, detail: str = "") -> Answer:
    return Answer(id, False, reason, detail=detail)


def undetermined(id: str, reason: str, detail: str = "") -> Answer:
    return Answer(id, None, reason, detail=detail)


def measured(id: str, value: float, reason: str = "", detail: str = "") -> Answer:
    return Answer(id, value, reason, detail=detail)


def paired(id: str, samples: Sequence[float], baseline: Sequence[float], reason: str = "", detail: str = "") -> Answer:
    """Of pairs of samples; the value is the candidate's median."""
    return Answer(id, round(median(samples), 4), reason, tuple(samples), tuple(baseline), detail)


def failed(id: str, error: Exception) -> Answer:
    """The question could not be put."""
    return Answer(id, None, f"not measured: {error}")


class Asker:
    """Puts questions and tells the answers.

    Args:
        emit: takes each line.
    """

    def __init__(self, emit: Emit = print_line) -> None:
        self._emit = emit
        self.answers: dict[str, Answer] = {}

    def say(self, event: dict[str, Any]) -> None:
        """Something else than an answer."""
        self._emit(event)

    def stage(self, text: str) -> None:
        """What is being done now."""
        self._emit({"stage": text})

    def tell(self, *answers: Answer) -> None:
        """Answers that are known."""
        for answer in answers:
            self.answers[answer.question] = answer
            self._emit({"answer": answer.to_json()})

    def ask(self, id: str, probe: Callable[[], Answer]) -> Answer:
        """Put one question; a probe that fails has not determined anything, and the next one is put all the same."""
        question(id)
        self._emit({"question": id})
        try:
            answer = probe()
        except (OffmapError, OSError) as error:
            answer = failed(id, error)
        self.tell(answer)
        return answer

    def ask_many(self, ids: Sequence[str], probe: Callable[[], Sequence[Answer]], *, or_as_known: bool = False) -> None:
        """Put questions that one measurement answers.

        Args:
            or_as_known: they were answered before, and where this gives no value the known one stands. Not for what is
                hidden: of that, what could not be seen again is not known any more.
        """
        self._emit({"question": ids[0]})
        try:
            answers = list(probe())
        except (OffmapError, OSError) as error:
            answers = [failed(id, error) for id in ids]
        said = {answer.question for answer in answers}
        answers += [undetermined(id, "the probe gave no answer to it") for id in ids if id not in said]
        self.tell(*map(self._or_known, answers) if or_as_known else answers)

    def _or_known(self, answer: Answer) -> Answer:
        known = self.answers.get(answer.question)
        if answer.value is not None or known is None or known.value is None:
            return answer
        return replace(known, detail=f"{known.detail}; asked again, {answer.reason}".removeprefix("; "))

    def leave(self, ids: Sequence[str], reason: str) -> None:
        """Questions that are not put here, and why."""
        self.tell(*(undetermined(id, f"not measured: {reason}") for id in ids))
