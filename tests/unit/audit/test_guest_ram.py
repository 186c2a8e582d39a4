"""Finding guest RAM: the memslots convention, guesses, and maps."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.btf import Unknown
from offmap.audit.classify import claimed_excluded, excluded_ranges
from offmap.audit.guest_ram import (
    MEMSLOTS_LINK,
    GuestRam,
    OthersVm,
    RamRange,
    ask_kvm_list,
    claimed_ranges,
    find_guest_ram,
    guess_ranges,
    parse_memslots,
    read_only_ranges,
    slot_ranges,
)
from offmap.audit.kvm_list import GuestMemfd, KvmSlot, Vm
from offmap.audit.kvm_vcpu import VCpu
from offmap.audit.process import Mapping as Vma
from offmap.audit.process import NoSuchProcess, Process, find_mapping, parse_maps
from offmap.audit.result import Source
from offmap.errors import OffmapError, Undetermined

MAPS = """\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0008000000 rw-s 60000000 00:06 7                          /dev/mem
7f0010000000-7f0010800000 rw-p 00000000 00:00 0 
7f0010800000-7f0011800000 rw-p 00000000 00:00 0 
7f0020000000-7f0024000000 r--p 00000000 fd:00 1234                       /usr/lib/a file.so
7f0030000000-7f0032000000 rw-s 00000000 00:01 99                         /memfd:ram (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291 (the kernel pads an unnamed mapping's line)


def claim(**changes: object) -> bytes:
    slot = {"guest_phys_addr": 0, "memory_size": 4096, "userspace_addr": 0x7F00_0000_0000, "backend": "anon"}
    return json.dumps({"schema": "offmap-memslots/1", "slots": [slot | changes]}).encode()


def test_maps_lines() -> None:
    mappings = parse_maps(MAPS)
    assert len(mappings) == 7
    memory = mappings[1]
    assert (memory.size, memory.offset, memory.shared, memory.path) == (128 << 20, 0x6000_0000, True, "/dev/mem")
    assert mappings[2].path == "" and mappings[2].anonymous and mappings[0].anonymous
    assert mappings[4].path == "/usr/lib/a file.so" and not mappings[4].writable
    assert find_mapping(mappings, 0x7F00_0800_0000) is None
    assert find_mapping(mappings, 0x7F00_07FF_FFFF) is memory


@given(st.text(max_size=200))
def test_maps_of_any_text_do_not_fail(text: str) -> None:
    parse_maps(text)


def test_guesses_are_the_large_writable_mappings_joined_where_they_touch() -> None:
    guesses = guess_ranges(parse_maps(MAPS))
    assert [(part.va, part.bytes >> 20, part.backend) for part in guesses] == [
        (0x7F00_0000_0000, 128, "/dev/mem"),
        (0x7F00_1000_0000, 24, "anonymous"),
        (0x7F00_3000_0000, 32, "/memfd:ram (deleted)"),
    ]
    assert all(part.source is Source.GUESS for part in guesses)


def test_memslots_claim() -> None:
    text = json.loads(claim())
    text["excluded"] = [[0x1000, 0x2000]]
    ram = parse_memslots(json.dumps(text).encode())
    assert ram.ranges[0].excluded == ((0x1000, 0x2000),) and not ram.guessed
    assert (ram.ranges[0].va, ram.ranges[0].pages, ram.ranges[0].guest_phys_addr) == (0x7F00_0000_0000, 1, 0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"schema": "offmap-memslots/2", "slots": []}',
        b'{"schema": "offmap-memslots/1"}',
        b'{"schema": "offmap-memslots/1", "slots": []}',
        b'{"schema": "offmap-memslots/1", "slots": [7]}',
        b'{"schema": "offmap-memslots/1", "slots": [], "excluded": 3}',
        claim(memory_size=0),
        claim(memory_size=4095),
        claim(memory_size=True),
        claim(memory_size="4096"),
        claim(userspace_addr=-4096),
        claim(userspace_addr=1 << 64),
        claim(userspace_addr=(1 << 64) - 4096, memory_size=8192),
        claim(guest_phys_addr=None),
        claim(userspace_addr=0xFFFF_8000_0000_0000),
        claim(guest_phys_addr=1 << 63),
    ],
)
def test_malformed_claim_is_undetermined_and_never_replaced_by_a_guess(text: bytes) -> None:
    with pytest.raises(Undetermined):
        parse_memslots(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["schema", "slots", "excluded", "memory_size"]), x),
        max_leaves=8,
    )
)
def test_any_json_is_a_claim_or_undetermined(value: object) -> None:
    text = json.dumps({"schema": "offmap-memslots/1", "slots": value, "excluded": value}).encode()
    with pytest.raises(Undetermined):
        parse_memslots(text)


def test_own_memslots_memfd_is_found_by_its_name() -> None:
    fd = os.memfd_create("offmap-memslots")
    try:
        os.write(fd, claim())
        with Process(os.getpid()) as process:
            assert find_guest_ram(process).ranges[0].source is Source.MEMSLOT
    finally:
        os.close(fd)


def test_what_only_has_the_name_of_a_list_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(claim())
    for path in tmp_path.iterdir():
        fd = os.open(path, os.O_RDWR)
        try:
            with Process(os.getpid()) as process, pytest.raises(Undetermined, match="no memfd"):
                claimed_ranges(process, {fd: MEMSLOTS_LINK})
        finally:
            os.close(fd)


def test_what_one_vm_keeps_from_its_guest_another_may_give_to_its_own() -> None:
    fds = [os.memfd_create("offmap-memslots") for _ in range(2)]
    try:
        for fd, va, holes in zip(fds, (0x7F00_0000_0000, 0x7F10_0000_0000), ([[0, 4096]], []), strict=True):
            os.write(fd, json.dumps(json.loads(claim(userspace_addr=va)) | {"excluded": holes}).encode())
        with Process(os.getpid()) as process:
            ranges = find_guest_ram(process).ranges
    finally:
        for fd in fds:
            os.close(fd)
    assert {part.va: part.excluded for part in ranges} == {0x7F00_0000_0000: ((0, 4096),), 0x7F10_0000_0000: ()}


def test_a_page_that_is_said_to_be_kept_from_the_guest_counts_if_a_slot_has_it() -> None:
    part = RamRange(0x7F00_0000_0000, 16 << 12, Source.MEMSLOT, 0, excluded=((0x1000, 0x3000),))
    other = RamRange(0x7E00_0000_0000, 4096, Source.KVM, 0x5000)

    def excused(*slots: KvmSlot) -> list[int]:
        found: list[int] = excluded_ranges(GuestRam((other, part), (made(*slots),))).edges.tolist()
        return found

    def slot(first: int, pages: int, gpa: int = 0) -> KvmSlot:
        return KvmSlot(gpa + (first << 12), part.va + (first << 12), pages << 12, False)

    assert excused() == excused(slot(0, 1), slot(4, 12)) == [2, 5]  # the other range's page is number 0
    assert excused(slot(0, 2), slot(3, 12)) == [3, 4]
    assert excused(slot(0, 16)) == excused(slot(0, 16, gpa=1 << 30)) == []
    assert excused(replace(slot(2, 1), read_only=True)) == [2, 3, 4, 5]
    ram = GuestRam((part,), (made(slot(0, 1)),), unlisted="no BTF")
    assert (excluded_ranges(ram).size, claimed_excluded(ram).size) == (0, 3)


def test_pages_of_a_guest_memfd_are_judged_by_its_file_whatever_the_vmm_maps() -> None:
    file = GuestMemfd(0xFFFF_8880_0000_0000, 7, 1 << 20, "00:0f")
    slot = KvmSlot(0, 0x7F00_4000_0000, 2 << 20, False, file)
    line = "7f0040000000-7f0040200000 rw-s {offset:08x} {device} {inode} {path}\n"
    inside = parse_maps(line.format(offset=1 << 20, device="00:0f", inode=7, path="/[kvm-gmem] (deleted)"))
    # Mapped as it is: one range, found by the file.
    known, (part,) = slot_ranges([slot], inside)
    assert (known, part.guest_memfd, part.bytes) == ((), file, 2 << 20)
    claim = RamRange(slot.userspace_addr, slot.bytes, Source.MEMSLOT, 0, "guest_memfd")
    assert slot_ranges([slot], inside, [claim]) == ((replace(claim, guest_memfd=file),), ())
    # Another file, another part of it, or nothing at all is mapped: both count.
    decoys = [
        parse_maps(line.format(offset=offset, device=device, inode=inode, path=path))
        for offset, device, inode, path in (
            (1 << 20, "00:0f", 8, "/[kvm-gmem] (deleted)"),
            (0, "00:0f", 7, "/[kvm-gmem] (deleted)"),
            (1 << 20, "00:01", 7, "/memfd:[kvm-gmem] (deleted)"),  # with inode numbers that go up from 1
        )
    ]
    for mappings in (*decoys, []):
        _, both = slot_ranges([slot], mappings)
        assert sorted(each.guest_memfd is None for each in both) == [False, True]
        kept, (more,) = slot_ranges([slot], mappings, [claim])
        assert (kept, more.guest_memfd) == ((claim,), file)
    # A slot whose file was closed has its other pages all the same.
    assert [each.guest_memfd for each in slot_ranges([replace(slot, guest_memfd=GuestMemfd(0, 0, 0))], [])[1]] == [None]


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=8)


@given(SPANS, SPANS)
def test_a_slot_is_left_out_if_it_lies_in_one_other_range(
    known: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    claims = [RamRange(va << 12, pages << 12, Source.MEMSLOT) for va, pages in known]
    slots = [KvmSlot(n << 30, va << 12, pages << 12, False) for n, (va, pages) in enumerate(more)]
    kept, added = slot_ranges(slots, [], claims)
    assert kept == tuple(claims)

    def lies_in(slot: KvmSlot, part: RamRange) -> bool:
        return part.va <= slot.userspace_addr and slot.userspace_addr + slot.bytes <= part.va + part.bytes

    assert all(any(lies_in(slot, part) for part in (*kept, *added)) for slot in slots)
    for slot in slots:
        own = [part for part in added if part.guest_phys_addr == slot.guest_phys_addr]
        others = [part for part in (*kept, *added) if part not in own]
        assert bool(own) is not any(lies_in(slot, part) for part in others)
    assert read_only_ranges([replace(slot, read_only=True) for slot in slots], [], (*kept, *added)) == ()


def test_a_vmm_with_as_many_slots_and_mappings_as_it_likes_keeps_nobody_waiting() -> None:
    class Counted(list[Vma]):
        looked = 0

        def __getitem__(self, index: Any) -> Any:
            self.looked += 1
            return super().__getitem__(index)

    count = 4096
    lines = (f"{va:x}-{va + 4096:x} rw-s 0 00:01 9 /memfd:a" for va in range(1 << 40, (1 << 40) + count * 8192, 8192))
    mappings = Counted(parse_maps("\n".join(lines)))
    slots = [KvmSlot(n << 20, (1 << 40) + n * 8192, 4096, False) for n in range(count)]
    assert len(slot_ranges(slots, mappings)[1]) == count
    assert mappings.looked < count * 32


def made(*slots: KvmSlot, intact: bool = True, changed: int = 0) -> Vm:
    """A VM with these slots."""
    return Vm(0x1000, 0x2000, "kvm-1", ((0x3000, 2),), slots, intact, changed, 0, (VCpu(0, False, 0),), ())


class HoldsVm(Process):
    """This process, with a VM among its descriptors."""

    def descriptors(self, thread: int | None = None) -> dict[int, str]:
        return super().descriptors(thread) | {5: "anon_inode:kvm-vm"}


def refuse(process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
    raise Unknown("no BTF")


def test_kvms_list_comes_before_guesses_and_without_it_they_are_guesses() -> None:
    slots = [
        KvmSlot(0, 0x7F00_0000_0000, 160 * 4096, False),
        KvmSlot(1 << 30, 0x7F10_0000_0000, 4096, True),
        KvmSlot(1 << 31, 0x7F00_0000_0000 + 4096, 16 * 4096, False),  # a part of the first, at another address
        KvmSlot(1 << 32, 0x7F00_0000_0000, 4096, True),  # the same
    ]
    held = bytearray(64 << 20)  # at least one mapping large enough to be a guess
    # Whatever its descriptors show.
    for kind in (HoldsVm, Process):
        with kind(os.getpid()) as process:
            ram = find_guest_ram(process, lambda process, links: [made(*slots)])
            assert [(part.source, part.va, part.guest_phys_addr) for part in ram.ranges] == [
                (Source.KVM, 0x7F00_0000_0000, 0)
            ]
            assert [part.va for part in ram.read_only] == [0x7F10_0000_0000]
            assert not ram.guessed and not ram.unlisted and not ram.doubts
    with HoldsVm(os.getpid()) as process:
        guessed = find_guest_ram(process, refuse)
        assert guessed.guessed and guessed.unlisted == "no BTF"
        assert find_guest_ram(process, lambda process, links: [made()]).guessed  # no memory yet
    assert held


def test_what_a_claim_leaves_out_is_judged_too() -> None:
    claimed, left_out = (KvmSlot(n << 20, 0x7F00_0000_0000 + (n << 20), 1 << 20, False) for n in range(2))
    rom = KvmSlot(1 << 31, 0x7F20_0000_0000, 1 << 20, True)
    fd = os.memfd_create("offmap-memslots")
    try:
        os.write(fd, claim(memory_size=claimed.bytes, userspace_addr=claimed.userspace_addr))
        with Process(os.getpid()) as process:
            whole = find_guest_ram(process, lambda process, links: [made(claimed)])
            assert [part.source for part in whole.ranges] == [Source.MEMSLOT]
            assert (whole.omitted_bytes, whole.unlisted, whole.why_unchecked) == (0, "", "")
            part = find_guest_ram(process, lambda process, links: [made(left_out, claimed, rom)])
            assert [(each.source, each.va) for each in part.ranges] == [
                (Source.MEMSLOT, claimed.userspace_addr),
                (Source.KVM, left_out.userspace_addr),
            ]
            assert part.omitted_bytes == left_out.bytes and not part.guessed
            # Memory that the guest can only read is not left out without a word either.
            assert [each.va for each in part.read_only] == [rom.userspace_addr]
            assert find_guest_ram(process, refuse).unlisted == "no BTF"
            assert find_guest_ram(process, lambda process, links: []).why_unchecked
    finally:
        os.close(fd)


def test_a_claim_that_a_child_has_of_its_parent_is_not_believed() -> None:
    def others(process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
        raise OthersVm("the VM of process 7 was made by another")

    fd = os.memfd_create("offmap-memslots")
    try:
        os.write(fd, claim())
        with HoldsVm(os.getpid()) as process, pytest.raises(Undetermined, match="its claim says nothing"):
            find_guest_ram(process, others)
    finally:
        os.close(fd)


def test_slots_that_may_have_been_replaced_since_the_audit_began() -> None:
    ranges = (RamRange(0x7F00_0000_0000, 4096, Source.KVM),)
    for intact, changed, replaced in ((True, 200, False), (False, 99, False), (False, 100, True)):
        assert GuestRam(ranges, (made(intact=intact, changed=changed),)).replaced_since(100) is replaced


class List:
    """KVM's list of one process, as far as it is asked."""

    def __init__(self, vms: Sequence[Vm], listed: Sequence[int], held: Sequence[int]) -> None:
        self._vms, self._listed, self._held = vms, listed, held

    def memory_of(self, tid: int) -> int:
        return 0x2000

    def of_memory(self, memory: int) -> Sequence[Vm]:
        return self._vms

    def addresses(self) -> Sequence[int]:
        return self._listed

    def held(self, tid: int, descriptors: Mapping[int, str]) -> set[int]:
        return set(self._held)


def test_descriptors_can_only_show_that_the_list_is_wrong() -> None:
    def ask(process: Process, vms: Sequence[Vm], listed: Sequence[int], held: Sequence[int]) -> Sequence[Vm]:
        kvm: Any = List(vms, listed, held)
        return ask_kvm_list(kvm, process, process.descriptors())

    with Process(os.getpid()) as process:
        assert ask(process, [made()], [0x1000], []) == [made()]
    with HoldsVm(os.getpid()) as process:
        # Its own, and another's beside it.
        assert ask(process, [made()], [0x1000], [0x1000]) == ask(process, [made()], [0x1000, 0x9000], [0x9000])
        with pytest.raises(Unknown, match="does not list"):
            ask(process, [made()], [0x1000], [0x9000])
        with pytest.raises(OthersVm, match="made by another"):
            ask(process, [], [0x9000], [0x9000])


def test_a_name_cannot_make_up_a_mapping() -> None:
    for end in "\r\x0b\x0c\x1c\x85\u2028":
        made_up = f"7f0030000000-7f0032000000 rw-p 00000000 00:00 0 {end}"
        (only,) = parse_maps(f"7f0030000000-7f0032000000 rw-s 00000000 00:01 99  /memfd:{end}{made_up}x\n")
        assert only.inode == 99 and made_up in only.path


def test_a_claim_nested_without_end_is_refused() -> None:
    with pytest.raises(Undetermined, match="not JSON"):
        parse_memslots(b"[" * 500_000)


def test_process_without_a_vm_is_undetermined() -> None:
    with Process(os.getpid()) as process, pytest.raises(Undetermined, match="holds no KVM VM"):
        find_guest_ram(process)


def test_no_such_process() -> None:
    with pytest.raises(NoSuchProcess) as caught:
        Process(1 << 30)
    assert isinstance(caught.value, OffmapError) and caught.value.exit_status == 2
