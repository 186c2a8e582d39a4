"""The primitives: what they give of memory that is mapped, that is not, and that cannot be read."""

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest

from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.module_primitive import ModulePrimitive
from offmap.attack.primitive import Noisy, NotMapped, Primitive, Unreadable, neighbours
from offmap.errors import Undetermined

from .machine import DIRECT_MAP, IMAGE_AT, PAGE, SYMBOLS, Machine

FULL, ZERO, GONE, POISONED = (0x30_0000 + page * PAGE for page in range(4))
FAR = DIRECT_MAP + (1 << 40)  # kcore offers nothing there


@dataclass
class Facts:
    sme_mask: int = 0
    levels: int = 4
    root_pa: int = IMAGE_AT + SYMBOLS["init_top_pgt"]
    kernel_image_size: int = 1 << 30


class Kcore:
    """/proc/kcore of a machine: it gives zeroes of what is not mapped, and of pages with errors."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self.vmcoreinfo, self.page_offset_base, self.page_flags = machine, Facts(), DIRECT_MAP, self
        self.reads = 0

    def is_zero_filled(self, pfn: int) -> bool:
        return pfn * PAGE == POISONED

    def read_virtual(self, va: int, buffer: memoryview) -> None:
        self.reads += 1
        for at in range(0, len(buffer), PAGE):
            pa, part = self._machine.tables.walk(va + at), buffer[at : at + PAGE]
            if va + at >= FAR:
                raise Undetermined("not there")
            if pa is not None and pa & -PAGE != POISONED:
                part[:] = self._machine.memory[pa : pa + len(part)]

    def close(self) -> None:
        pass


def machine() -> Machine:
    made = Machine()
    for page in (FULL, GONE, POISONED):
        made.memory[page : page + PAGE] = bytes([page >> 12 & 255]) * PAGE
    made.tables.unmap(DIRECT_MAP + GONE)
    return made


def kcore_primitive(of: Machine) -> KcorePrimitive:
    return KcorePrimitive(Kcore(of))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, PAGE])
def test_kcore_tells_zeroes_from_what_it_cannot_read(size: int) -> None:
    primitive = kcore_primitive(machine())
    assert primitive.read(DIRECT_MAP + FULL, size) == bytes([FULL >> 12 & 255]) * size
    assert primitive.read(DIRECT_MAP + ZERO, size) == bytes(size)
    for va, error in ((DIRECT_MAP + GONE, NotMapped), (DIRECT_MAP + POISONED, Unreadable), (FAR, NotMapped)):
        with pytest.raises(error):
            primitive.read(va, size)


def test_what_kcore_does_not_offer_is_reached_if_it_is_mapped() -> None:
    made = machine()
    made.tables.map(FAR, FULL)
    with pytest.raises(Unreadable):
        kcore_primitive(made).read(FAR)


def peek(of: Machine) -> ModulePrimitive:
    """A primitive whose device reads this machine."""
    primitive = object.__new__(ModulePrimitive)
    Primitive.__init__(primitive)

    def read(va: int, to: int, size: int) -> int:
        done = 0
        while done < size and (pa := of.tables.walk(va + done)) is not None:
            ctypes.memmove(to + done, bytes(of.memory[pa : pa + PAGE]), PAGE)
            done += PAGE
        return done

    primitive._peek = read  # type: ignore[method-assign]
    primitive._fd = -1
    return primitive


@pytest.mark.parametrize("make", [kcore_primitive, peek, lambda of: of, lambda of: Noisy(of, votes=1)])
def test_many_pages_are_read_and_counted_as_one_by_one(make: Any) -> None:
    """Neighbours or not, in whatever order; each as ``read`` has it."""
    one, many = make(machine()), make(machine())
    pages = [
        FULL,
        ZERO,
        GONE,
        GONE + 2 * PAGE,
        GONE,
        FULL,
        ZERO,
        0x10_0000,
        *range(IMAGE_AT, IMAGE_AT + 8 * PAGE, PAGE),
    ]
    vas = [*(DIRECT_MAP + page for page in pages), (1 << 64) - 1 + PAGE]

    def read(va: int) -> bytes | None:
        try:
            return bytes(one.read(va, PAGE))
        except NotMapped:
            return None

    assert list(many.read_pages(vas)) == [read(va) for va in vas]
    one.counts.reads += 1  # of the last one, which is no address
    assert many.counts == one.counts


def test_a_page_that_cannot_be_read_is_no_matter_before_it_is_asked_for() -> None:
    found = kcore_primitive(machine()).read_pages([DIRECT_MAP + FULL, DIRECT_MAP + POISONED])
    assert next(found) is not None
    with pytest.raises(Unreadable):
        next(found)


def test_pages_that_follow_each_other_are_read_at_once() -> None:
    kcore = Kcore(machine())
    primitive = KcorePrimitive(kcore)  # type: ignore[arg-type]
    assert all(primitive.read_pages(range(DIRECT_MAP + IMAGE_AT + PAGE, DIRECT_MAP + IMAGE_AT + 4 * PAGE, PAGE)))
    assert kcore.reads == 1


def test_neighbours() -> None:
    assert list(neighbours([])) == []
    assert list(neighbours([0, PAGE, 3 * PAGE, 2 * PAGE, 2 * PAGE])) == [
        (0, 2),
        (3 * PAGE, 1),
        (2 * PAGE, 1),
        (2 * PAGE, 1),
    ]
