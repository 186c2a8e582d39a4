"""What the probes of the comparison make of what they see; that they see it is for the lab."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from offmap.audit.audit import Snapshot
from offmap.audit.canary import new_key
from offmap.audit.intervals import Intervals
from offmap.audit.result import Pages
from offmap.audit.verdict import Verdict
from offmap.compare.job import Line
from offmap.compare.probes import costs, devices, hidden, host_events, ram_process
from offmap.compare.probes.guest_program import ProbeError, parse_answer
from offmap.compare.probes.prepared_host import is_clock_offered
from offmap.compare.probes.survey import Survey, measured, paired, yes
from offmap.compare.probes.vmm_memory import parse_smaps
from offmap.compare.questions import CATALOGUE, Answer
from offmap.errors import OffmapError

from ..audit.report.samples import page_counts


def test_an_answer_of_the_guest_is_taken_when_it_is_whole() -> None:
    text = "echo of it\r\n[  1.2] a kernel's word\r\noffmap-probe: = 1 2\r\noffmap-probe: done 0\r\n"
    assert parse_answer(text) == ([["1", "2"]], 0, "")
    for cut in range(len(text)):
        assert parse_answer(text[:cut]) is None


def test_an_answer_may_follow_a_prompt_and_may_be_an_error() -> None:
    assert parse_answer("offmap-guest# offmap-probe: done 5 Input/output error\n") == ([], 5, "Input/output error")
    assert parse_answer("offmap-probe: done what\n") == ([], -1, "")


def test_smaps_adds_what_is_resident_of_each_mapping() -> None:
    text = (
        "7f00-7f10 rw-s 00000000 00:01 5   /dev/offmap\nSize: 64 kB\nRss: 12 kB\nPrivate_Hugetlb: 2048 kB\n"
        "VmFlags: rd wr\n8000-9000 rw-p 00000000 00:00 0 [heap]\nRss: 4 kB\n"
    )
    assert parse_smaps(text) == [(0x7F00, 0x7F10, 2060), (0x8000, 0x9000, 4)]


def survey() -> tuple[Survey, list[Line]]:
    lines: list[Line] = []
    return Survey(lines.append), lines


def test_each_question_is_announced_and_answered_whatever_comes_of_it() -> None:
    ask, lines = survey()

    def breaks() -> Answer:
        raise ProbeError("the guest is gone")

    ask.ask("works.vsock", breaks)
    ask.ask_many(hidden.GONE, lambda: [yes("hidden.zeroed")])
    ask.leave(["breaks.kexec"], "it is not ours")
    assert [line.question for line in lines if line.question] == ["works.vsock", "hidden.zeroed"]
    told = {line.answer.question: (line.answer.value, line.answer.reason) for line in lines if line.answer}
    assert told == {
        "works.vsock": (None, "not measured: the guest is gone"),
        "hidden.zeroed": (True, ""),
        "hidden.restored": (None, "the probe gave no answer to it"),
        "breaks.kexec": (None, "not measured: it is not ours"),
    }


def test_what_is_known_of_one_pair_stands_if_more_cannot_be_had() -> None:
    ask, lines = survey()
    ids = ("costs.boot", "costs.exits")

    def breaks() -> list[Answer]:
        raise ProbeError("the guest is gone")

    ask.ask_many(ids, breaks, or_as_known=True)
    assert [ask.answers[id].value for id in ids] == [None, None]
    ask.tell(paired("costs.boot", [2.0], [1.0], detail="one pair"))
    ask.ask_many(ids, breaks, or_as_known=True)
    known, unknown = (ask.answers[id] for id in ids)
    assert (known.value, known.samples, known.baseline) == (2.0, (2.0,), (1.0,))
    assert known.detail == "one pair; asked again, not measured: the guest is gone"
    assert unknown.value is None and lines[-1].answer == unknown
    ask.ask_many(ids, lambda: [paired("costs.boot", [4.0], [2.0])], or_as_known=True)
    assert ask.answers["costs.boot"].value == 4.0
    ask.ask_many(ids, breaks)
    assert ask.answers["costs.boot"].value is None


def test_a_bug_of_a_probe_is_no_answer() -> None:
    ask, _ = survey()

    def bug() -> Answer:
        raise KeyError("x")

    with pytest.raises(KeyError):
        ask.ask("works.vsock", bug)


def test_turns_alternate_after_one_that_warms_up() -> None:
    order: list[str] = []

    def take(name: str) -> float:
        order.append(name)
        return float(len(order))

    mine, plain = costs.by_turns(3, lambda: take("mine"), lambda: take("plain"))
    assert order == ["plain", "mine", "mine", "plain", "plain", "mine", "mine", "plain"]
    assert (mine, plain) == ([3.0, 6.0, 7.0], [4.0, 5.0, 8.0])


def test_pairs_are_kept_and_the_value_is_the_median() -> None:
    answer = paired("costs.chase", [3.0, 1.0, 2.0, 4.0, 5.0], [1.0] * 5)
    assert answer.value == 3.0
    assert answer.ratio is not None and answer.ratio.median == 3.0
    few = costs.boots([1.0], [2.0], "bare")
    assert few.ratio is None and "1 pair only" in few.reason


CANARIES = 32


def look(verdict: Verdict, *, found: int = 0, control: int = CANARIES, pages: Pages | None = None) -> hidden.Look:
    audit = SimpleNamespace(
        verdict=verdict,
        pages=pages or page_counts(ram_pages=10, pages_populated=10),
        notes=("a note",),
        alias_pages_by_region={},
    )
    return hidden.Look(
        cast(Snapshot, SimpleNamespace(audit=audit)), found, 1 << 30, control == CANARIES, f"{control} found"
    )


@pytest.mark.parametrize(
    ("seen", "value"),
    [
        (look(Verdict.HIDDEN), True),
        (look(Verdict.EXPOSED), False),
        (look(Verdict.UNKNOWN), None),
        (look(Verdict.HIDDEN, control=CANARIES - 1), None),  # the means did not find what is there
        (look(Verdict.HIDDEN, found=1), False),  # a secret was read: whatever the page tables say
        (look(Verdict.UNKNOWN, found=1, control=0), False),
    ],
)
def test_hidden_is_said_only_where_the_control_was_found(seen: hidden.Look, value: bool | None) -> None:
    assert hidden.verdict_answer("hidden.before_io", seen).value is value


def test_nothing_found_is_no_zero_without_the_control() -> None:
    without = {answer.question: answer for answer in hidden.answers_after_io(look(Verdict.HIDDEN, control=0))}
    assert without["hidden.canaries_found_after_io"].value is None
    assert set(without) == set(hidden.AFTER_IO)
    with_it = {answer.question: answer.value for answer in hidden.answers_after_boot(look(Verdict.HIDDEN))}
    assert with_it["hidden.canaries_found"] == 0
    assert with_it["hidden.control"] is True
    assert set(with_it) == set(hidden.AFTER_BOOT)


def frames(*pairs: tuple[int, int]) -> Intervals:
    start, end = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Intervals.union(start, end)


def test_frames_are_counted_where_both_have_them() -> None:
    assert hidden.frames_in(frames((10, 20), (30, 40)), frames((15, 35))) == 10
    assert hidden.frames_in(frames((10, 20)), frames()) == 0


class FakeGuest:
    """Says what it was told to, once its memory is checked."""

    def __init__(self, answer: list[list[str]] | ProbeError) -> None:
        self.answer = answer

    def check_alive(self) -> None:
        """It is."""

    def command(self, line: str) -> list[list[str]]:
        assert line == "check"
        if isinstance(self.answer, ProbeError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ([["0", "1048576"]], True),
        ([["1", "1048576"]], False),
        ([["0", "0"]], False),  # nothing was compared
        (ProbeError("the VMM has ended"), False),
    ],
)
def test_a_guest_outlives_what_leaves_its_memory_as_it_was(said: list[list[str]] | ProbeError, value: bool) -> None:
    answer = host_events.outlives(cast(Any, FakeGuest(said)), "breaks.drop_caches", lambda: "dropped")
    assert answer.value is value
    assert "dropped" in answer.detail


def test_hibernation_is_judged_by_what_it_was_without_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    def now(offered: bool | None) -> None:
        monkeypatch.setattr(host_events, "hibernation_offered", lambda: (offered, "as said"))

    now(False)
    assert host_events.hibernation((True, "")).value is False
    assert host_events.hibernation((False, "")).value is None
    now(True)
    assert host_events.hibernation((True, "")).value is True
    now(None)
    assert host_events.hibernation((None, "")).value is None


def test_direct_io_needs_its_control() -> None:
    def judged(**direct: Any) -> bool | float | None:
        return ram_process._o_direct(ram_process.Attempt(**direct)).value

    assert judged(control=True, same=True) is True
    assert judged(control=True, same=False) is False
    assert judged(control=True, error="EFAULT") is False
    assert judged(control=False, error="EINVAL") is None


def test_a_balloon_cannot_be_judged_where_its_memory_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = SimpleNamespace(pid=1, shell=lambda line: "08-virtio_balloon.ko", command=lambda line: [])
    monkeypatch.setattr(devices, "resident_kib", lambda pid, ranges: 0)
    assert devices.balloon(cast(Any, guest), []).value is None
    sizes = iter([60000, 60000 - (devices.BALLOON >> 10)])
    monkeypatch.setattr(devices, "resident_kib", lambda pid, ranges: next(sizes))
    assert devices.balloon(cast(Any, guest), []).value is True


def test_every_question_of_the_costs_that_guests_answer_is_in_the_catalogue() -> None:
    assert set(costs.RATES) <= set(CATALOGUE)
    for rate in costs.RATES.values():
        assert rate.convert(1000.0) > 0


def test_an_error_of_the_host_is_no_answer_either() -> None:
    ask, _ = survey()

    def refused() -> Answer:
        raise OffmapError("no", "do that")

    ask.ask("costs.exits", refused)
    assert ask.answers["costs.exits"].value is None
    ask.ask("costs.exits", lambda: measured("costs.exits", 3))
    assert ask.answers["costs.exits"].value == 3


def test_the_direct_map_is_compared_with_what_it_was() -> None:
    id = "costs.direct_map_left"
    before = {"DirectMap4k": 100, "DirectMap2M": 4096}
    answer = costs.split(id, before, {"DirectMap4k": 2148, "DirectMap2M": 2048}, "afterwards")
    assert answer.value == 2048
    assert "DirectMap2M 4096 KiB, now 2048" in answer.detail
    assert costs.split(id, before, {}, "afterwards").value is None


@pytest.mark.parametrize(
    ("wanted", "hides", "safe", "offered"),
    [
        ("auto", False, False, True),
        ("auto", True, False, False),
        ("auto", True, True, True),  # KVM goes by userspace address: nothing to withhold it for
        ("off", False, True, False),
        ("on", True, False, True),  # who asks for it is refused elsewhere, or has a QEMU
    ],
)
def test_kvm_clock_is_offered_where_the_host_can_keep_it(wanted: str, hides: bool, safe: bool, offered: bool) -> None:
    assert is_clock_offered(wanted, hides=hides, safe=safe) is offered


def test_exits_are_counted_boot_by_boot() -> None:
    mine = [{"exits": 100 + number, "io_exits": 7} for number in range(5)]
    answer = costs.exits(mine, [{"exits": 200, "io_exits": 9}] * 5, "memfd")
    assert answer.value == 102 and answer.ratio is not None and answer.ratio.median == 0.51
    assert "io_exits 7 (9 on memfd)" in answer.detail
    blind = costs.exits([*mine, {}], [{"exits": 200}] * 6, "memfd")
    assert blind.value is None and "debugfs" in blind.reason


def test_a_look_at_the_control_alone_tells_whose_secrets_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    own = hidden._CONTROL_FIRST
    found = [SimpleNamespace(canary=number) for number in (3, 3, own, own + 1)]
    asked: list[dict[str, Any]] = []

    def audit(pid: int, **how: Any) -> Any:
        asked.append({"pid": pid, **how})
        return SimpleNamespace(audit=SimpleNamespace(scan=SimpleNamespace(found=found, bytes_scanned=4096)))

    monkeypatch.setattr(hidden, "snapshot_process", audit)
    guest, control = (SimpleNamespace(pid=pid, ranges=lambda pid=pid: [pid]) for pid in (1, 2))
    seen = hidden.look_beside(cast(Any, guest), cast(Any, control), hidden.Secrets(2, key))
    assert (seen.found, seen.scanned, seen.controlled) == (1, 4096, True)
    assert "found 2 of the 2 secrets of a plain guest" in seen.control
    assert not hidden.look_beside(cast(Any, guest), cast(Any, control), hidden.Secrets(3, key)).controlled
    del asked[2:]
    assert asked == [{"pid": 1, "ranges": [1]}, {"pid": 2, "scan": key, "ranges": [2]}]
