"""The watch: what it prints, when it ends and with which status."""

import argparse
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from offmap.audit.audit import Snapshot
from offmap.audit.classify import classify
from offmap.audit.frames import POPULATED
from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.intervals import Intervals
from offmap.audit.mappings import RUN, KernelMappings
from offmap.audit.process import NoSuchProcess, ProcessEnded
from offmap.audit.result import AuditResult, Source
from offmap.audit.trace.result import Traced
from offmap.audit.verdict import Verdict
from offmap.cli.audit_output import Output, add_output_options
from offmap.cli.audit_watch import watch
from offmap.errors import Undetermined
from offmap.report.typed import decode

from ..audit.frames_of_pages import frames_of_pages
from ..audit.report.samples import vm

NOBODY = 1 << 30  # no process has this PID
BASE = 0xFFFF_8880_0000_0000
PAGE = 4096


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """The watch takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def result(mapped: range, partial: str = "") -> Snapshot:
    """An audit of the frames 100 to 103, of which the kernel maps some."""
    runs = np.zeros(1, dtype=RUN)
    runs[0] = (BASE + mapped.start * PAGE, mapped.start * PAGE, len(mapped) * PAGE, 1, True, True, True)
    kernel = KernelMappings(runs if len(mapped) else runs[:0], (), {4: 1}, BASE)
    seen = frames_of_pages(np.arange(100, 104), np.full(4, POPULATED))
    nothing = np.zeros(0, dtype=np.int64)
    judged = classify(seen, seen, Intervals(nothing, nothing), kernel)
    counts = judged.counts()
    verdict = Verdict.UNKNOWN if partial else counts.verdict(False)
    ram = GuestRam((RamRange(0x7F00_0000_0000, 4 * PAGE, Source.MEMSLOT, 0),))
    part = {"va": "0x7f0000000000", "bytes": 4 * PAGE, "source": "memslot", "guest_phys_addr": 0, "backend": ""}
    audit = decode(
        AuditResult, vm(NOBODY, reach=[], physical={"ram": [], "cell_bytes": None, "cells": []}, ranges=[part])
    )
    audit = msgspec.structs.replace(audit, pages=counts, verdict=verdict, partial=partial or None)
    return Snapshot(audit, ram, kernel, judged)


HIDDEN, EXPOSED = result(range(0)), result(range(102, 103))
ENDED = result(range(0), "process 7 ended during the audit")


def output(*words: str) -> Output:
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    return Output(parser.parse_args(words))


def series(*results: Snapshot | Exception) -> Callable[[], Snapshot]:
    left = iter(results)

    def once() -> Snapshot:
        each = next(left)
        if isinstance(each, Exception):
            raise each
        return each

    return once


def run(*results: Snapshot | Exception, words: tuple[str, ...] = ()) -> int:
    return watch(NOBODY, 0.001, series(*results), output(*words))


def test_first_the_whole_then_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(HIDDEN, HIDDEN, EXPOSED, EXPOSED, HIDDEN, NoSuchProcess("gone")) == 1
    text = capsys.readouterr().out
    assert text.startswith("HIDDEN: ")
    changed = [line for line in text.splitlines() if " changed: " in line]
    assert ["EXPOSED" in line for line in changed] == [True, False]
    assert "mapped" in text and "0x7f0000002000 (guest 0x2000) 4 KiB, at 0x66000: direct map" in text


def test_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(HIDDEN, HIDDEN, EXPOSED, NoSuchProcess("gone"), words=("--json",)) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["schema"], first["verdict"]) == ("offmap-audit/2", "hidden")
    assert (second["schema"], second["verdict"]) == ("offmap-audit-change/1", "exposed")
    assert second["pages"] == {"mapped": 1}


def test_the_end_of_the_process_is_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    for end in (ENDED, ProcessEnded("ended"), NoSuchProcess("gone")):
        assert run(HIDDEN, end) == 0
    assert "UNKNOWN" not in capsys.readouterr().out


def test_what_ended_before_it_was_seen_whole_is_undetermined(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ENDED, NoSuchProcess("gone")) == 3
    assert "UNKNOWN" in capsys.readouterr().out
    with pytest.raises(NoSuchProcess):
        run(NoSuchProcess("gone"))


def test_another_process_that_got_the_pid_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def running(self) -> bool:
            return False

        def close(self) -> None:
            pass

    monkeypatch.setattr("offmap.cli.audit_watch._held", lambda pid: Gone())
    monkeypatch.setattr("offmap.cli.audit_watch._runs", lambda pid: True)
    assert run(HIDDEN, EXPOSED) == 0


def test_a_program_that_was_replaced_counts_while_its_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.cli.audit_watch._runs", lambda pid: True)
    audit = msgspec.structs.replace(ENDED.audit, partial="process 7 replaced its program during the audit")
    again = replace(ENDED, audit=audit)
    with pytest.raises(Undetermined, match="no VM"):
        run(HIDDEN, again, Undetermined("no VM any more"))


def test_sigterm_ends_it_with_the_worst_so_far() -> None:
    def once() -> Snapshot:
        if seen:
            signal.raise_signal(signal.SIGTERM)
        seen.append(1)
        return EXPOSED

    seen: list[int] = []
    assert watch(NOBODY, 0.001, once, output()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_its_sleep_whatever_thread_it_comes_on(number: signal.Signals) -> None:
    def once() -> Snapshot:
        looked.set()
        return EXPOSED

    def send() -> None:
        looked.wait()
        signal.pthread_kill(threading.get_ident(), number)

    looked = threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    assert watch(NOBODY, 86400, once, output()) == 1
    sender.join()


class Traces:
    """In the place of a trace: during each walk, SIGTERM comes."""

    ended = False

    def __init__(self, _pid: int) -> None:
        pass

    def __enter__(self) -> "Traces":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def walked(self, _snapshot: Snapshot) -> Traced:
        signal.raise_signal(signal.SIGTERM)
        return Traced("2026-01-01T00:00:00Z", os.getpid(), Verdict.HIDDEN, 1.0, 0, (), (), ())

    finish = walked


def test_a_second_signal_takes_nothing_from_what_is_said_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("offmap.audit.trace.trace.Trace", Traces)
    assert watch(os.getpid(), 86400, lambda: HIDDEN, output("--json"), traced=True) == 0
    assert [json.loads(line)["schema"] for line in capsys.readouterr().out.splitlines()][1:] == ["offmap-audit-trace/1"]
