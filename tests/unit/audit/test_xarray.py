"""Entries of the kernel's xarrays: all of them, and none of a node that is not of this one any more."""

import pytest

from offmap.audit import xarray
from offmap.audit.btf import Unknown

from .kernel_memory import OFFSETS, Memory, Types

ROOT = 0x1000


def entries(memory: Memory) -> list[tuple[int, int, int]]:
    index, count, value = xarray.entries(memory.read, Types(), ROOT)
    return list(zip(index.tolist(), count.tolist(), value.tolist(), strict=True))


def test_an_empty_one_and_one_with_a_single_entry() -> None:
    memory = Memory()
    assert entries(memory) == []
    memory.put(ROOT, "xarray", "xa_head", value=0x8000)
    assert entries(memory) == [(0, 1, 0x8000)]


def test_all_entries_of_all_nodes_in_order() -> None:
    memory = Memory()
    found = {0: 0x9000, 63: 0x9040, 64: 0x9080, 700: 0x90C0}
    memory.xarray(ROOT, found)
    assert entries(memory) == [(index, 1, value) for index, value in found.items()]


def test_one_index_is_found_without_the_nodes_of_others() -> None:
    memory = Memory()
    found = {0: 0x9000, 63: 0x9040, 64: 0x9080, 700: 0x90C0}
    memory.xarray(ROOT, found)
    reads: list[int] = []

    def read(address: int, size: int) -> bytes:
        reads.append(address)
        return memory.read(address, size)

    for index, value in found.items():
        reads.clear()
        numbers, _, values = xarray.entries(read, Types(), ROOT, index)
        assert (index, value) in set(zip(numbers.tolist(), values.tolist(), strict=True))
        assert len(reads) == 4  # the head, before and after, its node, and one more
    assert 65 not in xarray.entries(read, Types(), ROOT, 65)[0].tolist()


def test_siblings_belong_to_the_entry_before_them_and_marks_are_no_entries() -> None:
    memory = Memory()
    sibling, retry = 8 << 2 | 2, 256 << 2 | 2
    memory.xarray(ROOT, {8: 0x9000, 9: sibling, 10: sibling, 11: sibling, 20: retry, 21: 0xA000})
    assert entries(memory) == [(8, 4, 0x9000), (21, 1, 0xA000)]


@pytest.mark.parametrize("member", ["array", "parent"])
def test_a_node_that_was_freed_is_no_answer(member: str) -> None:
    memory = Memory()
    leaf = memory.xarray(ROOT, {0: 0x9000})[1]
    memory.put(leaf, "xa_node", member, value=0)
    with pytest.raises(Unknown, match="being changed"):
        entries(memory)


def test_a_ring_of_nodes_ends() -> None:
    memory = Memory()
    top = memory.xarray(ROOT, {0: 0x9000})[0]
    memory.write(top + OFFSETS["xa_node", "slots"], top | 2)
    memory.put(top, "xa_node", "parent", value=top)
    with pytest.raises(Unknown, match="being changed"):
        entries(memory)
