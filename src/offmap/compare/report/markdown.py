"""A comparison as Markdown, for a repository: the answers of the page, without its plots."""

from collections.abc import Iterable, Sequence
from typing import Any

from offmap.compare.cell_result import CellResult
from offmap.compare.report.conclude import NOISE
from offmap.compare.report.views import compare_view
from offmap.compare.report.words import TIMES
from offmap.report.decode import plain

__all__ = ["render_compare_markdown"]


def render_compare_markdown(results: Sequence[CellResult]) -> str:
    """The text; ends with a newline."""
    page = compare_view(results)
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


def _standing(standing: Any) -> str:
    return f"{standing.symbol} {standing.word}"


def _lines(page: dict[str, Any]) -> Iterable[str]:
    yield f"# {page['title']}"
    yield ""
    yield f"{page['when']}, offmap {page['versions']}, {page['count']} cells: {page['outcomes']}."
    yield ""
    for note in page["notes"]:
        yield _text(note)
        yield ""
    for one in page["conclusions"]:
        release = f" ({one['release']})" if one["release"] not in {"", one["name"]} else ""
        yield f"## Host kernel {_text(one['name'] + release)}"
        yield f"**{_text(one['answer'])}**"
        yield ""
        if one["choice"]:
            yield _text(one["choice"])
            yield ""
        costs = [cost["title"] + _mark(page, cost) for cost in one["costs"]]
        head = ["guest RAM", "standing", "lost, where plain RAM has it", "not determined", *costs]
        yield from _table(head, (_row(row, len(costs)) for row in one["rows"]))
        if one["unsettled"]:
            yield "What could not be determined:"
            yield from (f"- {_text(line)}" for line in one["unsettled"])
            yield ""
    yield (
        f"Costs: median of the ratios to {page['baseline']} RAM under the same VMM in the same host, in turns "
        f"({TIMES}1: the same). {NOISE.strip()}: not to be told from what {page['baseline']} shows against itself, "
        "with its spread. Fewer than five pairs give no ratio."
    )
    yield ""
    if page["overview"]:
        yield "## Kernels beside each other"
        rows = ([row["name"], *(_standing(each) for each in row["standings"])] for row in page["overview"]["rows"])
        yield from _table(["host kernel", *page["overview"]["kinds"]], rows)
    if page["apart"]:
        yield "## Refusals, oopses, and cells that did not get to their end"
        rows = ([_standing(row["standing"]), row["title"], row["reason"]] for row in page["apart"])
        yield from _table(["outcome", "cell", "in its own words"], rows)
    if page["missing"]:
        yield f"Not run, of this matrix: {len(page['missing'])} cells."
        yield from (f"- {_text(name)}" for name in page["missing"])
        yield ""
    for setting in page["settings"]:
        yield f"## {_text(setting['title'])}"
        yield from _setting(page, setting)
    if page["emulation"]:
        yield "## E: what emulation cannot show"
        yield from (f"- {_text(titles)}: {_text(text)}." for titles, text in page["emulation"])
        yield ""
    yield "## How to repeat it"
    yield "    scripts/setup --compare"
    yield from (f"    {command}" for command in page["commands"])
    yield ""
    yield "## The hosts"
    for name, facts in page["facts"]:
        yield f"- {_text(name)}: " + "; ".join(f"{_text(key)} {_text(value)}" for key, value in facts)
    yield ""
    yield "## What the words mean"
    yield from (f"- {symbol} {word}: {meaning}" for symbol, word, meaning in page["standings"])


def _mark(page: dict[str, Any], row: dict[str, Any]) -> str:
    return " (E)" if row["mark"] and page["emulated"] else ""


def _row(row: dict[str, Any], costs: int) -> list[str]:
    standing = _standing(row["standing"]) + (f", {row['cells']}" if row["cells"] else "")
    if row["lost"] is None:
        return [row["kind"], standing, row["why"], *[""] * (costs + 1)]
    return [row["kind"], standing, row["lost"], row["open"], *row["costs"]]


def _setting(page: dict[str, Any], setting: dict[str, Any]) -> Iterable[str]:
    head = ["question", *(column["kind"] for column in setting["columns"])]
    for group in setting["groups"]:
        yield f"### {group['title']}"
        rows = []
        for row in group["rows"]:
            unit = f", {row['unit']}" if row["unit"] else ""
            rows.append([row["title"] + unit + _mark(page, row), *(_cell(cell) for cell in row["cells"])])
        yield from _table(head, rows)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    said = cell["said"]
    more = f" {said.more}" if said.more else ""
    return f"{said.symbol} {said.word}{more}".strip()
