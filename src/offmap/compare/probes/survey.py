"""Ask the questions of one cell. Each is announced first, and answered as soon as the answer is known."""

from collections.abc import Callable, Sequence
from statistics import median

import msgspec
from msgspec.structs import replace

from offmap.compare.job import Line
from offmap.compare.questions import CATALOGUE, Answer
from offmap.errors import OffmapError


def print_line(line: Line) -> None:
    """Print it to standard output at once, as the host may die before the next line."""
    print(msgspec.json.encode(line).decode(), flush=True)


def yes(id: str, detail: str = "", reason: str = "") -> Answer:
    return Answer(id, True, reason, detail=detail)


def no(id: str, reason: str, detail: str = "") -> Answer:
    return Answer(id, False, reason, detail=detail)


def undetermined(id: str, reason: str, detail: str = "") -> Answer:
    return Answer(id, None, reason, detail=detail)


def measured(id: str, value: float, reason: str = "", detail: str = "") -> Answer:
    return Answer(id, value, reason, detail=detail)


def paired(id: str, samples: Sequence[float], baseline: Sequence[float], reason: str = "", detail: str = "") -> Answer:
    """An answer from pairs of samples. Its value is the candidate's median."""
    return Answer(id, round(median(samples), 4), reason, tuple(samples), tuple(baseline), detail)


class Survey:
    """The questions of one cell.

    Args:
        emit: takes each line.

    Attributes:
        answers: so far, by question.
    """

    def __init__(self, emit: Callable[[Line], None] = print_line) -> None:
        self._emit = emit
        self.answers: dict[str, Answer] = {}

    def say(self, line: Line) -> None:
        """Print a line that is no answer."""
        self._emit(line)

    def stage(self, text: str) -> None:
        """Print what is being done now."""
        self._emit(Line(stage=text))

    def tell(self, *answers: Answer) -> None:
        """Keep and print answers."""
        for answer in answers:
            self.answers[answer.question] = answer
            self._emit(Line(answer=answer))

    def ask(self, id: str, probe: Callable[[], Answer]) -> None:
        """Ask one question. If the probe fails, the answer is "not determined", and the survey goes on."""
        self.ask_many([id], lambda: [probe()])

    def ask_many(self, ids: Sequence[str], probe: Callable[[], Sequence[Answer]], *, or_as_known: bool = False) -> None:
        """Ask questions that one measurement answers.

        Args:
            or_as_known: they were answered before, and the known answer stands where this gives no value. Not for what
                is hidden: what could not be seen again is not known any more.

        Raises:
            KeyError: there is no such question.
        """
        self._emit(Line(question=CATALOGUE[ids[0]].id))
        try:
            answers = list(probe())
        except (OffmapError, OSError) as error:
            answers = [undetermined(id, f"not measured: {error}") for id in ids]
        said = {answer.question for answer in answers}
        answers += [undetermined(id, "the probe gave no answer to it") for id in ids if id not in said]
        self.tell(*map(self._or_known, answers) if or_as_known else answers)

    def _or_known(self, answer: Answer) -> Answer:
        known = self.answers.get(answer.question)
        if answer.value is not None or known is None or known.value is None:
            return answer
        return replace(known, detail=f"{known.detail}; asked again, {answer.reason}".removeprefix("; "))

    def leave(self, ids: Sequence[str], reason: str) -> None:
        """Say of questions that are not asked here why not."""
        self.tell(*(undetermined(id, f"not measured: {reason}") for id in ids))
