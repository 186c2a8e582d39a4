"""The demonstration's judgement over made-up results, and its reading of the trial's lines."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.canary import new_key
from offmap.audit.verdict import Verdict
from offmap.compare import trial, vm_process
from offmap.compare.cell import Cell, Outcome, guest_name, parse_guest_name
from offmap.compare.claims import CANARIES, PATCHED, STOCK, Claim, Row, Surprise, check, without_control
from offmap.compare.demo import DemoResult, claimed_rows
from offmap.compare.events import EventLines
from offmap.compare.guest import CLOCKSOURCE, PLANTED, READY, canary_parameters, guest_initramfs
from offmap.errors import ExitStatus, OffmapError
from offmap.lab.cpio import regular

PLAIN = Cell(
    backend="anon",
    host_kernel="6.12",
    guest_kernel="6.12",
    outcome=Outcome.BOOTED,
    verdict=Verdict.EXPOSED,
    ram_pages=65536,
    pages_populated=20000,
    direct_map_pages=20000,
    alias_pages=0,
    unknown_pages=0,
    canaries_planted=CANARIES,
    canaries_found=CANARIES,
)
HIDDEN = dataclasses.replace(
    PLAIN, backend="reserved", verdict=Verdict.HIDDEN, pages_populated=65536, direct_map_pages=0, canaries_found=0
)
REFUSED = Cell(
    backend="secretmem",
    host_kernel="6.12",
    guest_kernel="",
    outcome=Outcome.REFUSED,
    reason="this kernel's GUP refuses memfd_secret pages to KVM",
)
HIDING = [row.backend for row in STOCK if row.claim is Claim.HIDDEN]
CLOCKS = {"auto": None, "on": "kvm-clock", "off": "tsc"}
BY_CLAIM = {Claim.EXPOSED: PLAIN, Claim.HIDDEN: HIDDEN, Claim.REFUSED: REFUSED}


def as_claimed(row: Row) -> Cell:
    return dataclasses.replace(
        BY_CLAIM[row.claim], backend=row.backend, kvm_clock=row.kvm_clock, clocksource=CLOCKS[row.kvm_clock]
    )


GOOD = {row.name: as_claimed(row) for row in STOCK}
GOOD_PATCHED = {row.name: as_claimed(row) for row in PATCHED}


def status(cells: dict[str, Cell]) -> ExitStatus:
    return DemoResult({}, tuple(cells.values()), tuple(check(cells.values())), Path("report.json")).exit_status


def spoilt(backend: str, **changes: Any) -> dict[str, Cell]:
    return GOOD | {backend: dataclasses.replace(GOOD[backend], **changes)}


def test_all_as_claimed_is_done() -> None:
    assert list(check(GOOD.values())) == []
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
        ("reserved", {"outcome": Outcome.FAILED, "reason": "the VMM ended"}, ExitStatus.FAILED),
        ("reserved", {"outcome": Outcome.REFUSED, "reason": "nothing reserved"}, ExitStatus.FAILED),
        ("reserved", {"outcome": Outcome.OOPS, "reason": "BUG: unable\nto handle"}, ExitStatus.FAILED),
        ("reserved", {"outcome": Outcome.FAILED, "reason": ""}, ExitStatus.FAILED),
        ("reserved", {"outcome": Outcome.FAILED, "reason": "r", "verdict": Verdict.EXPOSED}, ExitStatus.EXPOSED),
        ("reserved", {"canaries_planted": 63, "canaries_found": 1}, ExitStatus.EXPOSED),
        ("unplugged", {"verdict": Verdict.EXPOSED, "alias_pages": 1}, ExitStatus.EXPOSED),
        ("secretmem-bridge", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("qemu-unplugged", {"canaries_found": 1}, ExitStatus.EXPOSED),
        ("anon", {"verdict": Verdict.HIDDEN}, ExitStatus.UNDETERMINED),
        ("anon", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("anon", {"verdict": None, "canaries_found": None}, ExitStatus.UNDETERMINED),
        ("anon", {"canaries_found": 63}, ExitStatus.UNDETERMINED),
        ("memfd", {"canaries_found": 0}, ExitStatus.UNDETERMINED),
        ("memfd", {"outcome": Outcome.FAILED, "reason": "it failed"}, ExitStatus.FAILED),
        ("secretmem", {"outcome": Outcome.BOOTED, "reason": ""}, ExitStatus.FAILED),
        ("secretmem", {"reason": "RLIMIT_MEMLOCK"}, ExitStatus.FAILED),
        ("secretmem", {"outcome": Outcome.FAILED}, ExitStatus.FAILED),
    ],
)
def test_each_thing_that_can_go_wrong(backend: str, changes: dict[str, Any], expected: ExitStatus) -> None:
    cells = spoilt(backend, **changes)
    (surprise,) = check(cells.values())
    assert surprise.backend == backend
    assert surprise.exit_status is expected
    assert "\n" not in surprise.what
    assert status(cells) is expected


def test_a_failed_control_takes_back_what_was_called_hidden() -> None:
    """Not only in the exit status: no row of the table and of the report may say it."""
    assert without_control(GOOD.values()) == list(GOOD.values())
    for spoiler in ({"canaries_found": 63}, {"verdict": Verdict.HIDDEN}):
        judged = without_control(spoilt("anon", **spoiler).values())
        assert {cell.verdict for cell in judged if cell.backend in HIDING} == {Verdict.UNKNOWN}
    no_controls = {name: cell for name, cell in GOOD.items() if name in HIDING}
    assert {cell.verdict for cell in without_control(no_controls.values())} == {Verdict.UNKNOWN}


# On a patched kernel


def test_a_patched_kernel_has_claims_of_its_own() -> None:
    assert claimed_rows("patched:7.3") is PATCHED
    assert {claimed_rows(spec) for spec in (None, "debian:7.3", "/boot/vmlinuz-patched:7.3")} == {STOCK}
    assert list(check(GOOD_PATCHED.values(), PATCHED)) == []
    # Each of them is what the other kind of kernel must not give.
    assert {s.backend for s in check(GOOD_PATCHED.values(), STOCK)} == {*HIDING, "secretmem"}
    hidden = {(row.backend, row.kvm_clock) for row in PATCHED if row.claim is Claim.HIDDEN}
    assert hidden == {(name, clock) for name in ("secretmem", "guest_memfd-unmapped") for clock in ("on", "off")}
    assert not any(row.claim is Claim.REFUSED for row in PATCHED)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("secretmem:kvm-clock=on", {"clocksource": "tsc"}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=on", {"clocksource": None}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=on", {"clocksource": "tsc", "canaries_found": 1}, ExitStatus.EXPOSED),
        ("secretmem:kvm-clock=off", {"clocksource": "kvm-clock"}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=off", {"clocksource": None}, ExitStatus.FAILED),
        ("secretmem:kvm-clock=off", {"outcome": Outcome.REFUSED, "reason": "this kernel's GUP"}, ExitStatus.FAILED),
        ("guest_memfd-unmapped:kvm-clock=on", {"verdict": Verdict.EXPOSED, "alias_pages": 1}, ExitStatus.EXPOSED),
        ("guest_memfd-unmapped:kvm-clock=off", {"verdict": Verdict.UNKNOWN}, ExitStatus.UNDETERMINED),
        ("guest_memfd", {"verdict": Verdict.HIDDEN, "canaries_found": 0}, ExitStatus.UNDETERMINED),
    ],
)
def test_each_thing_that_can_go_wrong_on_a_patched_kernel(
    name: str, changes: dict[str, Any], expected: ExitStatus
) -> None:
    cells = GOOD_PATCHED | {name: dataclasses.replace(GOOD_PATCHED[name], **changes)}
    (surprise,) = check(cells.values(), PATCHED)
    assert (surprise.backend, surprise.exit_status) == (name, expected)


def test_a_guest_that_was_tried_with_the_other_clock_only_was_not_tried() -> None:
    cells = [cell for cell in GOOD_PATCHED.values() if cell.kvm_clock != "on"]
    assert [(s.backend, s.what) for s in check(cells, PATCHED)] == [
        ("secretmem:kvm-clock=on", "was not tried"),
        ("guest_memfd-unmapped:kvm-clock=on", "was not tried"),
    ]


@pytest.mark.parametrize("row", [*STOCK, *PATCHED])
def test_a_guest_is_found_by_its_name(row: Row) -> None:
    assert parse_guest_name(row.name) == (row.backend, row.kvm_clock)
    assert guest_name(row.backend, row.kvm_clock) == row.name == as_claimed(row).name


@pytest.mark.parametrize("name", ["anon:kvm-clock=", "anon:kvm-clock=auto", "anon:kvm-clock=yes"])
def test_what_is_no_name_of_a_guest(name: str) -> None:
    with pytest.raises(ValueError, match="names no guest"):
        parse_guest_name(name)


@pytest.mark.parametrize("backend", [row.backend for row in STOCK])
def test_what_was_not_tried_is_no_success(backend: str) -> None:
    cells = {name: cell for name, cell in GOOD.items() if name != backend}
    assert list(check(cells.values())) == [Surprise(backend, "was not tried", ExitStatus.FAILED)]


def test_nothing_at_all_is_no_success() -> None:
    assert status({}) is ExitStatus.FAILED


def test_the_gravest_surprise_decides() -> None:
    exposed, failed, unknown = (
        Surprise("b", "w", s) for s in (ExitStatus.EXPOSED, ExitStatus.FAILED, ExitStatus.UNDETERMINED)
    )
    for surprises, expected in (
        ((unknown, failed, exposed), ExitStatus.EXPOSED),
        ((unknown, failed), ExitStatus.FAILED),
        ((unknown,), ExitStatus.UNDETERMINED),
        ((), ExitStatus.DONE),
    ):
        assert DemoResult({}, (), surprises, Path()).exit_status is expected


# Cells

OPTIONAL_INT = st.one_of(st.none(), st.integers(0, 1 << 40))
CELLS = st.builds(
    Cell,
    backend=st.text(max_size=9),
    host_kernel=st.text(max_size=9),
    guest_kernel=st.text(max_size=9),
    outcome=st.sampled_from(Outcome),
    reason=st.text(),
    verdict=st.one_of(st.none(), st.sampled_from(Verdict)),
    ram_pages=OPTIONAL_INT,
    canaries_found=OPTIONAL_INT,
    boot_seconds=st.one_of(st.none(), st.floats(0, 1e6)),
)


@given(CELLS)
def test_cells_survive_json(cell: Cell) -> None:
    assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_cells_have_the_words_of_the_design() -> None:
    assert set(PLAIN.to_json()) >= {
        *("backend", "host_kernel", "guest_kernel", "outcome", "reason", "ram_pages", "pages_populated"),
        *("direct_map_pages", "alias_pages", "unknown_pages", "excluded_pages", "canaries_planted", "canaries_found"),
        *("populate_seconds", "boot_seconds", "direct_map_4k_delta_kib"),
    }
    assert {outcome.value for outcome in Outcome} == {"booted", "refused", "failed", "oops"}


# What the trial says, as it comes through a pipe


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text()), max_size=5), st.lists(st.integers(0, 500), max_size=9))
def test_lines_come_whole_however_they_are_cut(events: list[dict[str, str]], cuts: list[int]) -> None:
    stream = b"".join(json.dumps(event, ensure_ascii=False).encode() + b"\n" for event in events)
    heard: list[dict[str, Any]] = []
    lines = EventLines(heard.append)
    places = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(places):
        lines.feed(stream[start:end])
    assert heard == events


def test_half_a_line_is_no_event() -> None:
    heard: list[dict[str, Any]] = []
    EventLines(heard.append).feed(b'{"stage": "boo')
    assert heard == []


@pytest.mark.parametrize("line", [b"Traceback (most recent call last):\n", b"[1, 2]\n", b"\xff\xfe\n", b"\n"])
def test_a_line_that_is_no_event_is_said_in_one_line(line: bytes) -> None:
    with pytest.raises(OffmapError) as caught:
        EventLines(lambda _: None).feed(line)
    assert "\n" not in str(caught.value)


# What the guest says, as the trial reads it


def test_ready_and_planted_are_found_in_a_console() -> None:
    console = f"[    1.2] random\r\n{PLANTED.format(64)}\r\n{CLOCKSOURCE} kvm-clock\r\n"
    console += f"{READY}, Linux 6.12.1-amd64\r\noffmap-guest# "
    ready, planted = trial._READY.search(console), trial._PLANTED.search(console)
    clocksource = trial._CLOCKSOURCE.search(console)
    assert clocksource and clocksource[1] == "kvm-clock"
    assert ready and ready[1] == "6.12.1-amd64"
    assert planted and planted[1] == "64"
    assert vm_process._NEVER.search(console) is None


def test_the_guest_says_what_is_listened_for() -> None:
    archive = guest_initramfs((regular("extra", b"found"),))
    assert f'echo "{READY}, Linux $(uname -r)"'.encode() in archive
    assert f'echo "{CLOCKSOURCE} $('.encode() in archive
    assert re.search(PLANTED.format(r"\$#").encode(), archive)
    assert b"extra\0" in archive and b"found" in archive
    key = new_key()
    assert canary_parameters(key, 64) == f"OFFMAP_CANARIES=64 OFFMAP_CANARY_KEY={key}"


def test_a_vmm_that_cannot_start_is_a_cell_and_no_exception(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel")
    stages: list[dict[str, Any]] = []
    cell = trial.Trial(kernel, kernel, "256M", 64).run("anon", stages.append)
    assert cell.outcome is Outcome.FAILED
    assert "neither a bzImage nor an ELF file" in cell.reason
    assert (cell.verdict, cell.canaries_planted) == (None, None)
    assert stages == [{"stage": "booting"}]
