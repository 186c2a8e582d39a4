"""What the comparison's page says, worked out: plain dictionaries of text and numbers for the templates."""

from collections.abc import Iterable, Sequence
from typing import Any

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.matrix import BACKENDS, CellSpec
from offmap.compare.questions import CATALOGUE, Group, Question
from offmap.compare.report.conclude import COSTS, Conclusion, conclude, cost_of, kinds_of, titles_of
from offmap.compare.report.notes import notes_of
from offmap.compare.report.plot import ratio_plot
from offmap.compare.report.repeat import commands_of, facts_of, missing_of
from offmap.compare.report.standing import BASELINE, Standing, finding_of, standing_of
from offmap.compare.report.words import number, said, short_kernel

__all__ = ["compare_view", "result_view"]

View = dict[str, Any]

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


def compare_view(results: Sequence[CellResult]) -> View:
    """All that a template needs."""
    conclusions = conclude(results)
    times = sorted(result.time for result in results if result.time)
    emulated = any(result.emulated for result in results)
    settings = _settings(results)
    return {
        "title": "Ways of hiding guest RAM, compared",
        "when": _when(times),
        "versions": ", ".join(dict.fromkeys(result.offmap for result in results)),
        "count": len(results),
        "outcomes": _outcomes(results),
        "emulated": emulated,
        "baseline": BASELINE,
        "conclusions": [_conclusion(each) for each in conclusions],
        "overview": _overview(conclusions),
        "settings": [_setting(key, cells, results, at == 0) for at, (key, cells) in enumerate(settings.items())],
        "apart": [_apart(result) for result in results if result.outcome is not CellOutcome.BOOTED],
        "cells": [result_view(result) for result in results],
        "missing": missing_of(results),
        "notes": notes_of(results),
        "facts": facts_of(results),
        "commands": commands_of(results),
        "emulation": _emulation() if emulated else [],
        "standings": [(each.symbol, each.word, _MEANING[each]) for each in Standing],
    }


_MEANING = {
    Standing.HIDES: "it booted, and the audit found no page of its RAM mapped by the host kernel, after boot and after "
    "I/O; no secret was found, and the same scan found all those of a plain guest",
    Standing.PARTLY: "in some of the settings, and in none exposed",
    Standing.EXPOSED: "the host kernel maps at least one page, or a secret was read through its mappings",
    Standing.UNDETERMINED: "a piece of the evidence is missing; never counted as hidden",
    Standing.REFUSED: "this host kernel, or offmap, does not run a guest on it; the reason is given",
    Standing.OOPS: "the host kernel came to its end; its own words are given",
    Standing.FAILED: "the measurement did not get to its end; what it had answered by then is shown",
    Standing.DEADLINE: "the same, for want of time",
    Standing.NOT_RUN: "nobody asked",
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


def _conclusion(one: Conclusion) -> View:
    shown = [CATALOGUE[id] for id in _SHOWN_COSTS]
    return {
        "name": one.name,
        "release": one.release,
        "answer": one.answer,
        "choice": one.choice,
        "unsettled": list(one.unsettled),
        "good": any(finding.standing is Standing.HIDES for finding in one.findings),
        "costs": [{"title": _SHOWN_COSTS[asked.id], "mark": bool(asked.emulation)} for asked in shown],
        "rows": [
            {
                "kind": finding.backend,
                "standing": finding.standing,
                "cells": _count(finding.cells, finding.hiding),
                "href": anchor(finding.cells[0].spec),
                "why": _why(finding.cells, finding.standing),
                "lost": _few(titles_of(finding.lost)) if _ran(finding.cells) else None,
                "open": _few(titles_of(finding.undetermined)) if _ran(finding.cells) else None,
                "costs": [cost_of(finding, asked) for asked in shown],
            }
            for finding in sorted(one.findings, key=lambda finding: _ORDER.index(finding.standing))
            if finding.cells
        ],
    }


_ORDER = (
    Standing.HIDES,
    Standing.PARTLY,
    Standing.UNDETERMINED,
    Standing.FAILED,
    Standing.DEADLINE,
    Standing.OOPS,
    Standing.EXPOSED,
    Standing.REFUSED,
    Standing.NOT_RUN,
)
"""Of a conclusion's rows: what can be chosen first."""

_MANY = 8


def _few(titles: list[str]) -> str:
    return f"{len(titles)} questions" if len(titles) > _MANY else ", ".join(titles) or "nothing"


def _ran(cells: Iterable[CellResult]) -> bool:
    return any(cell.outcome is CellOutcome.BOOTED for cell in cells)


def _count(cells: Sequence[CellResult], hiding: Sequence[CellResult]) -> str:
    if len(cells) < 2:
        return ""
    return f"hides in {len(hiding)} of {len(cells)} settings" if hiding else f"{len(cells)} settings"


def _why(cells: Sequence[CellResult], standing: Standing) -> str:
    """Of what did not boot: the first reason."""
    if standing in {Standing.HIDES, Standing.EXPOSED}:
        return ""
    return next((cell.reason for cell in cells if cell.reason and standing_of(cell) is standing), "")


def _overview(conclusions: Sequence[Conclusion]) -> View | None:
    """Kernels beside each other; nothing where there is one."""
    if len(conclusions) < 2:
        return None
    kinds = [finding.backend for finding in conclusions[0].findings]
    rows = []
    for one in conclusions:
        of = {finding.backend: finding.standing for finding in one.findings}
        rows.append({"name": one.name, "release": one.release, "standings": [of[kind] for kind in kinds if kind in of]})
    return {"kinds": kinds, "rows": rows}


Setting = tuple[str, str, int, str]


def _settings(results: Iterable[CellResult]) -> dict[Setting, list[CellResult]]:
    """Cells that differ in the kind of RAM only."""
    found: dict[Setting, list[CellResult]] = {}
    for result in results:
        spec = result.spec
        found.setdefault((spec.host_kernel, spec.guest_kernel, spec.vcpus, spec.kvm_clock), []).append(result)
    order = {kind: at for at, kind in enumerate(BACKENDS)}
    return {
        key: sorted(cells, key=lambda cell: order.get(cell.spec.backend, len(order))) for key, cells in found.items()
    }


def _setting(key: Setting, cells: Sequence[CellResult], results: Sequence[CellResult], opened: bool) -> View:
    host, guest, vcpus, clock = key
    of = {cell.spec.backend: cell for cell in cells}
    elsewhere = {
        result.spec.backend: result
        for result in results
        if result.spec.host_kernel == host and result.spec.backend not in of and standing_of(result) is Standing.REFUSED
    }
    kinds = [kind for kind in kinds_of(results) if kind in of or kind in elsewhere]
    columns = [(of.get(kind), kind) for kind in kinds]
    booted = [cell for cell in cells if cell.answer("works.boot").value is True]
    plots = [plot for asked in COSTS if (plot := ratio_plot(asked, booted))]
    return {
        "title": f"{short_kernel(host)}, guest {short_kernel(guest)}, {vcpus} vCPU{'s' if vcpus > 1 else ''}"
        + ("" if clock == "auto" else f", kvm-clock {clock}"),
        "open": opened,
        "columns": [
            {
                "kind": kind,
                "standing": standing_of(cell) if cell else Standing.REFUSED,
                "href": anchor(cell.spec if cell else elsewhere[kind].spec),
            }
            for cell, kind in columns
        ],
        "groups": [
            {
                "title": group.title,
                "rows": [_question(asked, columns) for asked in CATALOGUE.values() if asked.group is group],
            }
            for group in Group
        ],
        "plots": plots,
    }


def _question(asked: Question, columns: Sequence[tuple[CellResult | None, str]]) -> View:
    return {
        "id": asked.id,
        "title": asked.title,
        "unit": asked.unit,
        "explanation": asked.explanation,
        "mark": bool(asked.emulation),
        "cells": [_table_cell(asked, cell) for cell, _ in columns],
    }


def _table_cell(asked: Question, cell: CellResult | None) -> View | None:
    """Nothing where no guest was to answer it: the head of the column says why."""
    if cell is None or (asked.id not in cell.answers and cell.outcome is not CellOutcome.BOOTED):
        return None
    answer = cell.answer(asked.id)
    shown = said(asked, answer)
    place = f".{asked.id}" if asked.id in cell.answers else ""
    return {"said": shown, "href": anchor(cell.spec) + place, "tip": answer.reason or answer.detail}


def _apart(result: CellResult) -> View:
    return {
        "title": result.spec.title,
        "standing": standing_of(result),
        "reason": _first_line(result.reason) or "no reason was given",
        "href": anchor(result.spec),
    }


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def result_view(result: CellResult) -> View:
    """One cell with all that it said."""
    answers = []
    for asked in CATALOGUE.values():
        if asked.id not in result.answers:
            continue
        answer = result.answers[asked.id]
        answers.append(
            {
                "id": f"{anchor(result.spec)}.{asked.id}",
                "title": asked.title,
                "unit": asked.unit,
                "said": said(asked, answer),
                "reason": answer.reason,
                "detail": answer.detail,
                "samples": _samples(answer.samples),
                "baseline": _samples(answer.baseline),
                "explanation": asked.explanation,
            }
        )
    return {
        "anchor": anchor(result.spec),
        "title": result.spec.title,
        "standing": standing_of(result),
        "outcome": result.outcome.value,
        "reason": result.reason,
        "asked": CATALOGUE[result.asked].title if result.asked in CATALOGUE else result.asked,
        "oops": result.oops[:CONSOLE],
        "console": result.console[-CONSOLE:],
        "seconds": f"{result.seconds:.0f}",
        "time": result.time,
        "kernel": str(result.host.get("kernel", "")),
        "answers": answers,
        "unanswered": len(CATALOGUE) - len(answers),
        "evidence": finding_of(result.spec.backend, [result], []).standing,
    }


def _samples(values: Sequence[float]) -> str:
    return ", ".join(number(value) for value in values)


def _emulation() -> list[tuple[str, str]]:
    """What emulation cannot show, with the questions that it touches."""
    of: dict[str, list[str]] = {}
    for asked in CATALOGUE.values():
        if asked.emulation:
            of.setdefault(asked.emulation, []).append(asked.title)
    return [(", ".join(titles), text) for text, titles in of.items()]
