"""The sweep, on memory made of bytes: it finds any 16 bytes of a secret, and not itself."""

import mmap
from collections.abc import Sequence

import pytest

from offmap.attack import sweep as module
from offmap.attack.linux import Lost
from offmap.attack.primitive import NotMapped, Primitive, Unreadable
from offmap.attack.sweep import Pieces, SweepPlan, parse_pieces, sweep
from offmap.audit.own_memory import LockedBuffer
from offmap.audit.readable import Piece
from offmap.audit.regions import Layout
from offmap.errors import OffmapError

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
SECRET = bytes(range(0x40, 0x60))
PIECES = Pieces(tuple(SECRET[at : at + 8] for at in range(0, 32, 8)))
OWN_FRAME = 1 << 20


class Memory(Primitive):
    """Memory at BASE; a page of ours is mapped elsewhere, as the host's direct map has it."""

    name = "test"

    def __init__(self, size: int, unreadable: int | None = None) -> None:
        super().__init__()
        self.memory, self.unreadable = bytearray(size), unreadable
        self.own: LockedBuffer | None = None

    def fill(self, va: int, view: memoryview) -> None:
        if va == BASE + OWN_FRAME * PAGE:
            view[:] = self.own.view[:PAGE] if self.own is not None else bytes(PAGE)
            return
        if self.unreadable is not None and va <= self.unreadable < va + len(view):
            raise Unreadable(self.unreadable)
        view[:] = self.memory[va - BASE : va - BASE + len(view)]

    def plan(self, unread: Sequence[Piece] = ()) -> SweepPlan:
        own = Piece(BASE + OWN_FRAME * PAGE, OWN_FRAME * PAGE, PAGE)
        return SweepPlan([Piece(BASE, 0, len(self.memory)), own], list(unread), 3, Layout([(BASE, BASE + 1, "here")]))

    def _fetch(self, va: int, size: int) -> bytes:
        raise NotMapped(va)

    def _fetch_user(self, pid: int, va: int, size: int) -> bytes:
        raise NotMapped(va)

    def close(self) -> None:
        pass


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory(5 << 20)

    class Own(LockedBuffer):
        def __init__(self) -> None:
            super().__init__(mmap.PAGESIZE)
            found.own = self

        def write(self, data: bytes) -> None:
            self.view[: len(data)] = data

        def pfn(self) -> int:
            return OWN_FRAME

        def close(self) -> None:
            super().close()
            found.own = None

    monkeypatch.setattr(module, "OwnPage", Own)
    monkeypatch.setattr(module, "frames_at", lambda va, pages: set())
    return found


@pytest.mark.parametrize("at", [0, 5, (2 << 20) - 16, (2 << 20) - 1, (2 << 20) + 1, (4 << 20) - 20, (5 << 20) - 32])
def test_the_whole_is_found_wherever_it_stands(memory: Memory, at: int) -> None:
    memory.memory[at : at + 32] = SECRET
    found = sweep(memory, memory.plan(), PIECES)
    assert [(run.va, run.pa, run.bytes) for run in found.runs] == [(BASE + at, at, 32)]
    assert (found.longest, found.secret_bytes, found.pages_unread, found.device_pages) == (32, 32, 0, 3)
    assert found.bytes_read == (5 << 20) + PAGE


@pytest.mark.parametrize("start", range(17))
def test_any_sixteen_bytes_of_it_are_found_and_no_fewer(memory: Memory, start: int) -> None:
    run = SECRET[start : start + 16]
    memory.memory[7777 : 7777 + 16] = run
    memory.memory[99999 : 99999 + 15] = run[:15]
    memory.memory[5000 : 5000 + 16] = run[:8] + b"\0" + run[8:15]
    found = sweep(memory, memory.plan(), PIECES)
    assert [(each.va - BASE, each.bytes) for each in found.runs] == [(7777, 16)]


def test_what_cannot_be_read_is_said(memory: Memory) -> None:
    memory.unreadable = BASE + (3 << 20)
    found = sweep(memory, memory.plan([Piece(BASE - PAGE, 0, PAGE)]), PIECES)
    # The page that is unread by one mapping was read by another.
    assert (found.pages_unread, found.runs) == ((2 << 20) // PAGE, ())


def test_a_sweep_that_finds_nothing_of_its_own_is_lost(memory: Memory) -> None:
    plan = memory.plan()
    blind = SweepPlan(plan.readable[:1], (), 0, plan.layout)
    with pytest.raises(Lost, match="does not find what it planted"):
        sweep(memory, blind, PIECES)


def test_pieces_of_a_command_line() -> None:
    assert parse_pieces("4041424344454647,48494a4b4c4d4e4f,") == Pieces(PIECES.each[:2])
    for wrong in ("", "40414243", "4041424344454647", "xx", "4041424344454647,4041424344454647", "4041424344454647,48"):
        with pytest.raises(OffmapError):
            parse_pieces(wrong)
