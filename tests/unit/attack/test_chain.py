"""The chain on a machine made of bytes: it gets through, ends where it should, and is lost rather than wrong."""

import msgspec
import pytest

from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.chain import Chain
from offmap.attack.knowledge import Kernel
from offmap.attack.primitive import Noisy, Primitive, Unreadable
from offmap.attack.result import AttackResult, Attempt, Outcome
from offmap.attack.sweep import Pieces, SweepPlan
from offmap.attack.target import PlantedSecret
from offmap.audit.mappings import KernelMappings
from offmap.audit.readable import Piece
from offmap.audit.regions import Layout
from offmap.errors import ExitStatus
from offmap.report.typed import Address

from .machine import DIGEST, DIRECT_MAP, GUEST_AT, HVA, KNOWN, OFFSETS, PAGE, PID, SECRET, TEXT, Machine

ALIAS = 0xFFFF_C900_0000_0000  # in the vmalloc space


def run(machine: Primitive, known: Kernel = KNOWN, guest: Kernel = KNOWN, base: int | None = None) -> Attempt:
    return Chain(machine, known, guest, PID, PlantedSecret("sh", DIGEST), base).run()


def judge(machine: Primitive, control: bool, known: Kernel = KNOWN) -> AttackResult:
    victim = Victim(PID, PlantedSecret("sh", DIGEST))
    if not control:
        return attack(machine, Beforehand(known, KNOWN), victim, None)
    # Its control is read from another machine: this one has a single VM.
    beside = run(Machine(), known)
    found = attack(machine, Beforehand(known, KNOWN), victim, None)
    return msgspec.structs.replace(found, control=beside)


def test_plain_ram_is_recovered_and_what_it_took_is_told() -> None:
    machine = Machine()
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "guest: secret")
    assert "sh (7), heap, 0x10001131" in found.reason
    assert [stage.passed for stage in found.stages] == [True] * len(found.stages)
    assert sum(stage.reads for stage in found.stages) == found.reads < machine.counts.reads < 5000
    assert {residue.name: residue.bytes for residue in found.residues} == {
        "registers of the vCPUs, in struct kvm_vcpu": 128,
        "kvm_run": 8192,
    }


def test_a_base_that_is_given_saves_the_search() -> None:
    searched, given = run(Machine()), run(Machine(), base=TEXT + 0x400_0000)
    assert given.outcome == searched.outcome == Outcome.RECOVERED
    assert given.reads < searched.reads
    assert run(Machine(), base=TEXT).outcome == Outcome.UNKNOWN


def test_hidden_ram_is_where_it_ends() -> None:
    found = run(Machine(hidden=True))
    assert (found.outcome, found.stage) == (Outcome.ENDS, "guest: kernel")
    assert "the host kernel maps none of the guest's pages" in found.reason
    assert (found.guest_pages, found.mapped_pages, found.missing_pages) == (1024, 0, 0)


def test_memory_of_the_vmms_own_is_a_residue() -> None:
    machine = Machine(hidden=True)
    machine.user.map(HVA - PAGE, machine.host.frames.pop(), 7)
    sizes = {residue.name: residue.bytes for residue in run(machine).residues}
    assert sizes["memory of the VMM's own"] == PAGE


def test_one_mapped_page_with_the_secret_is_enough() -> None:
    machine = Machine(hidden=True)
    machine.tables.map(ALIAS, machine.secret_page)
    found = run(machine)
    assert (found.outcome, found.mapped_pages) == (Outcome.RECOVERED, 1)
    other = Machine(hidden=True)
    other.tables.map(ALIAS, machine.secret_page + PAGE)
    found = run(other)
    assert (found.outcome, found.mapped_pages) == (Outcome.ENDS, 1)
    assert "the 1 guest pages that are mapped do not have the secret" in found.reason


@pytest.mark.parametrize("overlay", ["", "old", "new"])
def test_a_copy_in_the_page_cache_of_the_drive_is_recovered(overlay: str) -> None:
    machine = Machine(hidden=True)
    machine.open_drive(b"OFFMAP-SECRET-" + SECRET, overlay)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "host: page cache of the VMM's files")
    assert found.reason == "the secret, in root.img at 0xe"
    other = Machine(hidden=True)
    other.open_drive(b"nothing of the kind", overlay)
    found = run(other)
    assert found.outcome == Outcome.ENDS
    assert "the secret is in none of their 1 pages" in [stage.found for stage in found.stages]
    assert {each.name: each.bytes for each in found.residues}["page cache"] == PAGE


def test_the_chain_goes_through_aliases() -> None:
    machine = Machine(hidden=True)
    for page in range(0, 4 << 20, PAGE):
        machine.tables.map(ALIAS + page, GUEST_AT + page)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "guest: secret")
    assert found.mapped_pages == 1024


def test_a_page_table_that_cannot_be_read_is_no_end() -> None:
    machine = Machine(hidden=True)
    machine.tables.map(ALIAS, 0x1000)
    table = machine.tables.top + (ALIAS >> 39 & 511) * 8
    # It leads to a page that is not in the direct map: what it maps cannot be told.
    machine.memory[table : table + 8] = (GUEST_AT | 3).to_bytes(8, "little")
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "other mappings of the guest's pages")


def test_pages_that_the_vmm_does_not_have_are_no_end() -> None:
    machine = Machine(hidden=True)
    machine.take(5 * PAGE)
    found = run(machine)
    assert (found.outcome, found.missing_pages) == (Outcome.UNKNOWN, 1)
    # But a driver's are not there before they are touched, and then hold nothing.
    machine.host.set(machine.vma, "vm_area_struct", vm_flags=1 << 10)
    found = run(machine)
    assert (found.outcome, found.missing_pages) == (Outcome.ENDS, 1)


def test_missing_pages_of_secret_memory_hold_nothing() -> None:
    machine = Machine(hidden=True)
    machine.take(0)
    host = machine.host
    inode = host.new("inode", i_sb=host.new("super_block", s_magic=0x5345_434D))
    host.set(machine.vma, "vm_area_struct", vm_file=host.new("file", f_inode=inode))
    assert run(machine).outcome == Outcome.ENDS
    host.set(inode, "inode", i_sb=host.new("super_block", s_magic=0x0102_1994))  # TMPFS_MAGIC
    assert run(machine).outcome == Outcome.UNKNOWN


def test_a_page_that_the_nested_tables_have_elsewhere_is_no_end() -> None:
    machine = Machine(hidden=True)
    for page in range(0, 4 << 20, PAGE):
        machine.nested.map(page, 0x1000)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "host: nested page tables")


@pytest.mark.parametrize("name", sorted(OFFSETS))
@pytest.mark.parametrize("by", [8, 0x40])
def test_a_wrong_offset_is_never_an_end(name: str, by: int) -> None:
    """Neither on plain RAM, nor on RAM of which a page is missing that may be anywhere, beside a control."""
    wrong = msgspec.structs.replace(KNOWN, offsets={**OFFSETS, name: max(OFFSETS[name] + by, 0)})
    assert run(Machine(), wrong, wrong).outcome in {Outcome.UNKNOWN, Outcome.RECOVERED}
    machines = Machine(), Machine(hidden=True)
    for machine in machines:
        machine.take(5 * PAGE)
    control, found = (
        Chain(machine, wrong, wrong, PID, PlantedSecret("sh", DIGEST), control=not number).run()
        for number, machine in enumerate(machines)
    )
    assert Outcome.UNKNOWN in {control.outcome, found.outcome}, (control, found)


def test_a_control_finds_all_of_its_pages_mapped() -> None:
    found = Chain(Machine(), KNOWN, KNOWN, PID, PlantedSecret("sh", DIGEST), control=True).run()
    assert (found.outcome, found.guest_pages, found.mapped_pages) == (Outcome.RECOVERED, 1024, 1024)
    after = [stage.name for stage in found.stages].index("guest: secret") + 1
    assert found.stages[after + 1].name == "other mappings of the guest's pages"
    assert found.reads == sum(stage.reads for stage in found.stages[:after])
    # Kernel page tables that nothing is found in, though the secret was read, are no good for saying that it ends.
    machine = Machine()
    wrong = machine.host.new("")
    lost = msgspec.structs.replace(KNOWN, symbols={**KNOWN.symbols, "init_top_pgt": Address(wrong - 0x400_0000)})
    found = Chain(machine, lost, KNOWN, PID, PlantedSecret("sh", DIGEST), control=True).run()
    assert found.outcome == Outcome.UNKNOWN


@pytest.mark.parametrize("name", sorted(OFFSETS))
def test_what_is_not_known_is_never_an_end(name: str) -> None:
    offsets = {each: at for each, at in OFFSETS.items() if each != name}
    found = run(Machine(), msgspec.structs.replace(KNOWN, offsets=offsets))
    assert found.outcome in {Outcome.UNKNOWN, Outcome.RECOVERED}


def test_another_kernel_in_the_guest_is_lost() -> None:
    other = msgspec.structs.replace(KNOWN, banner="Linux version 6.1.0 (somebody)")
    found = run(Machine(), guest=other)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "guest: kernel")
    assert run(Machine(), known=other).stage == "host: kernel"


def test_an_end_needs_a_control() -> None:
    machine = Machine(hidden=True)
    alone = judge(machine, control=False)
    assert (alone.outcome, alone.exit_status) == (Outcome.UNKNOWN, ExitStatus.UNDETERMINED)
    assert "without a control" in alone.reason
    # A control that is hidden too does not get through.
    victim = Victim(PID, PlantedSecret("sh", DIGEST))
    both = attack(machine, Beforehand(KNOWN, KNOWN), victim, victim)
    assert both.outcome == Outcome.UNKNOWN
    assert both.reason.startswith("the control does not get through")


def test_a_recovery_needs_none() -> None:
    found = judge(Machine(), control=False)
    assert (found.outcome, found.exit_status) == (Outcome.RECOVERED, ExitStatus.EXPOSED)
    assert found.times and all(each.hours > 0 for each in found.times)


class Blind(Machine):
    """Maps the guest's RAM, and cannot read there."""

    def _fetch(self, va: int, size: int) -> bytes:
        if DIRECT_MAP + GUEST_AT <= va < DIRECT_MAP + GUEST_AT + (4 << 20):
            raise Unreadable(va)
        return super()._fetch(va, size)


def test_what_is_mapped_and_cannot_be_read_is_reached() -> None:
    found = judge(Blind(), control=False)
    assert (found.outcome, found.exit_status) == (Outcome.REACHED, ExitStatus.EXPOSED)


def test_errors_lose_the_trail_and_votes_find_it() -> None:
    assert run(Noisy(Machine(), errors=0.2, seed=1)).outcome == Outcome.UNKNOWN
    steady = Noisy(Machine(), errors=0.02, votes=7, seed=1)
    assert run(steady).outcome == Outcome.RECOVERED
    assert steady.counts.reads > 7 * 500


def test_another_secret_is_not_taken_for_it() -> None:
    machine = Machine()
    found = Chain(machine, KNOWN, KNOWN, PID, PlantedSecret("sh", "0" * 64)).run()
    assert (found.outcome, found.reason) == (Outcome.UNKNOWN, "the secret is not where it should be")


def test_no_such_process() -> None:
    found = Chain(Machine(), KNOWN, KNOWN, 4711, PlantedSecret("sh", DIGEST)).run()
    assert found.reason == "the host has no process 4711"
    found = Chain(Machine(), KNOWN, KNOWN, PID, PlantedSecret("nginx", DIGEST)).run()
    assert found.reason == "the guest has no process nginx"


def test_user_memory_is_recovered_whatever_the_kernel_maps() -> None:
    machine = Machine(hidden=True)
    machine.user_memory = True
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "guest: secret")
    assert found.user_pages > 3
    assert "by the VMM's own mapping, which hiding RAM from the kernel does not take away" in found.reason
    assert run(Machine()).user_pages == 0


PIECES = Pieces(tuple(SECRET[at : at + 8] for at in range(0, 32, 8)))


def swept(machine: Machine, monkeypatch: pytest.MonkeyPatch, unread: int = 0, pieces: Pieces = PIECES) -> Attempt:
    """An attack with a sweep of the machine's direct map."""
    monkeypatch.setattr("offmap.attack.sweep._Seen.control", lambda self: None)
    monkeypatch.setattr("offmap.attack.sweep.frames_at", lambda va, pages: set())

    def plan(mappings: KernelMappings, primitive: Primitive) -> SweepPlan:
        readable = [Piece(*(int(run[name]) for name in ("va", "pa", "bytes"))) for run in mappings.direct]
        return SweepPlan(readable, [Piece(0, 1 << 40, unread)] if unread else [], 0, Layout([]))

    target = PlantedSecret("sh", DIGEST)
    return Chain(machine, KNOWN, KNOWN, PID, target, pieces=pieces, planner=plan).run()


def test_a_sweep_that_finds_nothing_lets_an_end_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(Machine(hidden=True), monkeypatch)
    assert (found.outcome, found.stage) == (Outcome.ENDS, "guest: kernel")
    assert found.reason.endswith("in all that it maps, no 16 bytes of the secret stand in it")
    assert found.sweep is not None and found.sweep.bytes_read == GUEST_AT
    assert found.stages[-2].name == "all that the host kernel maps"


def test_sixteen_bytes_of_the_secret_anywhere_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(hidden=True)
    machine.memory[0x20_1FF0:0x20_2000] = SECRET[:16]
    found = swept(machine, monkeypatch)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "all that the host kernel maps")
    assert found.sweep is not None
    assert [(run.pa, run.bytes) for run in found.sweep.runs] == [(0x20_1FF0, 16)]


def test_what_the_sweep_cannot_read_is_reached_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(Machine(hidden=True), monkeypatch, unread=PAGE)
    assert (found.outcome, found.stage) == (Outcome.REACHED, "all that the host kernel maps")
    assert "1 mapped pages cannot be read" in found.reason


def test_on_plain_ram_the_sweep_finds_the_guests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(Machine(), monkeypatch)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "guest: secret")
    assert found.sweep is not None and found.sweep.longest == 32


def test_pieces_of_something_else_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(Machine(hidden=True), monkeypatch, pieces=Pieces(PIECES.each[::-1]))
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "all that the host kernel maps")
