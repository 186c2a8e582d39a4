"""Finding guest RAM: the memslots convention, guesses, and maps."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.guest_ram import (
    RamRange,
    _unseen_guest_memfd,
    find_guest_ram,
    guess_ranges,
    parse_memslots,
    slot_ranges,
)
from offmap.audit.kvm_slots import KvmSlot
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


def test_page_kept_from_the_guest_at_one_address_counts_at_another() -> None:
    part = RamRange(0x7F00_0000_0000, 1 << 20, Source.MEMSLOT, 0, excluded=((0x1000, 4096),))
    same, other = (KvmSlot(gpa, part.va, part.bytes, False) for gpa in (0, 1 << 30))
    assert slot_ranges([same], [], [part]) == ()
    assert [(found.guest_phys_addr, found.excluded) for found in slot_ranges([same, other], [], [part])] == [
        (1 << 30, ())
    ]


def test_guest_memfd_that_no_range_shows_is_noticed() -> None:
    mappings = parse_maps(MAPS + "7f0040000000-7f0044000000 rw-s 00000000 00:0f 1  /[kvm-gmem] (deleted)\n")
    shown, half, other = (
        RamRange(va, size, Source.MEMSLOT)
        for va, size in ((0x7F00_4000_0000, 64 << 20), (0x7F00_4000_0000, 32 << 20), (0x7F00_1000_0000, 4096))
    )
    file = {("00:0f", 1): 64 << 20}
    assert _unseen_guest_memfd(file, [other], mappings)
    assert not _unseen_guest_memfd(file, [other, shown], mappings)
    assert not _unseen_guest_memfd({}, [other], mappings)
    # Part of it, another one beside it, and one that cannot be asked about.
    assert _unseen_guest_memfd(file, [half], mappings)
    assert _unseen_guest_memfd(file | {("00:0f", 2): 4096}, [shown], mappings)
    assert _unseen_guest_memfd({("", 0): 0}, [shown], mappings)


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
