"""The comparison's page, Markdown and JSON: what they say, and that nothing is fetched or injected."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from msgspec.structs import replace

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.facts import Host, Machine
from offmap.compare.matrix import DEFAULT_AXES, FULL_AXES, cells_of
from offmap.compare.questions import CATALOGUE, Answer
from offmap.compare.report.document import CompareDocument, compare_document, compare_schema
from offmap.compare.report.markdown import render_compare_markdown
from offmap.compare.report.plot import LEFT, WIDTH, ratio_plot
from offmap.compare.report.repeat import commands_of, in_order, missing_of
from offmap.compare.report.write import render_compare_html, write_reports

from ...audit.report.test_html import Page
from ...audit.report.test_schema import strict
from .compare_samples import answers_of, cell, without

HOSTILE = "<script>alert(1)</script>|\x1b[2J`*_\n# x"


def several() -> list[CellResult]:
    oops = cell(
        "secretmem-bridge", outcome=CellOutcome.OOPS, reason="BUG: page fault", oops="BUG: page fault\nRIP: kvm"
    )
    return [
        cell("memfd"),
        cell("unplugged", answers={"works.balloon": Answer("works.balloon", False, "PFNMAP")}),
        cell("secretmem", outcome=CellOutcome.REFUSED, reason="refused by GUP"),
        replace(oops, asked="works.kvm_clock"),
        without(cell("reserved"), "hidden.after_io"),
    ]


def test_the_page_says_the_answer_first() -> None:
    text = Page(render_compare_html(several())).text
    answer = "unplugged boots and hides all guest RAM; of reserved it could not be determined; secretmem-bridge brought"
    assert 0 < text.index(answer) < text.index("Every question, every kind") < text.index("Each cell")
    assert text.index("It loses the balloon.") < text.index("What could not be determined")


def test_every_refusal_and_oops_is_one_click_away() -> None:
    made = Page(render_compare_html(several()))
    ids = {attributes["id"] for _, attributes in made.elements if attributes.get("id")}
    links = [str(attributes["href"]) for tag, attributes in made.elements if tag == "a"]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    for result in several():
        assert links.count(f"#cell-{result.spec.key}") >= 2
    assert (
        "RIP: kvm" in made.text
        and "refused by GUP" in made.text
        and "ended while it asked kvm-clock" in made.text.replace("askedkvm", "asked kvm")
    )


def test_yes_no_and_unknown_are_words_too() -> None:
    made = Page(render_compare_html(several()))
    (table,) = [table for table in made.tables if table[0][0] == "question" and len(table[0]) > 3]
    kinds = table[0][1:]
    rows = {row[0]: row[1:] for row in table if len(row) == len(table[0])}
    at = next(number for number, name in enumerate(kinds) if name.startswith("unplugged"))
    assert rows["balloon gives memory back"][at] == "✗ no" and rows["boots"][at] == "✓ yes"
    reserved = next(number for number, name in enumerate(kinds) if name.startswith("reserved"))
    assert rows["hidden after I/OE"][reserved] == "? not determined"
    refused = next(number for number, name in enumerate(kinds) if name.startswith("secretmem⊘"))
    assert {row[refused] for row in rows.values() if len(row) == len(kinds)} - {kinds[refused]} == {""}


def test_nothing_is_fetched_and_the_policy_fits() -> None:
    text = render_compare_html(several())
    made = Page(text)
    (policy,) = [str(each["content"]) for tag, each in made.elements if tag == "meta" and "http-equiv" in each]
    for kind in ("script", "style"):
        (raw,) = made.raw[kind]
        assert base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    for _, attributes in made.elements:
        assert not {"src", "style", "onclick", "onload"} & set(attributes)
    assert "http://" not in text and "https://" not in text


def test_hostile_text_stays_text() -> None:
    bad = cell(
        "unplugged",
        outcome=CellOutcome.OOPS,
        reason=HOSTILE,
        oops=HOSTILE,
        console=HOSTILE,
        answers={"works.smp": Answer("works.smp", None, HOSTILE, detail=HOSTILE)},
    )
    made = Page(render_compare_html([bad]))
    assert len(made.raw["script"]) == 1 and "<script>alert(1)</script>" in made.text
    text = render_compare_markdown([bad])
    assert "<script>" not in text and "\x1b" not in text and not re.search("^# x", text, re.M)
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) > 2


def test_names_of_hosts_are_left_out() -> None:
    for text in (
        render_compare_html(several()),
        render_compare_markdown(several()),
        msgspec.json.encode(compare_document(several())).decode(),
    ):
        assert "secret-name" not in text and "--private" not in text and "memmap=256M" in text


VALIDATOR = jsonschema.Draft202012Validator(strict(json.loads(compare_schema())))


@pytest.mark.parametrize("results", [[], several(), [cell("hugetlb", host_kernel="/some/where/bzImage")]])
def test_the_json_is_of_the_published_schema(results: list[CellResult]) -> None:
    text = msgspec.json.encode(compare_document(results))
    VALIDATOR.validate(json.loads(text))
    assert msgspec.json.decode(text, type=CompareDocument) == compare_document(results)


def test_a_document_that_says_something_else_is_not_of_the_schema() -> None:
    document: Any = msgspec.to_builtins(compare_document(several()))
    document["cells"][0]["answers"][0]["value"] = "yes"
    assert not VALIDATOR.is_valid(document)
    with pytest.raises(ValueError, match=r"cells.*answers.*value"):
        msgspec.convert(document, CompareDocument)


def test_the_reports_are_files(tmp_path: Path) -> None:
    paths = write_reports(tmp_path, several())
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert json.loads(paths[2].read_text())["schema"] == "offmap-compare/1"
    assert "⊘ refused" in paths[1].read_text()


def test_the_plot_has_each_pair_and_no_more() -> None:
    cells = [cell("memfd"), cell("unplugged", answers=answers_of(False, 0.15)), without(cell("reserved"), "costs.copy")]
    plot = ratio_plot(CATALOGUE["costs.copy"], cells)
    assert plot is not None
    plain, hidden, none = plot.rows
    assert [len(row.dots) for row in plot.rows] == [5, 5, 0]
    assert hidden.hides and not plain.hides and none.text == "not measured"
    assert plain.median is not None and hidden.median is not None
    assert abs(plain.median - plot.one) < 0.2 and hidden.median < plot.one
    assert hidden.text.endswith("0.15 (0.15 to 0.15)")
    assert all(LEFT <= x <= LEFT + WIDTH for row in plot.rows for x, _ in row.dots)
    assert ratio_plot(CATALOGUE["costs.boot"], cells) is None


def test_fewer_than_five_pairs_are_no_ratio() -> None:
    few = Answer("costs.copy", 50.0, samples=(50.0,) * 4, baseline=(100.0,) * 4)
    text = render_compare_markdown([cell("memfd"), cell("unplugged", answers={"costs.copy": few})])
    (line,) = [line for line in text.splitlines() if line.startswith("| guest memory bandwidth")]
    assert line.endswith("| 50 plain 100, 4 pairs only |")


def test_the_command_that_makes_it_again() -> None:
    assert commands_of([cell(spec.backend) for spec in cells_of(DEFAULT_AXES)]) == ["offmap compare"]
    full = [replace(cell(), spec=spec) for spec in cells_of(FULL_AXES)]
    assert commands_of(full) == ["offmap compare --full"] and missing_of(full) == []
    two = [cell("memfd"), cell("memfd", host_kernel="/some/where/bzImage")]
    assert commands_of(two) == ["offmap compare --host-kernel debian:6.12 --host-kernel bzImage --backend memfd"]
    assert commands_of([*two, cell("unplugged")]) == [
        "offmap compare --backend memfd --backend unplugged",
        "offmap compare --host-kernel bzImage --backend memfd",
    ]


def test_fewer_boots_are_part_of_the_command() -> None:
    cells = [cell(spec.backend) for spec in cells_of(DEFAULT_AXES)]
    assert commands_of([replace(each, inputs={**each.inputs, "boots": "5"}) for each in cells]) == ["offmap compare"]
    few = [replace(each, inputs={**each.inputs, "boots": "1"}) for each in cells]
    assert commands_of(few) == ["offmap compare --boots 1"]


def test_cells_of_several_runs_stand_in_one_order_and_say_so() -> None:
    later = cell("memfd", host_kernel="debian:6.1")
    later = replace(later, inputs={**later.inputs, "code": "other"}, machine=replace(later.machine, accel="kvm"))
    cells = [later, cell("unplugged"), cell("memfd", host_kernel="debian:6.12")]
    assert [(each.spec.host_kernel, each.spec.backend) for each in in_order(cells)] == [
        ("debian:6.12", "memfd"),
        ("debian:6.12", "unplugged"),
        ("debian:6.1", "memfd"),
    ]
    notes = compare_document(cells).notes
    assert "2 states of offmap's code" in notes[0] and "by kvm and some by tcg" in notes[1]
    for text in (render_compare_html(cells), render_compare_markdown(cells)):
        assert "2 states of offmap" in text
    assert compare_document(cells[1:]).notes == ()


def of_inputs(result: CellResult, **inputs: str) -> CellResult:
    return replace(result, inputs={**result.inputs, **inputs})


def everywhere(cells: list[CellResult]) -> list[str]:
    """The notes, of which each is in every form of the report."""
    notes = list(compare_document(cells).notes)
    page, markdown = Page(render_compare_html(cells)).text, render_compare_markdown(cells)
    for note in notes:
        assert note in page and note.replace("_", r"\_") in markdown
    return notes


def test_cells_of_other_code_are_named_where_that_is_short() -> None:
    most = [cell(backend, kernel) for backend in ("memfd", "unplugged") for kernel in ("debian:6.12", "debian:7.3")]
    odd = of_inputs(cell("reserved"), code="old")
    (note,) = everywhere([*most, odd])
    assert "Not of the same as most: reserved on debian:6.12. Run again" in note
    row = [of_inputs(cell(backend, "debian:6.1"), code="old") for backend in ("memfd", "anon")]
    (note,) = everywhere([*most, odd, *row, of_inputs(cell("memfd", vcpus=2), code="old")])
    # As many of each: none was measured later, so the first stands for most.
    assert "reserved on debian:6.12, all on debian:6.1 and memfd on debian:6.12 in some settings." in note
    many = [of_inputs(cell(f"kind{number}"), code="old") for number in range(9)]
    (note,) = compare_document([*(cell(f"other{number}") for number in range(10)), *many]).notes
    assert "kind" not in note and "2 states" in note


def test_of_equally_many_the_later_code_is_the_one_to_go_by() -> None:
    later = replace(of_inputs(cell("unplugged"), code="new"), time="2027-01-01T00:00:00Z")
    assert "Not of the same as most: memfd on debian:6.12." in everywhere([cell("memfd"), later])[0]


def test_a_host_kernel_that_was_another_one_is_noted_and_both_are_shown() -> None:
    first = [of_inputs(cell(backend), host_kernel="d1", host_release="6.12.117") for backend in ("memfd", "unplugged")]
    updated = replace(cell("reserved"), host=Host("6.12.120", "QEMU TCG"))
    updated = of_inputs(updated, host_kernel="d2", host_release="6.12.120")
    cells = [*first, updated]
    assert everywhere(cells) == [
        "Host kernel debian:6.12 is not one kernel here but 2: 6.12.117 (image d1); 6.12.120 (image d2) for reserved "
        "on debian:6.12. So what is concluded for it compares cells of different kernels."
    ]
    assert compare_document(cells).conclusions[0].release == "6.12.117 and 6.12.120"
    text = render_compare_markdown(cells)
    assert "host debian:6.12, 1 of 2: kernel 6.12.117" in text and "host debian:6.12, 2 of 2: kernel 6.12.120" in text
    assert everywhere(first) == []


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"host_kernel": "d2"}, "Host kernel debian:6.12 is not one kernel here but 2: 6.12.117 (image d1); 6.12.117"),
        (
            {"guest_kernel": "d2"},
            "Guest kernel debian:6.12 is not one kernel here but 2: 6.12.117 (image d1); 6.12.117",
        ),
        ({"guest_release": "6.12.9"}, "2: 6.12.117 (image d1); 6.12.9 (image d1) for unplugged on debian:6.12. So its"),
    ],
)
def test_a_digest_or_a_release_alone_makes_another_kernel(inputs: dict[str, str], said: str) -> None:
    (note,) = everywhere([cell("memfd"), cell("anon"), of_inputs(cell("unplugged"), **inputs)])
    assert said in note


def test_kernels_of_different_names_or_unknown_ones_are_no_note() -> None:
    other = of_inputs(cell("memfd", host_kernel="debian:6.1"), host_kernel="d2", host_release="6.1.9")
    failed = replace(
        cell("anon", outcome=CellOutcome.FAILED, reason="no kernel"), inputs={}, host=Host(), machine=Machine()
    )
    assert compare_document([cell("memfd"), other, failed]).notes == ()


def test_the_release_of_a_patched_kernel_is_its_digest_and_said_once() -> None:
    first, rebuilt = (
        of_inputs(cell(kind, host_kernel="patched:7.3"), host_kernel=f"7.3-{digest}", host_release=f"7.3-{digest}")
        for kind, digest in (("memfd", "aa"), ("unplugged", "bb"))
    )
    assert "2: 7.3-aa; 7.3-bb for unplugged on patched:7.3." in everywhere([first, rebuilt])[0]


def test_other_processors_and_qemus_are_one_note() -> None:
    def on(backend: str, **machine: str) -> CellResult:
        return replace(cell(backend), machine=replace(Machine("tcg", "one CPU", qemu="QEMU 7.2"), **machine))

    assert everywhere([on("memfd"), on("anon", qemu="QEMU 9.0")]) == [
        "These cells were measured with 2 QEMU versions (QEMU 7.2; QEMU 9.0): costs of different cells are not of the "
        "same machine."
    ]
    (note,) = everywhere([on("memfd"), on("anon", qemu="QEMU 9.0", cpu="a CPU")])
    assert "with 2 CPUs (a CPU; one CPU) and 2 QEMU versions (QEMU 7.2; QEMU 9.0):" in note
    assert everywhere([on("memfd"), on("anon", qemu="QEMU 9.0", accel="")]) == []


def test_settings_that_hide_are_counted_as_such() -> None:
    plain = [cell("memfd", vcpus=count) for count in (1, 2)]
    mixed = [cell("reserved"), without(cell("reserved", vcpus=2), "hidden.after_io")]
    text = render_compare_markdown([*plain, *mixed])
    assert "exposed, 2 settings" in text and "hides in part, hides in 1 of 2 settings" in text


def test_cells_that_were_not_run_are_named() -> None:
    some = [cell("memfd"), cell("unplugged"), cell("memfd", host_kernel="debian:7.3")]
    assert missing_of(some) == ["unplugged on debian:7.3, guest debian:6.12, 1 vCPU"]
    assert "1 cells of this matrix" not in (text := Page(render_compare_html(some)).text)
    assert "1 cell of this matrix was not run" in text


def test_kernels_stand_beside_each_other() -> None:
    made = Page(render_compare_html([*several(), cell("unplugged", host_kernel="/some/where/bzImage")]))
    assert (
        "Kernels beside each other" in made.text
        and "bzImage" in made.text
        and "/some/where" not in "".join("".join(row) for table in made.tables[:4] for row in table)
    )
