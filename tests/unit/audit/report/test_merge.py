"""Many hosts made one, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from offmap.audit.report.merge import Damaged, merged_json, read_reports
from offmap.audit.verdict import Verdict

from .samples import PAGE, Json, every_vm, exposed, host, mapping, not_audited, pages, place, scan, total, unknown, vm
from .test_schema import check

NOW = "2026-11-22T23:00:00Z"


def write(folder: Path, **documents: Any) -> list[Path]:
    paths = []
    for name, document in documents.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(document if isinstance(document, str) else json.dumps(document))
    return paths


def refused(paths: list[Path]) -> list[str]:
    with pytest.raises(Damaged) as caught:
        read_reports(paths)
    assert "\n" not in str(caught.value) and "nothing was merged" in str(caught.value)
    return [reason.replace(str(paths[0].parent) + "/", "") for reason in caught.value.reasons]


def test_the_worst_of_all_hosts_is_the_verdict(tmp_path: Path) -> None:
    hidden, other = every_vm(vm(1, name="a"), name="a"), vm(2, host=host("b"), offmap="9.9")
    for documents, verdict, status in (
        ({"a": hidden, "b": other}, Verdict.HIDDEN, 0),
        ({"a": hidden, "b": every_vm(name="b", not_audited=[not_audited()])}, Verdict.UNKNOWN, 3),
        ({"a": hidden, "b": unknown(3, host=host("c")), "c": exposed(4, host=host("d"))}, Verdict.EXPOSED, 1),
        ({"a": every_vm(name="a")}, None, 0),
    ):
        reports = read_reports(write(tmp_path, **documents))
        merged: Any = merged_json(reports, NOW)
        assert merged["verdict"] == (verdict and verdict.value) and merged["exit_status"] == status
        assert [part["result"] for part in merged["reports"]] == list(documents.values())
        check(merged)


def test_a_merged_report_can_be_merged_again(tmp_path: Path) -> None:
    first: Any = merged_json(read_reports(write(tmp_path, a=vm(1, name="a"), b=exposed(2))), NOW)
    again: Any = merged_json(read_reports(write(tmp_path, ab=first, c=vm(1, name="c"))), NOW)
    check(again)
    assert [part["result"]["host"]["name"] for part in again["reports"]] == ["a", "host1", "c"]
    assert again["reports"][0]["source"].endswith("a.json") and again["exit_status"] == 1


def test_results_of_one_host_and_several_vms_are_merged(tmp_path: Path) -> None:
    assert len(read_reports(write(tmp_path, a=vm(1), b=vm(2)))) == 2


def test_each_file_that_cannot_be_used_has_a_line(tmp_path: Path) -> None:
    deep = "[" * 100_000
    cut = json.dumps(vm())[:-20]
    lying = json.dumps(exposed() | {"verdict": "hidden"})
    documents: Json = {
        "good": vm(),
        "empty": "",
        "cut": cut,
        "deep": deep,
        "words": "UNKNOWN: it failed",
        "other": {"schema": "offmap-demo/1"},
        "older": vm() | {"schema": "offmap-audit/1"},
        "list": [],
        "twice": json.dumps(vm())[:-1] + ', "verdict": "hidden"}',
        "huge": vm() | {"pid": 1 << 64},
        "lying": lying,
        "typed": vm() | {"pid": "1"},
        "merged": {"schema": "offmap-audit-merged/1", "reports": [{}]},
    }
    paths = [*write(tmp_path, **documents), tmp_path / "none.json", tmp_path]
    lines = refused(paths)
    assert len(lines) == len(paths) - 1 and not any("\n" in line for line in lines)
    for line, part in zip(
        lines,
        (
            "empty.json: is empty",
            "cut.json: is not JSON: ",
            "deep.json: is not JSON: nested too deeply",
            "words.json: is not JSON",
            "other.json: its schema is 'offmap-demo/1', not ",
            "older.json: its schema is 'offmap-audit/1', not ",
            "list.json: it names no schema",
            "twice.json: has 'verdict' twice in one object",
            "huge.json: pid: is no whole number of 64 bits",
            "lying.json: VM 170: it says hidden, and its figures do not",
            "typed.json: pid: Expected int, got str",
            "merged.json: is a merged report without",
            "none.json: No such file",
            f"{tmp_path}: Is a directory",
        ),
        strict=True,
    ):
        assert line.startswith(part), line


@pytest.mark.parametrize(
    "changes",
    [
        {"partial": "process 169 ended during the audit"},
        {"pages": pages(65536, direct_map_pages=1)},
        {"pages": pages(65536, alias_pages=1)},
        {"pages": pages(65536, excluded_pages=1, excluded_direct_pages=1, pages_populated=65535)},
        {"reach": [total(1)]},
        {"aliases": [mapping(0x200_0000, PAGE, alias=True)]},
        {"walk": vm()["walk"] | {"unreadable": [{"va": "0xffffc90000000000", "bytes": 4096, "reason": "a reason"}]}},
        {"ranges": [vm()["ranges"][0] | {"source": "guess"}]},
        {"scan": scan(1)},
        {"scan": scan() | {"for": "secret", "secret_bytes": 16, "canaries_found": None, "places": [place(False)]}},
    ],
)
def test_hidden_is_not_taken_on_trust(tmp_path: Path, changes: Json) -> None:
    (line,) = refused(write(tmp_path, a=vm(**changes)))
    assert line == "a.json: VM 169: it says hidden, and its figures do not"


def test_a_vm_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    lines = refused(write(tmp_path, a=vm(1), b=every_vm(vm(1), vm(2)), c=vm(1, name="other")))
    assert len(lines) == 1 and lines[0].startswith("b.json: VM 1 of host host1 is in ")


def test_a_vm_that_is_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    assert refused(write(tmp_path, a=every_vm(vm(1), vm(1)))) == ["a.json: it has a VM twice"]
    assert refused(write(tmp_path, a=every_vm(vm(1), not_audited=[not_audited(1)]))) == ["a.json: it has a VM twice"]
    parts = [{"result": vm(1)}, {"result": vm(1)}]
    (line,) = refused(write(tmp_path, a={"schema": "offmap-audit-merged/1", "reports": parts}))
    assert line.startswith("a.json: VM 1 of host host1 is in ")


def test_file_names_are_written_plainly(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J.json"
    path.write_text("")
    (line,) = refused([path])
    assert "\x1b" not in line
