"""Files that a kernel has in its page cache: found by their path, and read page by page.

Source: ``fs/dcache.c``, ``fs/super.c``. Every file system that is mounted is on the list ``super_blocks``, and each has
the tree of those names that were looked up. A file that lies below an overlay is found in the file system that has it.
"""

from collections.abc import Iterator
from contextlib import suppress

from offmap.attack.linux import Linux, Lost
from offmap.audit import xarray
from offmap.audit.btf import Unknown
from offmap.uapi.page import PAGE_SIZE

_MOST_BLOCKS = 1 << 12
_MOST_CHILDREN = 1 << 16
_NAME = 256


def pages_of(linux: Linux, mapping: int) -> Iterator[tuple[int, int]]:
    """The pages of a ``struct address_space``: page number in the file, physical address.

    Raises:
        Unknown: they are being changed.
        Lost: they are no pages.
    """
    size = linux.kernel.size("page")
    vmemmap = int.from_bytes(linux.read(linux.symbol("vmemmap_base")), "little")
    pages = mapping + linux.kernel.offset("address_space", "i_pages")
    columns = (each.tolist() for each in xarray.entries(linux.read, linux.kernel, pages))
    for index, count, entry in zip(*columns, strict=True):
        if entry & 1:
            continue  # a value, no page: what was reclaimed or swapped out
        page, odd = divmod(entry - vmemmap, size)
        if odd or not 0 <= page < 1 << 40:
            raise Lost("the page cache has something that is no page")
        for number in range(count):
            yield index + number, (page + number) * PAGE_SIZE


def find_files(linux: Linux, path: str) -> Iterator[tuple[str, int]]:
    """All files of this path, from the root of any file system or from a folder in it: file system, ``struct inode``.

    Then those of its end alone, from the root of any file system, which may be mounted somewhere on the path.

    Raises:
        Lost: the list of file systems is none.
    """
    names = [name for name in path.split("/") if name]
    roots = []
    for block in _blocks(linux):
        if root := linux.field(block, "super_block", "s_root"):
            roots.append((linux.file_system(block), root))
    for name, root in roots:
        for start in (root, *_children(linux, root)):
            with suppress(Lost, Unknown):
                if inode := _inode(linux, start, names):
                    yield name, inode
    for first in range(1, len(names)):
        for name, root in roots:
            with suppress(Lost, Unknown):
                if inode := _inode(linux, root, names[first:]):
                    yield name, inode


def _blocks(linux: Linux) -> Iterator[int]:
    head, offset = linux.symbol("super_blocks"), linux.kernel.offset("super_block", "s_list")
    at = linux.pointer(head, "super_blocks")
    for _ in range(_MOST_BLOCKS):
        if at == head:
            return
        yield at - offset
        at = linux.pointer(at, "super_block.s_list")
    raise Lost("the list of file systems does not end")


def _children(linux: Linux, entry: int) -> Iterator[int]:
    """The names in a folder that were looked up."""
    kernel = linux.kernel
    if "dentry.d_children" in kernel.offsets:  # since 6.8
        offset, at = kernel.offset("dentry", "d_sib"), linux.field(entry, "dentry", "d_children")
        end = 0
    else:
        offset, end = kernel.offset("dentry", "d_child"), entry + kernel.offset("dentry", "d_subdirs")
        at = int.from_bytes(linux.read(end), "little")
    for _ in range(_MOST_CHILDREN):
        if at == end or not at:
            return
        yield at - offset
        at = int.from_bytes(linux.read(at), "little")
    raise Lost("a folder does not end")


def _inode(linux: Linux, entry: int, names: list[str]) -> int:
    """The inode of a path below this entry; 0 if it was not looked up."""
    for name in names:
        for child in _children(linux, entry):
            if linux.text(linux.pointer_in(child, "dentry", "d_name", "name"), _NAME) == name:
                entry = child
                break
        else:
            return 0
    return linux.field(entry, "dentry", "d_inode")
