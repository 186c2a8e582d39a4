"""A guest is told how fast its TSC is: which registers begin one, and what becomes of its command line."""

import ctypes
from collections.abc import Callable

import pytest

from offmap.uapi import bootparam as bp
from offmap.uapi import kvm
from offmap.wrap.clock import GuestRam, Waiting, boots_linux
from offmap.wrap.source import Piece

SIZE = 1 << 20
THERE = 0x7F00_0000_0000  # where the VMM has it
ENTRY, DATA, LINE = 0x80000, 0x7000, 0x20000
WORDS = b"tsc=reliable tsc_early_khz=2496000"
START_INFO = 0x336EC578


class Guest:
    """Guest RAM of a VMM whose kernel begins with two bytes at ENTRY."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(SIZE)
        self.ended = 0
        self.ram = GuestRam()
        self.ram.add(THERE + 4096, Piece(-1, 0, SIZE - 4096, ctypes.addressof(self.bytes) + 4096, self._end))
        self.ram.set_slot(9, kvm.kvm_userspace_memory_region(0, 0, 0, SIZE, THERE))
        self.write(ENTRY, b"\xfa\xfc")

    def _end(self) -> None:
        self.ended += 1

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(ctypes.addressof(self.bytes) + at, data, len(data))

    def read(self, at: int, size: int) -> bytes:
        return self.bytes.raw[at : at + size]

    def line(self) -> bytes:
        return self.read(LINE, 2048).partition(b"\0")[0]

    def with_zero_page(self, line: bytes) -> None:
        self.write(DATA + bp.HEADER, bp.HEADER_MAGIC)
        self.write(DATA + bp.CMD_LINE_PTR, LINE.to_bytes(4, "little"))
        self.write(LINE, line)

    def with_start_info(self, line: bytes) -> None:
        self.write(DATA, START_INFO.to_bytes(4, "little"))
        self.write(DATA + 24, LINE.to_bytes(8, "little"))
        self.write(LINE, line)


def registers(**values: int) -> kvm.kvm_regs:
    return kvm.kvm_regs(**{"rip": ENTRY, "rsi": DATA, "rsp": 0x8FF0, "rbp": 0x8FF0, "rflags": 2} | values)


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_a_kernels_first_registers_are_known(guest: Guest) -> None:
    assert boots_linux(registers(), guest.ram)
    assert boots_linux(registers(rsi=0, rbx=DATA, rsp=0, rbp=0), guest.ram)


@pytest.mark.parametrize(
    "values",
    [
        {"rip": 0xFFF0, "rsi": 0, "rsp": 0, "rbp": 0},  # a processor after its reset
        {"rip": 0xFFFF_FFFF_8100_0000},  # a kernel that runs
        {"rflags": 0x202},  # a program that runs
        {"rax": 1},
        {"r15": 1},
        {"rbx": DATA},
        {"rsi": SIZE},
        {"rip": 0x800},  # in no piece that was placed
    ],
)
def test_others_are_left_alone(guest: Guest, values: dict[str, int]) -> None:
    assert not boots_linux(registers(**values), guest.ram)


@pytest.mark.parametrize("by", [Guest.with_zero_page, Guest.with_start_info])
def test_the_line_is_completed_though_it_comes_after_the_registers(
    guest: Guest, by: Callable[[Guest, bytes], None]
) -> None:
    waiting = Waiting(guest.ram, registers(), 2496000)
    assert guest.read(ENTRY, 2) == b"\xeb\xfe"  # jmp to itself
    by(guest, b"console=ttyS0 -- single")
    assert waiting.complete()
    assert guest.line() == WORDS + b" console=ttyS0 -- single"
    assert guest.read(ENTRY, 2) == b"\xfa\xfc"


def test_a_line_that_has_it_stays(guest: Guest) -> None:
    guest.with_zero_page(b"tsc_early_khz=1")
    assert Waiting(guest.ram, registers(), 2496000).complete()
    assert guest.line() == b"tsc_early_khz=1"


@pytest.mark.parametrize("what", ["no structure", "no room", "too long", "no line", "a kernel that was loaded later"])
def test_where_it_cannot_be_told_the_guest_goes_on_as_it_was(guest: Guest, what: str) -> None:
    if what != "no structure":
        guest.with_zero_page(b"quiet" if what != "too long" else b"x" * 2030)
    if what == "no room":
        guest.write(LINE + 20, b"initrd")
    if what == "no line":
        guest.write(DATA + bp.CMD_LINE_PTR, (SIZE - 4).to_bytes(4, "little"))
    before = guest.line()
    waiting = Waiting(guest.ram, registers(), 2496000)
    if what == "a kernel that was loaded later":
        guest.write(ENTRY, b"\xfa\xfc")
    assert not waiting.complete()
    assert (guest.line(), guest.read(ENTRY, 2)) == (before, b"\xfa\xfc")


def test_smms_memory_and_several_vms_are_not_looked_at(guest: Guest) -> None:
    here = guest.ram.at(ENTRY, 2)
    smm = 1 << 16
    guest.ram.set_slot(9, kvm.kvm_userspace_memory_region(smm, 0, 1 << 30, SIZE, THERE))
    assert guest.ram.at((1 << 30) + ENTRY, 2) is None
    assert guest.ram.at(ENTRY, 2) == here
    guest.ram.set_slot(10, kvm.kvm_userspace_memory_region(0, 0, 1 << 30, SIZE, THERE))
    assert guest.ram.at(ENTRY, 2) is None


def test_a_vm_that_was_closed_leaves_nothing_to_the_next_with_its_number(guest: Guest) -> None:
    region = kvm.kvm_userspace_memory_region(1, 0, 1 << 30, SIZE, THERE)
    guest.ram.close()
    guest.ram.forget({9})
    guest.ram.add(THERE, Piece(-1, 0, SIZE, ctypes.addressof(guest.bytes), guest._end))
    guest.ram.set_slot(9, region)
    assert guest.ram.at(ENTRY, 2) is None
    assert guest.ram.at((1 << 30) + ENTRY, 2) == ctypes.addressof(guest.bytes) + ENTRY
    guest.ram.set_slot(10, region)
    guest.ram.forget({10})
    assert guest.ram.at((1 << 30) + ENTRY, 2) is not None


def test_what_nobody_needs_any_more_is_closed(guest: Guest) -> None:
    guest.ram.close()
    assert (guest.ended, guest.ram.at(ENTRY, 2)) == (1, None)
    guest.ram.add(THERE, Piece(-1, 0, SIZE, 0, guest._end))
    assert guest.ended == 2
