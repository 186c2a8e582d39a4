"""An opponent's cases: whatever is wrong or out of the ordinary, "ends" is never said of a secret that is reachable."""

from collections.abc import Callable

import pytest

from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.chain import Chain
from offmap.attack.primitive import Noisy
from offmap.attack.result import Attempt, Outcome
from offmap.attack.target import PlantedSecret

from .machine import DIGEST, DIRECT_MAP, GUEST_AT, HVA, IMAGE_AT, KNOWN, OFFSETS, PAGE, PID, SECRET, SYMBOLS, Machine

ALIAS = 0xFFFF_C900_0000_0000  # in the vmalloc space
MARK = b"OFFMAP-SECRET-"


def run(machine: Machine) -> Attempt:
    return Chain(machine, KNOWN, KNOWN, PID, PlantedSecret("sh", DIGEST)).run()


@pytest.mark.parametrize("cut", [1, 13, 14, 15, 30, 45])
def test_a_secret_in_two_pages_that_are_no_neighbours(cut: int) -> None:
    """The guest's page tables are hidden, so which page follows which is not known."""
    machine = Machine(hidden=True)
    first, second = GUEST_AT + 0x30_0000, GUEST_AT + 0x20_0000
    whole = MARK + SECRET
    machine.memory[first + PAGE - cut : first + PAGE] = whole[:cut]
    machine.memory[second : second + len(whole) - cut] = whole[cut:]
    machine.tables.map(ALIAS, first)
    machine.tables.map(ALIAS + 8 * PAGE, second)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "guest: pages that are mapped")
    assert found.reason == "the secret, in two of them"


@pytest.mark.parametrize("which", [0, 1])
def test_half_of_a_secret_is_no_end(which: int) -> None:
    machine = Machine(hidden=True)
    page = GUEST_AT + 0x30_0000
    machine.memory[page + PAGE - 30 : page + PAGE] = (MARK + SECRET)[:30]
    machine.memory[page + PAGE : page + PAGE + 16] = SECRET[16:]
    machine.tables.map(ALIAS, page + which * PAGE)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "guest: pages that are mapped")


def test_a_secret_in_two_pages_of_a_process() -> None:
    machine = Machine()
    guest, secret = machine.guest, MARK + SECRET
    at = machine.secret_page + 0x123
    machine.memory[at : at + len(secret)] = bytes(len(secret))
    first, _, second = (guest.frames.pop() for _ in range(3))
    for number, page in enumerate((first, second)):
        machine.guest_user.map(0x1000_0000 + number * PAGE, page, 7)
    guest.put(DIRECT_MAP + first + PAGE - 20, secret[:20])
    guest.put(DIRECT_MAP + second, secret[20:])
    assert run(machine).outcome == Outcome.RECOVERED


@pytest.mark.parametrize("where", ["struct kvm_vcpu", "kvm_run", "pio_data"])
def test_a_secret_in_what_kvm_keeps_of_a_vcpu_is_recovered(where: str) -> None:
    machine = Machine(hidden=True)
    at = {
        "struct kvm_vcpu": machine.vcpu + 0xB0,
        "kvm_run": machine.value(machine.vcpu + OFFSETS["kvm_vcpu.run"]) + 0x100,
        "pio_data": machine.value(machine.vcpu + OFFSETS["kvm_vcpu.arch.pio_data"]),
    }[where]
    machine.host.put(at, MARK + SECRET)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "host: registers and kvm_run of the vCPUs")


def test_a_secret_in_the_vmms_own_memory_is_recovered() -> None:
    machine = Machine(hidden=True)
    first, _, second = (machine.host.frames.pop() for _ in range(3))
    machine.user.map(HVA - 2 * PAGE, first, 7)
    machine.user.map(HVA - PAGE, second, 7)
    machine.memory[first + PAGE - 20 : first + PAGE] = (MARK + SECRET)[:20]
    machine.memory[second : second + 26] = (MARK + SECRET)[20:]
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "host: memory of the VMM's own")
    machine.memory[second] ^= 1
    assert run(machine).outcome == Outcome.ENDS


def test_an_alias_that_only_the_vmms_root_has() -> None:
    """As a process's LDT is, with page-table isolation."""
    machine = Machine(hidden=True)
    machine.tables.map(ALIAS, machine.secret_page)
    top = IMAGE_AT + SYMBOLS["init_top_pgt"]
    entry = slice(top + (ALIAS >> 39 & 511) * 8, top + (ALIAS >> 39 & 511) * 8 + 8)
    own = machine.user.top - top
    machine.memory[entry.start + own : entry.stop + own] = machine.memory[entry]

    walk = machine.tables.walk

    def through_its_root(va: int) -> int | None:
        return machine.secret_page + va % PAGE if va & -PAGE == ALIAS else walk(va)

    machine.tables.walk = through_its_root  # type: ignore[method-assign]
    machine.memory[entry] = bytes(8)
    assert run(machine).outcome == Outcome.RECOVERED


def test_a_second_vm_of_the_same_vmm_loses_the_trail() -> None:
    """It may be open by a vCPU alone, or by no descriptor of this process."""
    machine = Machine(hidden=True)
    kvm = machine.host.new("kvm", mm=machine.mm, nr_memslot_pages=1)
    machine.list_vms(machine.kvm, kvm)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "host: VM")
    machine.host.set(kvm, "kvm", nr_memslot_pages=0)
    assert run(machine).outcome == Outcome.ENDS


def test_a_vm_whose_own_descriptor_is_closed_is_found_by_its_vcpu() -> None:
    machine = Machine()
    entry = machine.host.new("dentry", d_name__name=machine.host.text("kvm-vcpu:0"))
    machine.host.set(machine.vm_file, "file", f_path__dentry=entry, private_data=machine.vcpu)
    assert run(machine).outcome == Outcome.RECOVERED


def test_a_list_of_vms_that_does_not_lead_back_loses_the_trail() -> None:
    machine = Machine(hidden=True)
    machine.host.set(machine.kvm, "kvm", vm_list=machine.host.new("kvm"))
    assert run(machine).outcome == Outcome.UNKNOWN


def test_without_kvms_own_page_tables_whose_pages_these_are_is_not_sure() -> None:
    machine = Machine(hidden=True)
    machine.host.set(machine.vcpu, "kvm_vcpu", arch__root_mmu__root__hpa=(1 << 64) - 1)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "other mappings of the guest's pages")
    # The same of a control: with it, no other guest's chain is said to end.
    machine = Machine()
    machine.host.set(machine.vcpu, "kvm_vcpu", arch__root_mmu__root__hpa=(1 << 64) - 1)
    found = Chain(machine, KNOWN, KNOWN, PID, PlantedSecret("sh", DIGEST), control=True).run()
    assert found.outcome == Outcome.UNKNOWN


def test_a_page_that_only_kvms_own_tables_have_elsewhere_is_no_end() -> None:
    """Whichever page it is, not only the one that the chain stopped at."""
    machine = Machine(hidden=True)
    machine.nested.map(0x30_0000, 0x1000)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "other mappings of the guest's pages")
    assert "lead elsewhere than the VMM's for 1 pages" in found.reason


def private_guest(hidden: bool, mapped: tuple[int, ...] = ()) -> Machine:
    """A guest with a guest_memfd: it runs on that, and the VMM's own pages are others, and hidden."""
    machine = Machine(hidden)
    machine.guest_memfd(*range(GUEST_AT, GUEST_AT + 64 * PAGE, PAGE))
    for page in mapped:
        machine.tables.map(DIRECT_MAP + GUEST_AT + page, GUEST_AT + page)
    return machine


def test_the_pages_of_a_guest_memfd_are_the_guests() -> None:
    hidden = 0x7FFF_0000_0000
    machine = private_guest(hidden=True)
    assert run(machine).outcome == Outcome.ENDS
    # One of its pages is mapped, and holds the secret; what the VMM has in its place is hidden.
    machine.memory[GUEST_AT + 5 * PAGE : GUEST_AT + 5 * PAGE + 46] = MARK + SECRET
    machine.user.map(HVA + 5 * PAGE, hidden)
    assert run(machine).outcome == Outcome.ENDS
    machine.tables.map(ALIAS, GUEST_AT + 5 * PAGE)
    assert run(machine).outcome == Outcome.RECOVERED


def test_page_cache_that_is_not_mapped_is_no_residue() -> None:
    """A guest_memfd's pages stand in a page cache, and are the guest's RAM."""
    machine = private_guest(hidden=True)
    file = machine.value(machine.slot + OFFSETS["kvm_memory_slot.gmem.file"])
    machine.host.put(machine.files + 16, file.to_bytes(8, "little"))
    found = run(machine)
    assert found.outcome == Outcome.ENDS
    assert "page cache" not in {residue.name for residue in found.residues}
    page = machine.host.frames.pop()
    machine.guest_memfd(page)
    file = machine.value(machine.slot + OFFSETS["kvm_memory_slot.gmem.file"])
    machine.host.set(machine.slot, "kvm_memory_slot", gmem__file=0)
    machine.host.put(machine.slot + OFFSETS["kvm_memory_slot.flags"], bytes(4))
    machine.host.put(machine.files + 16, file.to_bytes(8, "little"))
    assert {each.name: each.bytes for each in run(machine).residues}["page cache"] == PAGE


def test_a_guest_memfd_that_was_closed_loses_the_trail() -> None:
    machine = private_guest(hidden=True)
    machine.host.set(machine.slot, "kvm_memory_slot", gmem__file=0)
    assert run(machine).outcome == Outcome.UNKNOWN


def test_missing_pages_of_a_guest_memfd_that_the_vmm_maps_hold_nothing() -> None:
    machine = private_guest(hidden=True)
    machine.take(100 * PAGE)
    assert run(machine).outcome == Outcome.UNKNOWN
    file = machine.value(machine.slot + OFFSETS["kvm_memory_slot.gmem.file"])
    inode = machine.value(file + OFFSETS["file.f_inode"])
    machine.host.set(inode, "inode", i_sb=machine.host.new("super_block", s_magic=1))
    machine.host.set(machine.vma, "vm_area_struct", vm_file=file)
    found = run(machine)
    assert (found.outcome, found.missing_pages) == (Outcome.ENDS, 1)


class Changing(Machine):
    """Something happens when the kernel half of the page tables is walked."""

    happens: Callable[[], None] | None = None

    def _fetch(self, va: int, size: int) -> bytes:
        if size == PAGE and va == DIRECT_MAP + self.tables.top and self.happens is not None:
            happens, self.happens = self.happens, None
            happens()
        return super()._fetch(va, size)


def ends(machine: Changing) -> None:
    """The VMM ends: its process is gone, and what its structures were is there no more or not yet overwritten."""
    machine.host.processes()


def gives_up_its_pages(machine: Changing) -> None:
    for page in range(0, 4 << 20, PAGE):
        machine.take(page)
    machine.host.set(machine.vma, "vm_area_struct", vm_flags=1 << 10)


def gets_another_slot(machine: Changing) -> None:
    other = machine.host.new("kvm_memory_slot", base_gfn=4096, npages=1, userspace_addr=HVA)
    node = other + OFFSETS["kvm_memory_slot.id_node"]
    machine.host.put(machine.slots + OFFSETS["kvm_memslots.id_hash"] + 8, node.to_bytes(8, "little"))
    machine.host.set(machine.kvm, "kvm", nr_memslot_pages=1025)


def gets_another_vm(machine: Changing) -> None:
    machine.list_vms(machine.kvm, machine.host.new("kvm", mm=machine.mm, nr_memslot_pages=1))


@pytest.mark.parametrize("event", [ends, gives_up_its_pages, gets_another_slot, gets_another_vm])
def test_a_vm_that_changes_meanwhile_is_no_end(event: Callable[[Changing], None]) -> None:
    machine = Changing(hidden=True)
    assert run(machine).outcome == Outcome.ENDS
    machine.happens = lambda: event(machine)
    found = run(machine)
    assert found.outcome == Outcome.UNKNOWN, found


def test_pages_that_come_meanwhile_are_looked_for_too() -> None:
    machine = Changing(hidden=True)
    machine.host.set(machine.vma, "vm_area_struct", vm_flags=1 << 10)
    machine.take(5 * PAGE)
    plain = machine.host.frames.pop()
    machine.memory[plain : plain + 46] = MARK + SECRET

    def comes() -> None:
        machine.user.map(HVA + 5 * PAGE, plain, 7)
        machine.nested.map(5 * PAGE, plain, 7)

    machine.happens = comes
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.RECOVERED, "guest: pages that are mapped")


def test_a_mapping_that_goes_while_it_is_searched_loses_the_trail() -> None:
    class Going(Machine):
        def _fetch(self, va: int, size: int) -> bytes:
            if va == ALIAS and size == PAGE:
                self.tables.unmap(ALIAS)
            return super()._fetch(va, size)

    machine = Going(hidden=True)
    machine.tables.map(ALIAS, machine.secret_page)
    found = run(machine)
    assert (found.outcome, found.stage) == (Outcome.UNKNOWN, "guest: pages that are mapped")


def test_a_primitive_that_errs_cannot_say_that_a_chain_ends() -> None:
    def judge(errors: float) -> Outcome:
        machine = Noisy(Machine(hidden=True), errors=errors, votes=9, seed=2)
        victim = Victim(PID, PlantedSecret("sh", DIGEST))
        return Outcome(attack(machine, Beforehand(KNOWN, KNOWN), victim, None).outcome)

    assert run(Machine(hidden=True)).outcome == Outcome.ENDS
    assert judge(1e-9) == Outcome.UNKNOWN


def test_a_guest_without_kaslr() -> None:
    assert run(Machine(slide=0)).outcome == Outcome.RECOVERED
    assert run(Machine(hidden=True, slide=0)).outcome == Outcome.ENDS
