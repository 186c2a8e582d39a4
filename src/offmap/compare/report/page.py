"""What the comparison's page says, worked out for the templates: text, numbers, and the results themselves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.kinds import BASELINE, kind_names
from offmap.compare.questions import CATALOGUE, Answer, Group, Question
from offmap.compare.report.conclude import COSTS, Conclusion, conclude, cost_of, kinds_of, titles_of
from offmap.compare.report.notes import notes_of
from offmap.compare.report.plot import Plot, ratio_plot
from offmap.compare.report.repeat import commands_of, facts_of, missing_of
from offmap.compare.report.status import KindFinding, Status, status_of
from offmap.compare.report.words import Said, number, said, short_kernel
from offmap.compare.spec import CellSpec

CONSOLE = 20_000
"""Characters of an oops or a console that the page has; the cell's own file has all."""

_SHOWN_COSTS = {
    "costs.populate": "populate",
    "costs.boot": "boot",
    "costs.copy": "memory copy",
    "costs.chase": "pointer chase",
    "costs.blk_read": "disk read",
    "costs.blk_write": "disk write",
    "costs.net": "network",
}
"""Of a conclusion's table; the others are in the table of the setting."""


@dataclass(frozen=True, slots=True)
class KindRow:
    """One kind of RAM in a conclusion's table; `lost` and `open` are None where no guest of it came to its end."""

    kind: str
    status: Status
    cells: str
    href: str
    why: str
    lost: str | None
    open: str | None
    costs: list[str]


@dataclass(frozen=True, slots=True)
class ConclusionView:
    """A conclusion, and its table.

    Attributes:
        good: whether anything hides.
        costs: title of each cost's column, and whether emulation blurs it.
    """

    conclusion: Conclusion
    good: bool
    costs: list[tuple[str, bool]]
    rows: list[KindRow]


@dataclass(frozen=True, slots=True)
class Overview:
    """Kernels beside each other: name, release, and the status of each kind."""

    kinds: list[str]
    rows: list[tuple[str, str, list[Status]]]


@dataclass(frozen=True, slots=True)
class TableCell:
    """An answer in a setting's table, where it leads, and what is shown when the mouse is over it."""

    said: Said
    href: str
    tip: str


@dataclass(frozen=True, slots=True)
class SettingView:
    """Cells that differ in the kind of RAM only.

    Attributes:
        open: whether it is shown at first.
        columns: kind, status, and where it leads.
        groups: title, and its questions with the answer of each column.
    """

    title: str
    open: bool
    columns: list[tuple[str, Status, str]]
    groups: list[tuple[str, list[tuple[Question, list[TableCell | None]]]]]
    plots: list[Plot]


@dataclass(frozen=True, slots=True)
class AnswerView:
    """One answer of a cell with all that was said."""

    id: str
    asked: Question
    answer: Answer
    said: Said
    samples: str
    baseline: str


@dataclass(frozen=True, slots=True)
class CellView:
    """One cell with all that it said; `asked` is the title of the question that it ended at."""

    result: CellResult
    anchor: str
    status: Status
    asked: str
    oops: str
    console: str
    answers: list[AnswerView]

    @property
    def unanswered(self) -> int:
        return len(CATALOGUE) - len(self.answers)


def page_of(results: Sequence[CellResult]) -> dict[str, object]:
    """All that the templates of a comparison show, by name."""
    conclusions = conclude(results)
    emulated = any(result.emulated for result in results)
    return {
        "title": "Ways of hiding guest RAM, compared",
        "when": _when(sorted(result.time for result in results if result.time)),
        "versions": ", ".join(dict.fromkeys(result.offmap for result in results)),
        "count": len(results),
        "outcomes": _outcomes(results),
        "emulated": emulated,
        "baseline": BASELINE,
        "conclusions": [_conclusion(each) for each in conclusions],
        "overview": _overview(conclusions),
        "settings": [_setting(cells, results, at == 0) for at, cells in enumerate(_settings(results))],
        # status, title, reason and place of each cell that did not get to its end
        "apart": [_apart(result) for result in results if result.outcome is not CellOutcome.BOOTED],
        "cells": [_cell(result) for result in results],
        "missing": missing_of(results),
        "notes": notes_of(results),
        "facts": facts_of(results),
        "commands": commands_of(results),
        "emulation": _emulation() if emulated else [],
        "statuses": [(each.symbol, each.word, _MEANING[each]) for each in Status],
    }


_MEANING = {
    Status.HIDES: "it booted, and the audit found no page of its RAM mapped by the host kernel, after boot and after "
    "I/O; no secret was found, and the same scan found all those of a plain guest",
    Status.PARTLY: "in some of the settings, and in none exposed",
    Status.EXPOSED: "the host kernel maps at least one page, or a secret was read through its mappings",
    Status.UNDETERMINED: "a piece of the evidence is missing; never counted as hidden",
    Status.REFUSED: "this host kernel, or offmap, does not run a guest on it; the reason is given",
    Status.OOPS: "the host kernel came to its end; its own words are given",
    Status.FAILED: "the measurement did not get to its end; what it had answered by then is shown",
    Status.DEADLINE: "the same, for want of time",
    Status.NOT_RUN: "nobody asked",
}


def anchor(spec: CellSpec) -> str:
    """The place of a cell on the page."""
    return f"cell-{spec.key}"


def _when(times: Sequence[str]) -> str:
    if not times:
        return ""
    first, last = (text.replace("T", " ").replace("Z", "")[:16] for text in (times[0], times[-1]))
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def _outcomes(results: Sequence[CellResult]) -> str:
    parts = []
    for outcome in CellOutcome:
        count = sum(result.outcome is outcome for result in results)
        if count:
            name = "not done in time" if outcome is CellOutcome.DEADLINE else outcome.value
            parts.append(f"{count} {name}")
    return ", ".join(parts)


def _conclusion(one: Conclusion) -> ConclusionView:
    found = sorted((finding for finding in one.findings if finding.cells), key=lambda each: _ORDER.index(each.status))
    return ConclusionView(
        one,
        any(finding.status is Status.HIDES for finding in found),
        [(title, bool(CATALOGUE[id].emulation)) for id, title in _SHOWN_COSTS.items()],
        [_kind_row(finding) for finding in found],
    )


def _kind_row(finding: KindFinding) -> KindRow:
    cells = finding.cells
    ran = any(cell.outcome is CellOutcome.BOOTED for cell in cells)
    return KindRow(
        finding.backend,
        finding.status,
        _count(cells, finding.hiding),
        anchor(cells[0].spec),
        _why(cells, finding.status),
        _titles(finding.lost) if ran else None,
        _titles(finding.undetermined) if ran else None,
        [cost_of(finding, CATALOGUE[id]) for id in _SHOWN_COSTS],
    )


_ORDER = (
    Status.HIDES,
    Status.PARTLY,
    Status.UNDETERMINED,
    Status.FAILED,
    Status.DEADLINE,
    Status.OOPS,
    Status.EXPOSED,
    Status.REFUSED,
    Status.NOT_RUN,
)
"""Of a conclusion's rows: what can be chosen first."""

_MANY = 8


def _titles(questions: Mapping[str, str]) -> str:
    """Of questions, by id; how many, where they are many."""
    titles = titles_of(questions)
    return f"{len(titles)} questions" if len(titles) > _MANY else ", ".join(titles) or "nothing"


def _count(cells: Sequence[CellResult], hiding: Sequence[CellResult]) -> str:
    if len(cells) < 2:
        return ""
    return f"hides in {len(hiding)} of {len(cells)} settings" if hiding else f"{len(cells)} settings"


def _why(cells: Sequence[CellResult], status: Status) -> str:
    """Of what did not boot: the first reason."""
    if status in {Status.HIDES, Status.EXPOSED}:
        return ""
    return next((cell.reason for cell in cells if cell.reason and status_of(cell) is status), "")


def _overview(conclusions: Sequence[Conclusion]) -> Overview | None:
    """None where there is one kernel only."""
    if len(conclusions) < 2:
        return None
    kinds = [finding.backend for finding in conclusions[0].findings]
    rows = []
    for one in conclusions:
        statuses = {finding.backend: finding.status for finding in one.findings}
        rows.append((one.host_kernel, one.release, [statuses[kind] for kind in kinds if kind in statuses]))
    return Overview(kinds, rows)


def _settings(results: Iterable[CellResult]) -> list[list[CellResult]]:
    """The cells of each setting, in the order of kinds."""
    found: dict[tuple[str, str, int, str], list[CellResult]] = {}
    for result in results:
        found.setdefault(result.spec.setting, []).append(result)
    order = {kind: at for at, kind in enumerate(kind_names())}
    return [sorted(cells, key=lambda cell: order.get(cell.spec.backend, len(order))) for cells in found.values()]


def _setting(cells: Sequence[CellResult], results: Sequence[CellResult], opened: bool) -> SettingView:
    host, guest, vcpus, clock = cells[0].spec.setting
    here = {cell.spec.backend: cell for cell in cells}
    refused = {
        result.spec.backend: result
        for result in results
        if result.spec.host_kernel == host and result.spec.backend not in here and status_of(result) is Status.REFUSED
    }
    columns = [(kind, here.get(kind)) for kind in kinds_of(results) if kind in here or kind in refused]
    booted = [cell for cell in cells if cell.answer("works.boot").value is True]
    return SettingView(
        f"{short_kernel(host)}, guest {short_kernel(guest)}, {vcpus} vCPU{'s' if vcpus > 1 else ''}"
        + ("" if clock == "auto" else f", kvm-clock {clock}"),
        opened,
        [
            (kind, status_of(cell) if cell else Status.REFUSED, anchor((cell or refused[kind]).spec))
            for kind, cell in columns
        ],
        [
            (
                group.title,
                [
                    (asked, [_table_cell(asked, cell) for _, cell in columns])
                    for asked in CATALOGUE.values()
                    if asked.group is group
                ],
            )
            for group in Group
        ],
        [plot for asked in COSTS if (plot := ratio_plot(asked, booted))],
    )


def _table_cell(asked: Question, cell: CellResult | None) -> TableCell | None:
    """Nothing where no guest was to answer it: the head of the column says why."""
    if cell is None or (asked.id not in cell.answered and cell.outcome is not CellOutcome.BOOTED):
        return None
    answer = cell.answer(asked.id)
    place = f".{asked.id}" if asked.id in cell.answered else ""
    return TableCell(said(asked, answer), anchor(cell.spec) + place, answer.reason or answer.detail)


def _apart(result: CellResult) -> tuple[Status, str, str, str]:
    lines = (line.strip() for line in result.reason.splitlines())
    reason = next((line for line in lines if line), "no reason was given")
    return status_of(result), result.spec.title, reason, anchor(result.spec)


def _cell(result: CellResult) -> CellView:
    place = anchor(result.spec)
    answers = []
    for asked in CATALOGUE.values():
        if answer := result.answered.get(asked.id):
            samples, baseline = (", ".join(map(number, values)) for values in (answer.samples, answer.baseline))
            answers.append(AnswerView(f"{place}.{asked.id}", asked, answer, said(asked, answer), samples, baseline))
    return CellView(
        result,
        place,
        status_of(result),
        CATALOGUE[result.asked].title if result.asked in CATALOGUE else result.asked,
        result.oops[:CONSOLE],
        result.console[-CONSOLE:],
        answers,
    )


def _emulation() -> list[tuple[str, str]]:
    """What emulation cannot show, with the questions that it touches."""
    of: dict[str, list[str]] = {}
    for asked in CATALOGUE.values():
        if asked.emulation:
            of.setdefault(asked.emulation, []).append(asked.title)
    return [(", ".join(titles), text) for text, titles in of.items()]
