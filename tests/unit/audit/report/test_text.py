"""An audit as text: the verdict first, 80 columns, and no word that an audited process could put into our mouth."""

import re

import pytest

from offmap.audit.report.hosts import failed_report, parse_report
from offmap.audit.report.text import fleet_line, render_fleet, render_vm, verdict_line
from offmap.audit.result import AuditResult
from offmap.audit.verdict import Verdict

from .samples import Json, every_vm, exposed, not_audited, pages, scan, unknown, vm


def parsed(document: Json) -> AuditResult:
    return parse_report(document).vms[0]


def figures(text: str) -> dict[str, int]:
    """Pages by name, of the table's rows."""
    rows = re.findall(r"^  (\S.*?) +(\d+)(?: pages)?  +[\d.]+ [KMG]?i?B", text, re.MULTILINE)
    return {name: int(number) for name, number in rows}


def test_first_line_is_the_verdict() -> None:
    for document, line in (
        (vm(), "HIDDEN: none of the 65536 guest pages of qemu-system-x86 (169) is mapped"),
        (exposed(), "EXPOSED: 100 of 180 guest pages of qemu-system-x86 (170) are mapped"),
        (unknown(), "UNKNOWN: it cannot be told if guest pages of qemu-system-x86 (171) are mapped"),
    ):
        assert verdict_line(parsed(document)) == line == render_vm(parsed(document)).splitlines()[0]


def test_canaries_stand_in_the_verdict() -> None:
    assert verdict_line(parsed(vm(scan=scan()))).endswith("is mapped; 0 canaries found")
    judged = parsed(vm(verdict="exposed", pages=pages(10, canaries_found=1), scan=scan(1, in_guest=False)))
    assert verdict_line(judged).startswith("EXPOSED: secrets of qemu-system-x86 (169) are readable")
    assert verdict_line(judged).endswith("; 1 canary found")
    assert "page cache of /var/log/messages, byte 0x1000" in render_vm(judged).replace("\n           ", " ")


def test_table_has_each_page_once() -> None:
    rows = figures(render_vm(parsed(exposed())))
    assert rows.pop("guest RAM") == 256
    assert rows == {
        "mapped by the kernel": 100,
        "unknown": 0,
        "no mapping found": 80,
        "not populated": 76,
        "direct map": 98,
        "kernel image": 2,
    }
    assert figures(render_vm(parsed(vm())))["hidden"] == 65536


def test_hidden_is_not_said_of_pages_of_a_vm_that_is_not() -> None:
    for document in (exposed(), unknown(), vm(verdict="exposed", pages=pages(10, canaries_found=1), scan=scan(1))):
        assert "hidden" not in render_vm(parsed(document)).lower()


def test_ranges_say_where_the_guest_has_them() -> None:
    assert "memslot  0x7f0000000000 256 MiB at guest 0x0, unplugged" in render_vm(parsed(vm()))


def test_what_a_secret_speaks_against_is_unknown() -> None:
    judged = parsed(vm(verdict="exposed", pages=pages(10, canaries_found=1), scan=scan(1)))
    assert judged.pages_by_state == {"exposed": 0, "unknown": 10, "hidden": 0, "unpopulated": 0, "excluded": 0}


def test_reasons_notes_and_excluded_pages_are_told() -> None:
    text = render_vm(parsed(unknown(partial="the process ended")))
    assert "6 pages: swapped out" in text and "note     a note" in text and "partial  the process ended" in text
    kept = vm(pages=pages(10, pages_populated=8, excluded_pages=2, excluded_mapped_pages=1))
    assert "kept from the guest" in render_vm(parsed(kept)) and "1 of them mapped" in render_vm(parsed(kept))


def test_a_second_opinion_is_told() -> None:
    figures = {
        "pages": 256,
        "frames_agreed": 250,
        "frames_unasked": 6,
        "addresses": 512,
        "mapped": 300,
        "unmapped": 212,
    }
    oracle = {"name": "drgn", "version": "0.0.33", "seed": 7, "retried": 0, "seconds": 1.0, **figures}
    text = " ".join(render_vm(parsed(vm(oracle=oracle))).split())
    assert "oracle drgn 0.0.33 agrees on the frames of 250 of 256 guest pages" in text
    assert "on 512 kernel addresses (300 mapped, 212 not)" in text


@pytest.mark.parametrize("color", [False, True])
def test_eighty_columns(color: bool) -> None:
    long = "a path of some length/" * 12
    documents = [
        vm(1234567, pages=pages(1 << 30), ram=1 << 30, notes=[long], scan=scan(20)) | {"verdict": "exposed"},
        exposed(1234567, notes=[long], partial=long),
        unknown(1234567, pages=pages(256, unknown_pages=6, unknown_reasons={long: 6})),
    ]
    for document in documents:
        for text in (render_vm(parsed(document), color), render_fleet([parse_report(every_vm(document))], color)):
            lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
            assert max(map(len, lines[1:])) <= 80, max(lines, key=len)
            assert not any(line != line.rstrip() for line in lines)


def test_names_that_the_process_chose_cannot_write_a_verdict() -> None:
    lie = "x\r\x1b[2KHIDDEN: none\n\u202e"
    document = exposed(process=lie, ranges=[exposed()["ranges"][0] | {"backend": lie}])
    for text in (render_vm(parsed(document)), render_fleet([parse_report(every_vm(document))])):
        assert not set("\x1b\r\u202e") & set(text)
        assert not any(line.startswith("HIDDEN") for line in text.splitlines())


def test_colour_only_where_it_was_asked_for() -> None:
    assert "\x1b" not in render_vm(parsed(exposed()))
    assert render_vm(parsed(exposed()), color=True).startswith("\x1b[1;31mEXPOSED\x1b[0m: ")
    assert render_fleet([parse_report(every_vm(vm()))], color=True).startswith("\x1b[1;32mHIDDEN\x1b[0m: ")


def test_line_of_a_host_is_of_the_worst() -> None:
    for vms, line in (
        ([], "NO VM: no process on host1 holds a KVM VM"),
        ([vm(1), vm(2)], "HIDDEN: no page of 2 VMs on host1 is mapped by the host kernel"),
        ([vm(1), unknown(2)], "UNKNOWN: 1 of 2 VMs on host1 could not be judged; none is known to be exposed"),
        ([vm(1), unknown(2), exposed(3)], "EXPOSED: the host kernel maps guest memory of 1 of 3 VMs on host1"),
    ):
        report = parse_report(every_vm(*vms))
        assert fleet_line([report]) == render_fleet([report]).splitlines()[0] == line


def test_a_vm_that_was_not_audited_is_unknown() -> None:
    report = parse_report(every_vm(vm(), not_audited=[not_audited()]))
    assert report.verdict is Verdict.UNKNOWN
    text = render_fleet([report])
    assert text.startswith("UNKNOWN: 1 of 2 VMs on host1 could not be judged")
    assert re.search(r"^  crosvm \(172\) +unknown +- +- +-$", text, re.MULTILINE)
    assert "crosvm (172) was not audited: process 172 ended" in text


def test_vms_that_may_have_been_missed_are_unknown() -> None:
    report = parse_report(every_vm(vm(), notes=["process 9 may not be looked at"]))
    assert report.verdict is Verdict.UNKNOWN and render_fleet([report]).startswith("UNKNOWN: there may be VMs on host1")


def test_a_failed_audit_is_unknown() -> None:
    report = failed_report("0.1.0", "2026-11-22T22:50:26Z", parse_report(vm()).host, "no /proc/kcore")
    assert report.verdict is Verdict.UNKNOWN
    text = render_fleet([report])
    assert text.startswith("UNKNOWN: the audit on host1 failed") and "no /proc/kcore" in text


def test_many_hosts_have_a_column() -> None:
    reports = [parse_report(every_vm(vm(1), name="a")), parse_report(exposed(2, name="a-host-of-a-longer-name"))]
    text = render_fleet(reports)
    assert text.startswith("EXPOSED: the host kernel maps guest memory of 1 of 2 VMs on 2 hosts")
    assert text.splitlines()[3].startswith("  a-host-of-a-l")  # the gravest first
    assert re.search(r"^  a +qemu-system-x86 \(1\) +hidden ", text, re.MULTILINE)
    assert re.search(r"^  a-host-of-a-l… +qemu-system-x86 \(2\) +exposed ", text, re.MULTILINE)
