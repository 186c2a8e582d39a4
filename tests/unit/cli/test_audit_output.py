"""Every way that an audit is shown ends in the same exit status, and none is left saying what no longer holds."""

import contextlib
import json
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from offmap.audit.guest_ram import GuestRam
from offmap.audit.kvm_list import Vm
from offmap.audit.reach import PhysicalMap, VmmFacts
from offmap.audit.result import AuditResult
from offmap.audit.verdict import Verdict
from offmap.audit.vms import VmProcess
from offmap.cli.main import main
from offmap.errors import ExitStatus, OffmapError, Undetermined

from ..audit.report.samples import page_counts
from ..audit.report.test_html import Page
from ..audit.report.test_schema import audited, check

RESULTS = {
    Verdict.HIDDEN: page_counts(ram_pages=2, pages_populated=2),
    Verdict.EXPOSED: page_counts(ram_pages=2, pages_populated=2, direct_map_pages=1, mapped_pages=1),
    Verdict.UNKNOWN: page_counts(ram_pages=2, pages_populated=1, unknown_pages=1, unknown_reasons={"swapped out": 1}),
}


def result(verdict: Verdict, pid: int = 1) -> AuditResult:
    empty: Any = {"aliases": (), "direct_map_ranges": (), "reach": (), "partial": None, "notes": ()}
    if verdict is not Verdict.EXPOSED:
        empty["physical"] = PhysicalMap((), None, ())
        empty["ranges"] = audited().ranges[:1]
        empty["walk"] = msgspec.structs.replace(audited().walk, unreadable=())
    return audited(verdict=verdict, pages=RESULTS[verdict], pid=pid, **empty)


Answer = AuditResult | BaseException


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that says what the audit of each VM finds; those of ``--all`` have the PIDs 1, 2, …"""

    def found(*answers: Answer) -> None:
        def snapshot_processes(pids: list[int], **_: Any) -> Any:
            every = {pid: answers[pid - 1] for pid in pids}
            for answer in every.values():
                if isinstance(answer, BaseException) and not isinstance(answer, OffmapError):
                    raise answer
            return {
                pid: answer
                if isinstance(answer, OffmapError)
                else SimpleNamespace(audit=answer, ram=SimpleNamespace(vms=()))
                for pid, answer in every.items()
            }

        vms = [
            VmProcess(pid + 1, "vmm", VmmFacts("QEMU", "", 1, 0), frozenset({pid + 1})) for pid in range(len(answers))
        ]
        monkeypatch.setattr("offmap.audit.audit.snapshot_processes", snapshot_processes)
        monkeypatch.setattr("offmap.audit.vms.find_vms", lambda: (vms, []))

    return found


def metrics(path: Path) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("verdict", "")): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
        if family.name in {"offmap_audit_verdict", "offmap_audit_success"}
    }


@pytest.mark.parametrize("which", [["1"], ["--all"]])
@pytest.mark.parametrize("verdict", list(Verdict))
def test_each_output_ends_in_the_verdict_s_status(
    which: list[str], verdict: Verdict, audit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(result(verdict))
    status = verdict.exit_status
    prom, html = tmp_path / "offmap.prom", tmp_path / "page.html"
    assert main(["audit", *which]) == status
    assert capsys.readouterr().out.startswith(f"{verdict.name}: ")
    assert main(["audit", *which, "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    check(document)
    assert main(["audit", *which, "--prometheus", str(prom), "--html", str(html), "--no-color"]) == status
    assert capsys.readouterr().out.startswith(f"{verdict.name}: ")
    assert metrics(prom)["offmap_audit_verdict", verdict.value] == 1
    assert Page(html.read_text()).classes(f"v-{verdict.value}")
    assert main(["audit", *which, "--json", "--prometheus", str(prom)]) == status
    check(json.loads(capsys.readouterr().out))
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(document))
    for more in ([], ["--json"], ["--prometheus", str(prom)], ["--html", str(html)]):
        assert main(["audit", "--merge", str(saved), *more]) == status
        text = capsys.readouterr().out
        if more == ["--json"]:
            check(json.loads(text))
        else:
            assert text.startswith(f"{verdict.name}: ")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Undetermined("no /proc/kcore"), ExitStatus.UNDETERMINED),
        (OffmapError("it failed"), ExitStatus.FAILED),
        (KeyboardInterrupt(), ExitStatus.FAILED),
        (MemoryError("all gone"), ExitStatus.FAILED),
    ],
)
def test_a_failed_audit_overwrites_what_was_called_hidden(
    error: BaseException, status: ExitStatus, audit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prom, html = tmp_path / "offmap.prom", tmp_path / "page.html"
    options = ["--prometheus", str(prom), "--html", str(html)]
    audit(result(Verdict.HIDDEN))
    assert main(["audit", "1", *options]) == ExitStatus.DONE
    audit(error)
    assert main(["audit", "1", *options]) == status
    found = metrics(prom)
    assert found["offmap_audit_success", ""] == 0 and found["offmap_audit_verdict", "unknown"] == 1
    assert found["offmap_audit_verdict", "hidden"] == 0
    assert Page(html.read_text()).classes("verdict")[0]["class"] == "verdict v-unknown"
    assert main(["audit", "1", "--json"]) == status
    assert capsys.readouterr().out.count("HIDDEN") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--scan", "file:/nowhere/key"],
        ["--canary", "no key"],
        ["--evidence", "NEW", "--evidence-key", "/nowhere/key.pem"],
        ["--range", "here"],
        ["--for", "0"],
    ],
)
def test_an_audit_that_cannot_begin_overwrites_what_was_called_hidden(
    options: list[str], audit: Any, tmp_path: Path
) -> None:
    prom = tmp_path / "offmap.prom"
    audit(result(Verdict.HIDDEN))
    command = ["audit", "1", "--prometheus", str(prom)]
    assert main(command) == ExitStatus.DONE
    options = [str(tmp_path / "new") if word == "NEW" else word for word in options]
    assert main([*command, *options]) == ExitStatus.FAILED
    assert metrics(prom)["offmap_audit_verdict", "hidden"] == 0 == metrics(prom)["offmap_audit_success", ""]


def test_sigterm_overwrites_what_was_called_hidden(audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prom = tmp_path / "offmap.prom"

    def killed(pid: list[int], **_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()  # the handler raises before this
        raise AssertionError(pid)

    audit(result(Verdict.HIDDEN))
    assert main(["audit", "1", "--prometheus", str(prom)]) == ExitStatus.DONE
    monkeypatch.setattr("offmap.audit.audit.snapshot_processes", killed)
    with pytest.raises(SystemExit) as caught:
        main(["audit", "1", "--prometheus", str(prom)])
    assert caught.value.code == ExitStatus.FAILED
    assert metrics(prom)["offmap_audit_success", ""] == 0 == metrics(prom)["offmap_audit_verdict", "hidden"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_while_an_audit_runs_no_file_has_a_verdict(audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prom, page = tmp_path / "offmap.prom", tmp_path / "offmap.html"
    command = ["audit", "1", "--prometheus", str(prom), "--html", str(page)]
    audit(result(Verdict.HIDDEN))
    assert main(command) == ExitStatus.DONE
    assert metrics(prom)["offmap_audit_verdict", "hidden"] == 1
    seen = []

    def looks(pids: list[int], **_: Any) -> Any:
        # As a SIGKILL just now would leave it.
        seen.append((metrics(prom), page.read_text()))
        return {pid: SimpleNamespace(audit=result(Verdict.HIDDEN), ram=GuestRam(())) for pid in pids}

    monkeypatch.setattr("offmap.audit.audit.snapshot_processes", looks)
    assert main(command) == ExitStatus.DONE
    ((figures, text),) = seen
    assert figures["offmap_audit_success", ""] == 0 == figures["offmap_audit_verdict", "hidden"]
    assert figures["offmap_audit_verdict", "unknown"] == 1
    assert "an audit is in progress: there is no verdict yet" in text
    assert metrics(prom)["offmap_audit_verdict", "hidden"] == 1


def test_what_was_remembered_reaches_the_next_audit(
    audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, prom = tmp_path / "seen.json", tmp_path / "offmap.prom"
    command = ["audit", "1", "--remember", str(path), "--prometheus", str(prom)]
    vm, seen = Vm(0x1000, 0x2000, "kvm-42", (), (), True, 0, 5, (), ()), []

    def looks(pids: list[int], **options: Any) -> Any:
        seen.append([each.invalidations for each in options["seen"]])
        return {pid: SimpleNamespace(audit=result(Verdict.HIDDEN), ram=GuestRam((), (vm,))) for pid in pids}

    monkeypatch.setattr("offmap.audit.audit.snapshot_processes", looks)
    assert main(command) == main(command) == ExitStatus.DONE
    assert seen == [[], [5]]
    # What cannot be read is no reason to say nothing, and an older verdict must not stay.
    path.write_text("{}")
    assert main(command) == ExitStatus.FAILED
    assert "is not what an audit kept" in capsys.readouterr().err and len(seen) == 2
    assert metrics(prom)["offmap_audit_verdict", "hidden"] == 0 == metrics(prom)["offmap_audit_success", ""]


def test_an_old_verdict_that_cannot_be_replaced_goes(
    audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prom, page, link = tmp_path / "offmap.prom", tmp_path / "offmap.html", tmp_path / "link.prom"
    link.symlink_to(prom)
    command = ["audit", "1", "--prometheus", str(link), "--html", str(page)]
    audit(result(Verdict.HIDDEN))
    assert main(command) == ExitStatus.DONE
    assert metrics(prom)["offmap_audit_verdict", "hidden"] == 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # as a full disk has it
    try:
        assert main(command) == ExitStatus.FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "writing" in capsys.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.exists()] == []


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_result_that_contradicts_itself_is_never_shown(
    more: list[str], audit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prom = tmp_path / "offmap.prom"
    audit(msgspec.structs.replace(result(Verdict.EXPOSED), verdict=Verdict.HIDDEN))
    assert main(["audit", "1", "--prometheus", str(prom), *more]) == ExitStatus.FAILED
    said = capsys.readouterr()
    assert said.out == "" and "contradicts itself" in said.err and said.err.count("\n") == 1
    assert metrics(prom)["offmap_audit_success", ""] == 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_result_that_nobody_could_be_told_is_none(
    more: list[str], audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prom = tmp_path / "offmap.prom"
    options = [*more, "--prometheus", str(prom)]
    audit(result(Verdict.HIDDEN))
    assert main(["audit", "1", *options]) == ExitStatus.DONE
    audit(result(Verdict.EXPOSED))
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["audit", "1", *options]) == ExitStatus.FAILED
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert metrics(prom)["offmap_audit_verdict", "hidden"] == 0


def test_of_all_vms_the_worst_counts(audit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prom = tmp_path / "offmap.prom"
    hidden, unseen = result(Verdict.HIDDEN), Undetermined("it may not be looked at")
    for answers, status in (
        ((), 0),
        ((hidden, result(Verdict.HIDDEN, 2)), 0),
        ((hidden, unseen), 3),
        ((hidden, unseen, result(Verdict.EXPOSED, 3)), 1),
    ):
        audit(*answers)
        assert main(["audit", "--all", "--json", "--prometheus", str(prom)]) == status
        document = json.loads(capsys.readouterr().out)
        check(document)
        assert document["exit_status"] == status
        assert metrics(prom)["offmap_audit_success", ""] == (unseen not in answers)


def test_a_file_that_cannot_be_written_fails_and_the_verdict_is_said(
    audit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(result(Verdict.HIDDEN))
    assert main(["audit", "1", "--prometheus", str(tmp_path / "none" / "offmap.prom")]) == ExitStatus.FAILED
    said = capsys.readouterr()
    assert said.out.startswith("HIDDEN: ") and said.err.count("\n") == 1


def test_what_cannot_be_merged_is_said_in_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("")
    prom = tmp_path / "offmap.prom"
    words = ["--merge", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--prometheus", str(prom)]
    assert main(["audit", *words]) == ExitStatus.FAILED
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 3
    assert all(line.startswith("offmap audit: ") for line in said.err.splitlines())
    assert metrics(prom)["offmap_audit_success", ""] == 0


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--json-schema"]) == ExitStatus.DONE
    assert json.loads(capsys.readouterr().out)["title"] == "offmap audit"


@pytest.mark.parametrize("words", [["1", "--all"], ["--all", "--merge", "x"], ["1", "--merge", "x"], []])
def test_one_thing_at_a_time(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *words]) == ExitStatus.FAILED
    assert capsys.readouterr().err.count("\n") == 1


def test_colours(audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    audit(result(Verdict.HIDDEN))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for words, no_color, coloured in (([], "", True), (["--no-color"], "", False), ([], "1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        main(["audit", "1", *words])
        assert ("\x1b" in capsys.readouterr().out) is coloured
