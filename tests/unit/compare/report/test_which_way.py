"""docs/which-way.md says what docs/results says, and docs/results is what the rules make of its own cells."""

import json
import re
from functools import cache
from pathlib import Path

import jsonschema
import msgspec

from offmap.compare.cell_result import CellResult
from offmap.compare.questions import CATALOGUE
from offmap.compare.report.conclude import conclude, cost_of, titles_of
from offmap.compare.report.document import CompareDocument, compare_document, compare_schema
from offmap.compare.report.status import KindFinding, Status
from offmap.compare.report.words import TIMES, number

DOCS = Path(__file__).parents[4] / "docs"
REPORT = DOCS / "results" / "report.json"


@cache
def document() -> CompareDocument:
    return msgspec.json.decode(REPORT.read_bytes(), type=CompareDocument)


def results() -> tuple[CellResult, ...]:
    return document().cells


def page() -> str:
    return (DOCS / "which-way.md").read_text(encoding="utf-8")


def row(kernel: str, finding: KindFinding) -> str:
    """The line of the page's table."""
    ran = finding.hiding or [cell for cell in finding.cells if cell.outcome.value == "booted"]
    if not ran:
        return f"| {kernel} | `{finding.backend}` | {finding.status.word} | | | | |"
    (one,) = ran

    def value(id: str) -> str:
        found = one.answer(id).value
        return "?" if found is None else number(float(found))

    lost = ", ".join(titles_of(finding.lost)) or "nothing"
    if finding.undetermined:
        lost += f"; not determined: {', '.join(titles_of(finding.undetermined))}"
    populate = cost_of(finding, CATALOGUE["costs.populate"])
    numbers = [value("hidden.excluded_pages"), populate, value("costs.direct_map_left")]
    return f"| {kernel} | `{finding.backend}` | {finding.status.word} | {lost} | {' | '.join(numbers)} |"


def rows() -> list[str]:
    return [row(one.host_kernel, finding) for one in conclude(results()) for finding in one.findings if finding.cells]


def test_the_table_is_that_of_the_results() -> None:
    lines = [line for line in page().splitlines() if re.match(r"\| (debian|patched):", line)]
    assert lines == rows()


def test_every_figure_of_the_page_is_in_the_results() -> None:
    known = set()
    for result in results():
        for answer in result.answers:
            if answer.ratio is not None:
                known |= {
                    f"{TIMES}{number(value)}" for value in (answer.ratio.median, answer.ratio.low, answer.ratio.high)
                }
            if answer.value is not None and not isinstance(answer.value, bool):
                known |= {f"{number(float(answer.value))} {unit}" for unit in ("KiB", "pages", "secrets")}
            assert answer.question in CATALOGUE
    known.add("4 KiB")  # the smallest page
    figures = re.findall(rf"{TIMES}[\d.]*\d|\b\d[\d,.]* (?:KiB|pages|secrets)", page())
    assert figures and [figure for figure in figures if figure not in known] == []


def test_what_it_calls_hiding_hides() -> None:
    hides = {
        (one.host_kernel, finding.backend)
        for one in conclude(results())
        for finding in one.findings
        if finding.status is Status.HIDES
    }
    kinds = ("unplugged", "reserved", "secretmem-bridge", "qemu-unplugged", "firecracker-unplugged")
    assert {("debian:6.12", kind) for kind in kinds} == {pair for pair in hides if pair[0] == "debian:6.12"}


def test_the_results_are_what_the_rules_make_of_them() -> None:
    jsonschema.Draft202012Validator(json.loads(compare_schema())).validate(json.loads(REPORT.read_bytes()))
    made = compare_document(results())
    assert made.conclusions == document().conclusions
    assert [cell.status for cell in made.cells] == [cell.status for cell in document().cells]


def test_the_results_name_nobody() -> None:
    for path in sorted((DOCS / "results").iterdir()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(work|root|home|tmp)/", text), path.name
    assert not any(cell.host.name for cell in document().cells)


def test_it_says_how_many_cells_were_run() -> None:
    assert f"{len(results())} cells" in page()
