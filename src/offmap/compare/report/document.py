"""A comparison as JSON (offmap-compare/1): the cells with all their answers, the questions, and the conclusions.

The types are the published form: the JSON, its schema and its decoding follow from them. Names of hosts are left out:
they are not results.
"""

import json
from collections.abc import Sequence

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from offmap import __version__
from offmap.compare.cell_result import SCHEMA as CELL_SCHEMA
from offmap.compare.cell_result import CellResult
from offmap.compare.kinds import BASELINE
from offmap.compare.questions import CATALOGUE, Answer, Question, Ratio
from offmap.compare.report.conclude import Conclusion, ConclusionText, conclude
from offmap.compare.report.notes import notes_of
from offmap.compare.report.repeat import commands_of, missing_of
from offmap.compare.report.status import Status, status_of

SCHEMA = "offmap-compare/1"


class PublishedAnswer(Answer, frozen=True):
    """An answer, and the ratio to plain RAM; null where there are fewer than five pairs."""

    ratio: Ratio | None = None


class PublishedCell(CellResult, frozen=True, kw_only=True, dict=True, tag=CELL_SCHEMA):
    """A cell, its name for files, and what may be said of it."""

    answers: tuple[PublishedAnswer, ...] = ()
    key: str
    status: Status = msgspec.field(name="standing")


class PublishedFinding(Struct, frozen=True):
    """One kind of RAM on one host kernel.

    Attributes:
        cells: how many there are.
        hiding: how many of them hide.
        lost: questions whose answer is no, and is not so on plain RAM, with the reason.
        undetermined: questions without an answer, with the reason.
    """

    backend: str
    status: Status = msgspec.field(name="standing")
    cells: int
    hiding: int
    lost: dict[str, str]
    undetermined: dict[str, str]


class PublishedConclusion(ConclusionText, frozen=True):
    """A conclusion, and each kind of RAM that it is about."""

    kinds: tuple[PublishedFinding, ...]


class CompareDocument(Struct, frozen=True, tag_field="schema", tag=SCHEMA):
    """What offmap compare writes as report.json.

    A change that would break a reader gets a new number in the form's name. Fields may be added without one, and
    readers pass over those they don't know.

    Attributes:
        offmap: the version that made the report.
        time: when the last cell ended, in UTC; empty if there is none.
        commands: what makes these cells again; empty if they are in no matrix of this version.
        baseline: the kind of plain RAM that every ratio is to.
        emulated: whether any cell ran on an emulated processor.
        conclusions: one for each host kernel.
        missing: titles of the cells of the same matrix that were not run.
        notes: what a reader must know of where the cells come from, if they are not all alike.
        questions: what the answers are to, in the order of the report.
    """

    offmap: str
    time: str
    commands: tuple[str, ...]
    baseline: str
    emulated: bool
    conclusions: tuple[PublishedConclusion, ...]
    missing: tuple[str, ...]
    questions: tuple[Question, ...]
    cells: tuple[PublishedCell, ...]
    notes: tuple[str, ...] = ()


def compare_document(results: Sequence[CellResult]) -> CompareDocument:
    """The published form of a comparison."""
    return CompareDocument(
        offmap=__version__,
        time=max((result.time for result in results), default=""),
        commands=tuple(commands_of(results)),
        baseline=BASELINE,
        emulated=any(result.emulated for result in results),
        conclusions=tuple(_conclusion(each) for each in conclude(results)),
        missing=tuple(missing_of(results)),
        questions=tuple(CATALOGUE.values()),
        cells=tuple(_cell(result) for result in results),
        notes=tuple(notes_of(results)),
    )


def compare_schema() -> str:
    """The JSON Schema (draft 2020-12) of report.json; ends with a newline."""
    schema = msgspec.json.schema(CompareDocument)
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:offmap:compare"}
    return json.dumps({**about, **schema}, indent=2) + "\n"


def _conclusion(one: Conclusion) -> PublishedConclusion:
    kinds = tuple(
        PublishedFinding(
            finding.backend,
            finding.status,
            len(finding.cells),
            len(finding.hiding),
            dict(finding.lost),
            dict(finding.undetermined),
        )
        for finding in one.findings
    )
    return PublishedConclusion(one.host_kernel, one.release, one.answer, one.choice, one.unsettled, kinds)


def _cell(result: CellResult) -> PublishedCell:
    fields = asdict(result) | {
        "answers": tuple(PublishedAnswer(**asdict(answer) | {"ratio": answer.ratio}) for answer in result.answers),
        "host": replace(result.host, name=""),
        "key": result.spec.key,
        "status": status_of(result),
    }
    return PublishedCell(**fields)
