"""A comparison as Markdown, for a repository: the answers of the page, without its plots."""

from collections.abc import Iterable, Sequence

from offmap.compare.cell_result import CellResult
from offmap.compare.report.conclude import NOISE
from offmap.compare.report.page import KindRow, Page, SettingView, TableCell, page_of
from offmap.compare.report.status import Status
from offmap.compare.report.words import TIMES
from offmap.report.typed import plain


def render_compare_markdown(results: Sequence[CellResult]) -> str:
    """The text; ends with a newline."""
    page = page_of(results)
    return "\n".join(_lines(page)) + "\n"


def _text(value: object) -> str:
    """One line, of which nothing is taken for Markdown or HTML."""
    line = plain(" ".join(str(value).split()))
    for special in "\\`*_[]<>|":
        line = line.replace(special, f"\\{special}" if special not in "<>" else {"<": "&lt;", ">": "&gt;"}[special])
    return line


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(_text(name) for name in head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(_text(value) for value in row)} |" for row in rows), ""]


def _status(status: Status) -> str:
    return f"{status.symbol} {status.word}"


def _lines(page: Page) -> Iterable[str]:
    yield f"# {page.title}"
    yield ""
    yield f"{page.when}, offmap {page.versions}, {page.count} cells: {page.outcomes}."
    yield ""
    for note in page.notes:
        yield _text(note)
        yield ""
    for view in page.conclusions:
        one = view.conclusion
        release = f" ({one.release})" if one.release not in {"", one.name} else ""
        yield f"## Host kernel {_text(one.name + release)}"
        yield f"**{_text(one.answer)}**"
        yield ""
        if one.choice:
            yield _text(one.choice)
            yield ""
        costs = [title + _mark(page, blurred) for title, blurred in view.costs]
        head = ["guest RAM", "result", "lost, where plain RAM has it", "not determined", *costs]
        yield from _table(head, (_row(row) for row in view.rows))
        if one.unsettled:
            yield "What could not be determined:"
            yield from (f"- {_text(line)}" for line in one.unsettled)
            yield ""
    yield (
        f"Costs: median of the ratios to {page.baseline} RAM under the same VMM in the same host, in turns "
        f"({TIMES}1: the same). {NOISE.strip()}: not to be told from what {page.baseline} shows against itself, "
        "with its spread. Fewer than five pairs give no ratio."
    )
    yield ""
    if page.overview:
        yield "## Kernels beside each other"
        rows = ([name, *map(_status, statuses)] for name, _, statuses in page.overview.rows)
        yield from _table(["host kernel", *page.overview.kinds], rows)
    if page.apart:
        yield "## Refusals, oopses, and cells that did not get to their end"
        rows = ([_status(status), title, reason] for status, title, reason, _ in page.apart)
        yield from _table(["outcome", "cell", "in its own words"], rows)
    if page.missing:
        yield f"Not run, of this matrix: {len(page.missing)} cells."
        yield from (f"- {_text(name)}" for name in page.missing)
        yield ""
    for setting in page.settings:
        yield f"## {_text(setting.title)}"
        yield from _setting(page, setting)
    if page.emulation:
        yield "## E: what emulation cannot show"
        yield from (f"- {_text(titles)}: {_text(text)}." for titles, text in page.emulation)
        yield ""
    yield "## How to repeat it"
    yield "    scripts/setup --compare"
    yield from (f"    {command}" for command in page.commands)
    yield ""
    yield "## The hosts"
    for name, facts in page.facts:
        yield f"- {_text(name)}: " + "; ".join(f"{_text(key)} {_text(value)}" for key, value in facts)
    yield ""
    yield "## What the words mean"
    yield from (f"- {symbol} {word}: {meaning}" for symbol, word, meaning in page.statuses)


def _mark(page: Page, blurred: bool) -> str:
    return " (E)" if blurred and page.emulated else ""


def _row(row: KindRow) -> list[str]:
    status = _status(row.status) + (f", {row.cells}" if row.cells else "")
    if row.lost is None or row.open is None:
        return [row.kind, status, row.why, *[""] * (len(row.costs) + 1)]
    return [row.kind, status, row.lost, row.open, *row.costs]


def _setting(page: Page, setting: SettingView) -> Iterable[str]:
    head = ["question", *(kind for kind, _, _ in setting.columns)]
    for title, questions in setting.groups:
        yield f"### {title}"
        rows = []
        for asked, cells in questions:
            unit = f", {asked.unit}" if asked.unit else ""
            rows.append([asked.title + unit + _mark(page, bool(asked.emulation)), *map(_cell, cells)])
        yield from _table(head, rows)


def _cell(cell: TableCell | None) -> str:
    if cell is None:
        return ""
    said = cell.said
    more = f" {said.more}" if said.more else ""
    return f"{said.symbol} {said.word}{more}".strip()
