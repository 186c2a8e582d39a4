"""What a stretch of a process's addresses is backed by: its ``struct vm_area_struct``, found in the maple tree.

Source: ``include/linux/maple_tree.h`` and ``lib/maple_tree.c``. A pointer to a node has the node's type in bits 3 to 6.
A node's pivots are the last index of each slot; a pivot of 0 behind the first one ends them.
"""

import struct
from dataclasses import dataclass

from offmap.attack.linux import Linux, Lost

_NODE = 0xFF  # nodes are aligned to 256 bytes
_IS_NODE = 0x04  # MAPLE_ENODE_NULL, which all pointers to nodes have; the root's has another bit, MAPLE_ROOT_NODE
_LEAF, _RANGE, _ARANGE = 1, 2, 3  # enum maple_type
_NAMES = {_LEAF: "maple_range_64", _RANGE: "maple_range_64", _ARANGE: "maple_arange_64"}
_DEEPEST = 31
_VM_PFNMAP = 1 << 10  # include/linux/mm.h
_SECRETMEM_MAGIC = 0x5345_434D  # include/uapi/linux/magic.h


@dataclass(frozen=True)
class Vma:
    """A mapping of a process's.

    Attributes:
        start, end: its addresses.
        own: its pages are a driver's (``VM_PFNMAP``) or secret memory's. Linux never takes one out of
            the page tables and keeps what it held: a page that is not there never held anything of the guest's.
        inode: address of the ``struct inode`` of the file that it maps; 0: it maps none.
    """

    start: int
    end: int
    own: bool
    inode: int


def vma_at(linux: Linux, memory: int, va: int) -> Vma | None:
    """The mapping that holds this address; None if there is none.

    Args:
        memory: address of the ``struct mm_struct``.

    Raises:
        Lost: the tree is not what it should be.
    """
    kernel = linux.kernel
    entry = linux.field(memory, "mm_struct", "mm_mt", "ma_root")
    for _ in range(_DEEPEST):
        kind = entry >> 3 & 15
        if not entry & _IS_NODE or kind not in _NAMES:
            raise Lost("the tree of the VMM's mappings is not what it should be")
        node, name = entry & ~_NODE, _NAMES[kind]
        count = kernel.elements(name, "pivot")
        pivots = struct.unpack(f"<{count}Q", linux.read(node + kernel.offset(name, "pivot"), 8 * count))
        slot = next((n for n, last in enumerate(pivots) if va <= last or (n and not last)), count)
        entry = int.from_bytes(linux.read(node + kernel.offset(name, "slot") + 8 * slot), "little")
        if kind == _LEAF:
            return _vma(linux, entry, va) if entry else None
    raise Lost("the tree of the VMM's mappings does not end")


def _vma(linux: Linux, at: int, va: int) -> Vma:
    start, end, flags, file = (
        linux.field(at, "vm_area_struct", name) for name in ("vm_start", "vm_end", "vm_flags", "vm_file")
    )
    if not start <= va < end:
        raise Lost("a mapping of the VMM's is not where its tree has it")
    own, inode = bool(flags & _VM_PFNMAP), 0
    if file:
        inode = linux.pointer_in(file, "file", "f_inode")
        block = linux.pointer_in(inode, "inode", "i_sb")
        own = own or linux.field(block, "super_block", "s_magic") == _SECRETMEM_MAGIC
    return Vma(start, end, own, inode)
