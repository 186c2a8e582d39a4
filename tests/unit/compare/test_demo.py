"""The demonstration: cells as rows, and rows held against the claims."""

import re
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from offmap.audit.canary import new_key
from offmap.audit.verdict import Verdict
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.claims import (
    CANARIES,
    PATCHED,
    STOCK,
    Claim,
    Claimed,
    DemoRow,
    Mismatch,
    check,
    row_name,
    without_control,
)
from offmap.compare.demo import PRESET, DemoResult, _meanwhile, _no_attack, _order, claims_of, judge, row_of, specs_of
from offmap.compare.facts import Guest, Host, Machine
from offmap.compare.guest import CLOCKSOURCE, PLANTED, READY, canary_parameters, guest_initramfs
from offmap.compare.questions import CATALOGUE, Answer
from offmap.compare.report.demo import attack_lines
from offmap.compare.spec import CellSpec
from offmap.errors import ExitStatus, OffmapError
from offmap.lab.cpio import regular
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

PLAIN = DemoRow(
    backend="anon",
    host_kernel="6.12",
    guest_kernel="6.12",
    outcome=CellOutcome.BOOTED,
    verdict=Verdict.EXPOSED,
    ram_pages=65536,
    pages_populated=20000,
    direct_map_pages=20000,
    alias_pages=0,
    unknown_pages=0,
    canaries_planted=CANARIES,
    canaries_found=CANARIES,
)
HIDDEN = replace(
    PLAIN, backend="reserved", verdict=Verdict.HIDDEN, pages_populated=65536, direct_map_pages=0, canaries_found=0
)
REFUSED = DemoRow(
    backend="secretmem",
    host_kernel="6.12",
    guest_kernel="",
    outcome=CellOutcome.REFUSED,
    reason="this kernel's GUP refuses memfd_secret pages to KVM",
)
HIDING = [row.backend for row in STOCK if row.verdict is Claimed.HIDDEN]
CLOCKS = {"auto": None, "on": "kvm-clock", "off": "tsc"}
BY_CLAIM = {Claimed.EXPOSED: PLAIN, Claimed.HIDDEN: HIDDEN, Claimed.REFUSED: REFUSED}


ENDED: dict[str, Any] = {
    "attack_ends": True,
    "attack": 'ends at "guest: kernel": it is not mapped; nor is any other page',
    "attack_reads": 90_000,
    "plain_attack_reads": 20_000,
}


def as_claimed(row: Claim) -> DemoRow:
    made = replace(
        BY_CLAIM[row.verdict], backend=row.backend, kvm_clock=row.kvm_clock, clocksource=CLOCKS[row.kvm_clock]
    )
    return replace(made, **ENDED) if row.attacked else made


GOOD = {row.name: as_claimed(row) for row in STOCK}
GOOD_PATCHED = {row.name: as_claimed(row) for row in PATCHED}


def ended(*mismatches: Mismatch) -> ExitStatus:
    return DemoResult("", "", Host(), (), "", mismatches).exit_status


def status(cells: dict[str, DemoRow]) -> ExitStatus:
    return ended(*check(cells.values(), STOCK))


def spoilt(backend: str, **changes: Any) -> dict[str, DemoRow]:
    return GOOD | {backend: replace(GOOD[backend], **changes)}


def test_all_as_claimed_is_done() -> None:
    assert list(check(GOOD.values(), STOCK)) == []
    assert status(GOOD) is ExitStatus.DONE


@pytest.mark.parametrize(
    ("backend", "changes", "expected"),
    [
        ("reserved", {"verdict": Verdict.EXPOSED, "direct_map_pages": 1}, ExitStatus.EXPOSED),
        ("reserved", {"verdict": Verdict.HIDDEN, "canaries_found": 1}, ExitStatus.EXPOSED),
        ("reserved", {"verdict": Verdict.UNKNOWN, "canaries_found": 1}, ExitStatus.EXPOSED),
        ("reserved", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("reserved", {"verdict": None}, ExitStatus.UNDETERMINED),
        ("reserved", {"canaries_found": None}, ExitStatus.UNDETERMINED),
        ("reserved", {"canaries_planted": 0}, ExitStatus.FAILED),
        ("reserved", {"canaries_planted": 63}, ExitStatus.FAILED),
        ("reserved", {"outcome": CellOutcome.FAILED, "reason": "the VMM ended"}, ExitStatus.FAILED),
        ("reserved", {"outcome": CellOutcome.REFUSED, "reason": "nothing reserved"}, ExitStatus.FAILED),
        ("reserved", {"outcome": CellOutcome.OOPS, "reason": "BUG: unable\nto handle"}, ExitStatus.FAILED),
        ("reserved", {"outcome": CellOutcome.FAILED, "reason": ""}, ExitStatus.FAILED),
        ("reserved", {"outcome": CellOutcome.FAILED, "reason": "r", "verdict": Verdict.EXPOSED}, ExitStatus.EXPOSED),
        ("reserved", {"canaries_planted": 63, "canaries_found": 1}, ExitStatus.EXPOSED),
        ("unplugged", {"verdict": Verdict.EXPOSED, "alias_pages": 1}, ExitStatus.EXPOSED),
        ("unplugged", {"attack_ends": False, "attack": "recovered"}, ExitStatus.EXPOSED),
        ("unplugged", {"attack_ends": None, "attack": "unknown: lost"}, ExitStatus.UNDETERMINED),
        ("unplugged", {"attack_ends": None, "attack": ""}, ExitStatus.UNDETERMINED),
        ("unplugged", {"plain_attack_reads": None}, ExitStatus.UNDETERMINED),
        ("secretmem-bridge", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("qemu-unplugged", {"canaries_found": 1}, ExitStatus.EXPOSED),
        ("anon", {"verdict": Verdict.HIDDEN}, ExitStatus.UNDETERMINED),
        ("anon", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("anon", {"verdict": None, "canaries_found": None}, ExitStatus.UNDETERMINED),
        ("anon", {"canaries_found": 63}, ExitStatus.UNDETERMINED),
        ("memfd", {"canaries_found": 0}, ExitStatus.UNDETERMINED),
        ("memfd", {"outcome": CellOutcome.FAILED, "reason": "it failed"}, ExitStatus.FAILED),
        ("secretmem", {"outcome": CellOutcome.BOOTED, "reason": ""}, ExitStatus.FAILED),
        ("secretmem", {"reason": "RLIMIT_MEMLOCK"}, ExitStatus.FAILED),
        ("secretmem", {"outcome": CellOutcome.FAILED}, ExitStatus.FAILED),
    ],
)
def test_each_thing_that_can_go_wrong(backend: str, changes: dict[str, Any], expected: ExitStatus) -> None:
    cells = spoilt(backend, **changes)
    (mismatch,) = check(cells.values(), STOCK)
    assert mismatch.row == backend
    assert mismatch.exit_status is expected
    assert "\n" not in mismatch.what
    assert status(cells) is expected


def test_a_failed_control_takes_back_what_was_called_hidden() -> None:
    """Not only in the exit status: no row of the table and of the report may say it."""
    assert without_control(GOOD.values(), STOCK) == list(GOOD.values())
    for spoiler in ({"canaries_found": 63}, {"verdict": Verdict.HIDDEN}):
        judged = without_control(spoilt("anon", **spoiler).values(), STOCK)
        assert {cell.verdict for cell in judged if cell.backend in HIDING} == {Verdict.UNKNOWN}
    no_controls = {name: cell for name, cell in GOOD.items() if name in HIDING}
    assert {cell.verdict for cell in without_control(no_controls.values(), STOCK)} == {Verdict.UNKNOWN}


# On a patched kernel


def test_a_patched_kernel_has_claims_of_its_own() -> None:
    assert claims_of("patched:7.3") is PATCHED
    assert {claims_of(spec) for spec in ("debian:7.3", "/boot/vmlinuz-patched:7.3")} == {STOCK}
    assert list(check(GOOD_PATCHED.values(), PATCHED)) == []
    # Each of them is what the other kind of kernel must not give.
    assert {s.row for s in check(GOOD_PATCHED.values(), STOCK)} == {*HIDING, "firecracker-anon", "secretmem"}
    hidden = {(row.backend, row.kvm_clock) for row in PATCHED if row.verdict is Claimed.HIDDEN}
    assert hidden == {(name, clock) for name in ("secretmem", "guest_memfd-unmapped") for clock in ("on", "off")}
    assert not any(row.verdict is Claimed.REFUSED for row in PATCHED)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("secretmem:kvm-clock=on", {"clocksource": "tsc"}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=on", {"clocksource": None}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=on", {"clocksource": "tsc", "canaries_found": 1}, ExitStatus.EXPOSED),
        ("secretmem:kvm-clock=off", {"clocksource": "kvm-clock"}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=off", {"clocksource": None}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=off", {"outcome": CellOutcome.REFUSED, "reason": "this kernel's GUP"}, ExitStatus.FAILED),
        ("guest_memfd-unmapped:kvm-clock=on", {"verdict": Verdict.EXPOSED, "alias_pages": 1}, ExitStatus.EXPOSED),
        ("guest_memfd-unmapped:kvm-clock=off", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("guest_memfd", {"verdict": Verdict.HIDDEN, "canaries_found": 0}, ExitStatus.UNDETERMINED),
    ],
)
def test_each_thing_that_can_go_wrong_on_a_patched_kernel(
    name: str, changes: dict[str, Any], expected: ExitStatus
) -> None:
    cells = GOOD_PATCHED | {name: replace(GOOD_PATCHED[name], **changes)}
    (mismatch,) = check(cells.values(), PATCHED)
    assert (mismatch.row, mismatch.exit_status) == (name, expected)


def test_a_guest_that_was_tried_with_the_other_clock_only_was_not_tried() -> None:
    cells = [cell for cell in GOOD_PATCHED.values() if cell.kvm_clock != "on"]
    assert [(s.row, s.what) for s in check(cells, PATCHED)] == [
        ("secretmem:kvm-clock=on", "was not tried"),
        ("guest_memfd-unmapped:kvm-clock=on", "was not tried"),
    ]


@pytest.mark.parametrize("claim", [*STOCK, *PATCHED])
def test_a_row_is_found_by_its_claims_name(claim: Claim) -> None:
    (spec,) = specs_of("patched:7.3", [claim])
    assert claim.name == row_name(spec) == as_claimed(claim).name


@pytest.mark.parametrize("backend", [row.backend for row in STOCK])
def test_what_was_not_tried_is_no_success(backend: str) -> None:
    cells = {name: cell for name, cell in GOOD.items() if name != backend}
    assert list(check(cells.values(), STOCK)) == [Mismatch(backend, "was not tried", ExitStatus.FAILED)]


def test_nothing_at_all_is_no_success() -> None:
    assert status({}) is ExitStatus.FAILED


def test_the_gravest_mismatch_decides() -> None:
    exposed, failed, unknown = (
        Mismatch("b", "w", s) for s in (ExitStatus.EXPOSED, ExitStatus.FAILED, ExitStatus.UNDETERMINED)
    )
    for mismatches, expected in (
        ((unknown, failed, exposed), ExitStatus.EXPOSED),
        ((unknown, failed), ExitStatus.FAILED),
        ((unknown,), ExitStatus.UNDETERMINED),
        ((), ExitStatus.DONE),
    ):
        assert ended(*mismatches) is expected


# Cells as rows

ANSWERS = {
    "works.boot": True,
    "hidden.before_io": True,
    "hidden.ram_pages": 65536,
    "hidden.populated_pages": 65536,
    "hidden.direct_map_pages": 0,
    "hidden.alias_pages": 0,
    "hidden.unknown_pages": 0,
    "hidden.excluded_pages": 0,
    "hidden.canaries_planted": CANARIES,
    "hidden.canaries_found": 0,
    "hidden.scanned_bytes": 1 << 30,
    "costs.ram_ready": 0.5,
    "costs.boot": 5.25,
}


def result(backend: str = "reserved", **more: Any) -> CellResult:
    given: dict[str, Any] = {
        "outcome": CellOutcome.BOOTED,
        "host": Host("6.12.1", "a CPU", lab=True),
        "guest": Guest("6.12.2", "tsc"),
        "answers": tuple(Answer(id, value) for id, value in ANSWERS.items()),
    }
    return CellResult(spec=CellSpec(backend), **(given | more))


def test_a_cell_is_a_row() -> None:
    row = row_of(result())
    assert (row.host_kernel, row.guest_kernel, row.clocksource, row.verdict) == (
        "6.12.1",
        "6.12.2",
        "tsc",
        Verdict.HIDDEN,
    )
    assert (row.pages_populated, row.canaries_planted, row.canaries_found) == (65536, CANARIES, 0)
    assert (row.populate_seconds, row.boot_seconds, row.scanned_bytes) == (0.5, 5.25, 1 << 30)
    assert isinstance(row.ram_pages, int)
    assert set(ANSWERS) < set(PRESET.questions) <= set(CATALOGUE)


def test_an_attack_is_a_part_of_its_row() -> None:
    reads = Answer("hidden.attack_reads", 90_000.0, "", (90_000.0,), (20_000.0,))
    tried = [*result().answers, Answer("hidden.attack", True, ENDED["attack"]), reads]
    row = row_of(result("unplugged", answers=tuple(tried)))
    assert {name: getattr(row, name) for name in ENDED} == ENDED
    assert attack_lines([row_of(result()), row])[1:] == [
        "  plain RAM  recovered in 20,000 reads",
        '  unplugged  ends at "guest: kernel": it is not mapped',
    ]
    assert attack_lines([row_of(result())]) == []


def test_kernels_that_nothing_is_known_of_leave_the_attack_out() -> None:
    kernel = HostKernel("own", "6.12", Path(__file__), Path("/nonexistent"))
    assert _no_attack([claim for claim in STOCK if not claim.attacked], [kernel]) == ""
    assert "is no kernel image" in (why := _no_attack(STOCK, [kernel]))
    assert judge([], (), why).left_out == why


def test_what_cannot_be_fetched_meanwhile_is_left_to_the_cell() -> None:
    tried = threading.Event()

    def fetch() -> None:
        tried.set()
        raise OffmapError("no network", "")

    _meanwhile(fetch)
    assert tried.wait(scaled(60))


@pytest.mark.parametrize(("value", "verdict"), [(True, "hidden"), (False, "exposed"), (None, "unknown")])
def test_a_verdict_is_what_the_look_says(value: bool | None, verdict: str) -> None:
    answers = [Answer("works.boot", True), Answer("hidden.before_io", value, "the reason")]
    row = row_of(result(answers=tuple(answers)))
    assert row.verdict is Verdict(verdict) and row.reason == "the reason"
    assert (row.ram_pages, row.canaries_found, row.boot_seconds) == (None, None, None)  # never 0


def test_what_did_not_boot_has_no_verdict() -> None:
    refused = row_of(result("secretmem", outcome=CellOutcome.REFUSED, reason="this kernel's GUP", answers=()))
    assert (refused.verdict, refused.outcome, refused.reason) == (None, CellOutcome.REFUSED, "this kernel's GUP")
    oops = row_of(
        result(outcome=CellOutcome.OOPS, reason="BUG", oops="BUG\nRIP", answers=(Answer("works.boot", True),))
    )
    assert (oops.verdict, oops.reason) == (Verdict.UNKNOWN, "BUG\nRIP")


def test_without_a_module_the_kinds_that_need_it_are_left_out() -> None:
    why = {"outcome": CellOutcome.REFUSED, "answers": (), "guest": Guest(), "host": Host()}
    gone = [result(name, reason="no headers", **why) for name in ("unplugged", "qemu-unplugged")]
    gone.append(result("firecracker-unplugged", reason="not there", **why))
    judged = judge([result(), *gone], [STOCK[2], STOCK[3], STOCK[5], STOCK[7]])
    assert judged.left_out == (
        "unplugged, qemu-unplugged left out: no headers; firecracker-unplugged left out: not there"
    )
    assert [row.backend for row in judged.cells] == ["reserved"]
    assert judged.mismatches == () and judged.host.kernel == "6.12.1"
    assert judged.cells[0].verdict is Verdict.UNKNOWN  # as there was no control
    refused = judge([result("unplugged", reason="not loaded", machine=Machine("tcg"), **why)], STOCK[3:4])
    assert refused.left_out == "" and refused.exit_status is ExitStatus.FAILED


def test_a_host_that_cannot_be_looked_at_leaves_it_undetermined() -> None:
    blind = [Answer(id, True if id == "works.boot" else CANARIES) for id in ("works.boot", "hidden.canaries_planted")]
    judged = judge([result(answers=tuple(blind))], STOCK[2:3])
    assert judged.exit_status is ExitStatus.UNDETERMINED and judged.cells[0].verdict is Verdict.UNKNOWN


def test_the_first_boot_waits_for_no_module() -> None:
    order = [spec.backend for spec in _order(specs_of("debian:6.12", STOCK))]
    assert order[:2] == ["anon", "secretmem-bridge"] and sorted(order) == sorted(claim.backend for claim in STOCK)


def test_what_is_attacked_comes_early() -> None:
    order = [spec.backend for spec in _order(specs_of("debian:6.12", STOCK), ["unplugged"])]
    assert order[:3] == ["anon", "secretmem-bridge", "unplugged"]


def test_a_stock_guest_on_a_patched_kernel_and_the_hosts_own_elsewhere() -> None:
    assert {spec.guest_kernel for spec in specs_of("debian:7.3", STOCK)} == {"debian:7.3"}
    assert not any(spec.guest_kernel.startswith("patched") for spec in specs_of("patched:7.3", PATCHED))


OPTIONAL_INT = st.one_of(st.none(), st.integers(0, 1 << 40))
ROWS = st.builds(
    DemoRow,
    backend=st.text(max_size=9),
    host_kernel=st.text(max_size=9),
    guest_kernel=st.text(max_size=9),
    outcome=st.sampled_from(CellOutcome),
    reason=st.text(),
    verdict=st.one_of(st.none(), st.sampled_from(Verdict)),
    ram_pages=OPTIONAL_INT,
    canaries_found=OPTIONAL_INT,
    boot_seconds=st.one_of(st.none(), st.floats(0, 1e6)),
)


@given(ROWS)
def test_rows_survive_json(row: DemoRow) -> None:
    assert msgspec.json.decode(msgspec.json.encode(row), type=DemoRow) == row


def test_the_guest_says_what_is_listened_for() -> None:
    archive = guest_initramfs((regular("extra", b"found"),))
    assert f'echo "{READY}, Linux $(uname -r)"'.encode() in archive
    assert f'echo "{CLOCKSOURCE} $('.encode() in archive
    assert re.search(PLANTED.format(r"\$#").encode(), archive)
    assert b"extra\0" in archive and b"found" in archive
    key = new_key()
    assert canary_parameters(key, 64) == f"OFFMAP_CANARIES=64 OFFMAP_CANARY_KEY={key}"
