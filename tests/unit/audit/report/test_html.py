"""The page: what it says, that nothing is fetched or can be injected, and that it stays small."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from offmap.audit.report.hosts import failed_report, parse_report
from offmap.audit.report.html import render_html

from .samples import PAGE, Json, cell, every_vm, exposed, host, mapping, not_audited, pages, scan, unknown, vm

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """A page taken apart: its text, elements with their attributes, and the raw text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": [], "json": [], "title": []}
        self.words: list[str] = []
        self.open: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in VOID:
            return
        kind = "json" if tag == "script" and attributes.get("type") == "application/json" else tag
        if kind in self.raw and not (tag == "title" and any(name == "svg" for name, _ in self.open)):
            self.raw[kind].append("")
        self.open.append((tag, kind))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        tag, kind = self.open[-1] if self.open else ("", "")
        if kind in {"script", "style", "json"}:
            self.raw[kind][-1] += data
            return
        self.words.append(data)
        if any(tag in {"td", "th"} for tag, _ in self.open) and tag != "title":
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def page(*documents: Json) -> Page:
    return Page(render_html([parse_report(document) for document in documents]))


def test_says_the_verdict_first() -> None:
    for document, verdict in ((vm(), "hidden"), (exposed(), "exposed"), (unknown(), "unknown")):
        made = page(document)
        (section,) = made.classes("verdict")
        assert section["class"] == f"verdict v-{verdict}"
        words = made.text.upper()
        assert words.index(verdict.upper()) < words.index("PHYSICAL MEMORY")


def test_the_page_shows_when_it_was_looked_at() -> None:
    walk = {"at": 0.0, "seconds": 0.1, "whole": True, "new": True}
    walks = [walk, walk | {"at": 0.7, "whole": False, "new": False}]
    made = page(vm(coverage={"seconds": 1.0, "walks": 1, "roots": {"init_top_pgt": 1}, "looks": walks}))
    assert "1 walks of the page tables of 1 roots in 1.00 s; 1 more do not count" in made.text
    assert "When it was looked at" not in page(vm()).text


def test_hidden_is_said_of_nothing_in_a_page_about_a_vm_that_is_not() -> None:
    for document in (exposed(), unknown()):
        made = page(document)
        before = made.text.split("What was done, and what it means")[0]
        assert "hidden" not in before.replace("ranges that are not hidden", "").lower()
        assert not made.classes("f-hidden")


def test_who_cannot_see_the_picture_is_not_told_hidden_either() -> None:
    for document, word in ((exposed(), "no mapping found"), (unknown(), "no mapping found"), (vm(), "hidden")):
        labels = [have["aria-label"] or "" for _, have in page(document).elements if "aria-label" in have]
        (label,) = {text for text in labels if text.startswith("Physical memory")}
        assert word in label and ("hidden" in label) == (word == "hidden")


def test_picture_has_a_cell_for_each_range_with_its_facts() -> None:
    made = page(exposed())
    looks = {name: made.classes(f"f-{name}") for name in ("direct", "alias-image", "unmapped")}
    assert all(looks.values())
    data = json.loads(made.raw["json"][0])
    assert [(each[0], each[1], each[2]) for each in data["cells"]] == [
        (0x200_0000, 2 * PAGE, "alias-image"),
        (0x4000_0000, 98 * PAGE, "direct"),
        (0x5000_0000, 80 * PAGE, "unmapped"),
    ]
    assert "0x40000000 to 0x40061fff, 392 KiB; direct map; qemu-system-x86 (170), 98 of its pages" in made.text
    assert data["start"] == 0 and data["end"] >= 0x8000_0000 and data["ram"] == [[0x1000, 0x8000_0000]]


def test_partly_unknown() -> None:
    document = unknown(physical={"ram": [], "cell_bytes": None, "cells": [cell(0x5000_0000, 250 * PAGE, unknown=6)]})
    made = page(document)
    assert made.classes("f-unknown") and "6 pages are unknown: swapped out" in made.text and "a note" in made.text
    assert page(unknown(physical={"ram": [], "cell_bytes": None, "cells": []})).text.count("nothing to draw") == 1


def test_tables_have_the_ranges_with_their_rights() -> None:
    rows = {tuple(row) for table in page(exposed()).tables for row in table}
    address = f"{0xFFFF_FFFF_8200_0000:#x}"
    image = ("kernel image", address, "0x2000000", "0x7f0002000000", "", "8 KiB", "4 KiB", "rw-", "")
    assert image in rows
    assert ("direct map", "direct mapping of all physical memory", "98", "392 KiB", "2 MiB", "rw-", "1", "") in rows


def test_a_page_for_many_vms_names_each() -> None:
    made = page(every_vm(vm(1), exposed(2), unknown(3), not_audited=[not_audited(4)]))
    (table,) = [each for each in made.tables if each[0][:2] == ["verdict", "process"]]
    assert [(row[0], row[2]) for row in table[1:]] == [
        ("exposed", "2"),
        ("unknown", "3"),
        ("unknown", "4"),
        ("hidden", "1"),
    ]
    assert "crosvm (4) was not audited, so its memory is unknown" in made.text


def test_one_vm_of_perhaps_more_is_not_the_whole() -> None:
    made = page(every_vm(vm(1), notes=["process 9 may not be looked at"]))
    assert made.classes("verdict")[0]["class"] == "verdict v-unknown"
    assert "there may be VMs on host1 that were not audited" in made.text


def test_a_page_for_many_hosts() -> None:
    made = page(every_vm(vm(1, name="a"), name="a"), every_vm(exposed(2), name="b", offmap="0.2.0"), every_vm(name="c"))
    (table,) = [each for each in made.tables if each[0][:3] == ["host", "verdict", "process"]]
    assert [(row[0], row[1]) for row in table[1:]] == [("b", "exposed"), ("a", "hidden")]
    assert "EXPOSED" in made.text and "0.2.0, 0.1.0" in made.text
    (hosts,) = [each for each in made.tables if each[0][:3] == ["host", "verdict", "VMs"]]
    assert [row[:6] for row in hosts[1:]] == [
        ["b", "exposed", "1", "1", "0", "0"],
        ["a", "hidden", "1", "0", "0", "1"],
        ["c", "no VM", "0", "0", "0", "0"],
    ]
    # The gravest host first, and open.
    details = [attributes for tag, attributes in made.elements if tag == "details"]
    assert "open" in details[0] and "open" not in details[-1]


def test_a_failed_audit_is_a_page_too() -> None:
    report = failed_report("0.1.0", "2026-11-22T22:50:26Z", parse_report(vm()).host, "no /proc/kcore here")
    made = Page(render_html([report]))
    assert made.classes("verdict")[0]["class"] == "verdict v-unknown" and "no /proc/kcore here" in made.text
    assert "NO VM" in page(every_vm()).text


def test_secrets_are_shown_where_they_were_read() -> None:
    made = page(vm(verdict="exposed", pages=pages(10, canaries_found=1), scan=scan(1, in_guest=False), ram=10))
    assert any(
        row[0] == "canary 0000" and row[-1] == "page cache of /var/log/messages, byte 0x1000"
        for table in made.tables
        for row in table
    )


EVIL = "</script></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover=x {{ 7*7 }} {%"


def test_names_cannot_inject() -> None:
    names = {"kernel": EVIL, "cpu": EVIL, "cmdline": EVIL, "microcode": EVIL}
    bad_vmm = {"vmm": EVIL, "executable": EVIL, "vms": 1, "vcpus": 1}
    document = exposed(
        process=EVIL,
        notes=[EVIL],
        partial=EVIL,
        vmm=bad_vmm,
        host=host(EVIL, **names),
        ranges=[exposed()["ranges"][0] | {"backend": EVIL, "source": EVIL}],
        aliases=[mapping(0x200_0000, 2 * PAGE, alias=True, caller=EVIL, region=EVIL, kind=EVIL)],
        offmap=EVIL,
    )
    document["pages"]["unknown_reasons"] = {EVIL: 1}
    others = [every_vm(document, name=EVIL, notes=[EVIL]), every_vm(name="b", not_audited=[not_audited(1, EVIL)])]
    for made in (page(document), page(*others)):
        clean = page(vm())
        assert made.raw["style"] == clean.raw["style"] and made.raw["script"] == clean.raw["script"]
        for text in made.raw["json"]:
            assert EVIL in json.loads(text)["cells"][0][4] and "<" not in text
        assert not [
            tag for tag, _ in made.elements if tag in {"img", "iframe", "object", "embed", "link", "base", "form"}
        ]
        assert not [key for _, attributes in made.elements for key in attributes if key.startswith("on")]
        assert EVIL in "".join(made.words) and "49" not in made.raw["title"]


def test_control_characters_are_written_out() -> None:
    text = render_html([parse_report(exposed(process="a\x1b[2J\u202eb\x00", notes=["\ud800"]))])
    assert not set("\x1b\x00\u202e") & set(text) and "\\x1b[2J\\u202eb\\x00" in text
    text.encode("utf-8")


def test_nothing_is_fetched_and_only_our_script_runs() -> None:
    made = page(exposed())
    addresses = [
        value
        for _, attributes in made.elements
        for key, value in attributes.items()
        if key in {"src", "href", "action", "data", "poster", "xlink:href", "style"}
    ]
    assert addresses == []
    style, script = made.raw["style"], made.raw["script"]
    assert len(style) == len(script) == 1
    assert set(re.findall(r"url\(([^)]*)\)", style[0])) <= {f"#p-{name}" for name in PATTERNS}
    assert "@import" not in style[0] and "http" not in script[0].replace("http://www.w3.org/2000/svg", "")
    (policy,) = [a["content"] for tag, a in made.elements if tag == "meta" and a.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'; ")
    for text, directive in ((style[0], "style-src"), (script[0], "script-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    ids = {attributes["id"] for _, attributes in made.elements if "id" in attributes}
    assert ids == {f"p-{name}" for name in PATTERNS}


PATTERNS = ("direct", "both", "alias-image", "alias-vmalloc", "alias-other", "unknown", "unmapped")


@pytest.mark.parametrize("vms", [1, 300])
def test_the_page_is_bounded(vms: int) -> None:
    many = [cell(number * 3 * PAGE, PAGE, direct=1) for number in range(6000)]
    ranges = [mapping(number * 3 * PAGE, PAGE) for number in range(6000)]
    documents = []
    for number in range(vms):
        document = exposed(number, notes=["note"] * 100)
        if number == 0:
            document |= {
                "pages": pages(6000, direct_map_pages=6000, mapped_pages=6000),
                "physical": {"ram": [], "cell_bytes": None, "cells": many},
                "direct_map_ranges": ranges,
                "direct_map_ranges_omitted": 50_000,
            }
        documents.append(document)
    text = render_html([parse_report(every_vm(*documents))])
    assert len(text) < 4_000_000
    made = Page(text)
    assert f"The first 400 of {56_000 + 2 * (vms - 1) + 1:,} ranges" in made.text
