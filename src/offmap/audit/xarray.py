"""``struct xarray`` of the running kernel: all its entries, with their indices.

Source: ``include/linux/xarray.h`` and ``lib/xarray.c``. An entry is a pointer to a node if its low bits are 10 and it
is above 4096; other entries of that form are marks of the xarray itself. An entry of several indices stands in the
first slot, and the slots after it are its siblings.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offmap.audit.btf import Unknown
from offmap.audit.intervals import Ints

_SLOTS = 64  # XA_CHUNK_SIZE without CONFIG_BASE_SMALL
_LARGEST_SIBLING = 62  # XA_CHUNK_SIZE - 2
_DEEPEST = 64  # bits of an index
_MOST_NODES = 1 << 24  # 4 TiB of 4 KiB pages

Read = Callable[[int, int], bytes]
"""Reads kernel memory: address, bytes."""


class Types(Protocol):
    """What a kernel's structures look like, as ``Btf`` tells."""

    def size(self, name: str) -> int:
        """Bytes of a structure."""
        ...

    def offset(self, name: str, *members: str) -> int:
        """Byte offset of a member."""
        ...

    def elements(self, name: str, *members: str) -> int:
        """How many elements a member has that is an array."""
        ...


def entries(read: Read, btf: Types, at: int, only: int | None = None) -> tuple[Ints, Ints, NDArray[np.uint64]]:
    """All entries of the xarray at this address, in order: the index of each, how many indices it has, its value.

    With `only`, nodes that cannot have that index are not read, and entries of the same nodes may be there too.

    What changes meanwhile may be missing; what is there all the time is not.

    Raises:
        Unknown: a part could not be read as what it should be: it is being changed.
    """
    size, head_at = btf.size("xa_node"), at + btf.offset("xarray", "xa_head")
    slots = btf.offset("xa_node", "slots")
    if btf.elements("xa_node", "slots") != _SLOTS:
        raise Unknown("the kernel's xarrays are not as expected")
    parent_at, array_at = btf.offset("xa_node", "parent"), btf.offset("xa_node", "array")
    head = int.from_bytes(read(head_at, 8), "little")
    none = np.zeros(0, dtype=np.int64)
    if not head:
        return none, none, none.astype(np.uint64)
    if not _is_node(head):
        return np.zeros(1, np.int64), np.ones(1, np.int64), np.array([head], dtype=np.uint64)
    parts: list[tuple[Ints, Ints, NDArray[np.uint64]]] = []
    todo, seen = [(head, 0, 0, _DEEPEST)], 0
    while todo:
        entry, base, parent, above = todo.pop()
        seen += 1
        if seen > _MOST_NODES:
            raise Unknown("an xarray does not end")
        node = read(entry - 2, size)
        shift = node[btf.offset("xa_node", "shift")]
        array = int.from_bytes(node[array_at : array_at + 8], "little")
        up = int.from_bytes(node[parent_at : parent_at + 8], "little")
        # A node that was freed belongs to nothing or to another array by now.
        if array != at or up != parent or shift >= above:
            raise Unknown("an xarray is being changed")
        values = np.frombuffer(node, dtype=np.uint64, count=_SLOTS, offset=slots)
        index, count, value = _of_node(values, shift, base)
        inner = np.array([_is_node(each) for each in value.tolist()]) if shift else np.zeros(len(value), dtype=np.bool_)
        for where, below in zip(index[inner].tolist(), value[inner].tolist(), strict=True):
            if only is None or where <= only < where + (1 << shift):
                todo.append((below, where, entry - 2, shift))
        parts.append((index[~inner], count[~inner], value[~inner]))
    if int.from_bytes(read(head_at, 8), "little") != head:
        raise Unknown("an xarray is being changed")
    index, count, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(index, kind="stable")
    return index[order], count[order], value[order]


def _is_node(entry: int) -> bool:
    return entry & 3 == 2 and entry > 4096


def _of_node(values: NDArray[np.uint64], shift: int, base: int) -> tuple[Ints, Ints, NDArray[np.uint64]]:
    """What is in the slots of one node: entries and nodes, without siblings and the xarray's own marks."""
    mark = (values & np.uint64(3) == 2) & (values <= np.uint64(4096))
    here = np.flatnonzero((values != 0) & ~mark)
    sibling = mark & (values >> np.uint64(2) < _LARGEST_SIBLING)
    length = np.ones(len(here), dtype=np.int64)
    if sibling.any():
        owner = (values[sibling] >> np.uint64(2)).astype(np.int64)
        length += np.bincount(owner, minlength=_SLOTS)[here]
    return base + (here.astype(np.int64) << shift), length << shift, values[here]
