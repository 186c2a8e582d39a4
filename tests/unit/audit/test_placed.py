"""What a page is: by its flags, and by the kernel's own structures, which are laid out here as BTF describes them."""

import struct
from pathlib import Path

import numpy as np
import pytest

from offmap.audit.btf import Btf
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.pageflags import (
    KPF_ANON,
    KPF_BUDDY,
    KPF_COMPOUND_TAIL,
    KPF_HUGE,
    KPF_LRU,
    KPF_MMAP,
    KPF_PGTABLE,
    KPF_RESERVED,
    KPF_SLAB,
    KPF_UPTODATE,
    PageFlags,
)
from offmap.audit.placed import head_and_flags, sort_of
from offmap.audit.regions import DIRECT_MAP, VMEMMAP, Layout
from offmap.audit.scan_result import Owner, Sort
from offmap.errors import Undetermined
from offmap.report.typed import Address

from .test_btf import INT, PTR, Builder

PAGE = 4096
BASE = 0xFFFF_8880_0000_0000
VMEMMAP_BASE = 0xFFFF_EA00_0000_0000
LAYOUT = Layout(
    [(BASE, BASE + (1 << 40), DIRECT_MAP), (VMEMMAP_BASE, VMEMMAP_BASE + (1 << 40), VMEMMAP)],
)


@pytest.mark.parametrize(
    ("bits", "sort"),
    [
        ([KPF_BUDDY], Sort.FREE),
        ([KPF_SLAB], Sort.SLAB),
        ([KPF_PGTABLE], Sort.PAGE_TABLE),
        ([KPF_ANON, KPF_MMAP, KPF_LRU], Sort.PROCESS),
        ([KPF_LRU, KPF_UPTODATE], Sort.PAGE_CACHE),
        ([KPF_HUGE], Sort.PAGE_CACHE),
        ([KPF_HUGE, KPF_ANON], Sort.PROCESS),
        ([KPF_RESERVED], Sort.RESERVED),
        ([KPF_UPTODATE], None),
        ([], None),
    ],
)
def test_flags_say_what_a_page_is(bits: list[int], sort: Sort | None) -> None:
    assert sort_of(sum(1 << bit for bit in bits)) is sort


def test_a_folios_first_page_speaks_for_the_rest(tmp_path: Path) -> None:
    flags = np.zeros(2048, dtype="<u8")
    flags[512] = 1 << KPF_SLAB
    flags[513:1024] = 1 << KPF_COMPOUND_TAIL
    (tmp_path / "kpageflags").write_bytes(flags.tobytes())
    with PageFlags(str(tmp_path / "kpageflags")) as file:
        assert head_and_flags(file, 1023) == (512, 1 << KPF_SLAB)
        assert head_and_flags(file, 513) == (512, 1 << KPF_SLAB)
        assert head_and_flags(file, 512) == (512, 1 << KPF_SLAB)
        assert head_and_flags(file, 511) == (511, 0)


def test_an_owner_speaks_of_the_byte_not_the_page() -> None:
    owner = Owner(Sort.PAGE_CACHE, "/etc/key (ext4)", 0x3000).at(77)
    assert owner.file_offset == 0x304D
    guest = Owner(Sort.GUEST, guest_phys_addr=Address(0x1000), userspace_addr=Address(0x7000)).at(1)
    assert (guest.guest_phys_addr, guest.userspace_addr, guest.file_offset) == (0x1001, 0x7001, None)


class Memory:
    """Kernel memory that is written word by word; what was not written cannot be read."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def put(self, va: int, data: bytes) -> None:
        self.bytes.update((va + index, byte) for index, byte in enumerate(data))

    def word(self, va: int, value: int, size: int = 8) -> None:
        self.put(va, value.to_bytes(size, "little"))

    def read_virtual(self, va: int, buffer: memoryview) -> None:
        if va not in self.bytes:
            raise Undetermined(f"nothing at {va:#x}")
        buffer[:] = bytes(self.bytes.get(va + index, 0) for index in range(len(buffer)))


def btf(named_union: bool) -> Btf:
    """The structures on the way from a page to its file, with members in places of their own."""
    build = Builder()
    long = build.add("long", INT, 8, 64)
    word = build.add("int", INT, 4, 32)
    build.struct("page", 64, ("flags", long, 0), ("_refcount", word, 52 * 8))
    build.struct("folio", 64, ("mapping", long, 24 * 8), ("index", long, 32 * 8))
    build.struct("slab", 64, ("slab_cache", long, 8 * 8))
    build.struct("kmem_cache", 128, ("name", long, 96 * 8))
    build.struct("address_space", 64, ("host", long, 0))
    build.struct(
        "inode",
        256,
        ("i_sb", long, 40 * 8),
        ("i_mapping", long, 48 * 8),
        ("i_ino", long, 64 * 8),
        ("i_dentry", long, 128 * 8),
    )
    build.struct("super_block", 64, ("s_dev", word, 16 * 8), ("s_type", long, 40 * 8))
    build.struct("file_system_type", 16, ("name", long, 0))
    qstr = build.struct("qstr", 16, ("hash", long, 0), ("name", long, 64))
    union = build.struct("", 16, ("d_alias", long, 0), kind=5)
    members = [("d_parent", long, 24 * 8), ("d_name", qstr, 32 * 8), ("d_u" if named_union else "", union, 176 * 8)]
    build.struct("dentry", 200, *members)
    assert build.add("", PTR, long)
    return Btf(build.data())


def kernel(memory: Memory, named_union: bool = True) -> KernelObjects:
    return KernelObjects(memory, LAYOUT, btf(named_union))  # type: ignore[arg-type]


def cached_file(memory: Memory, frame: int, names: list[str]) -> int:
    """Lay out a page of a file; gives the address of its inode."""
    page, mapping, inode, block, kind = (
        VMEMMAP_BASE + 64 * frame,
        BASE + 0x1000,
        BASE + 0x2000,
        BASE + 0x3000,
        BASE + 0x4000,
    )
    memory.put(page, bytes(64))
    memory.word(page + 24, mapping)
    memory.word(page + 32, 3)
    memory.word(mapping, inode)
    memory.put(inode, bytes(256))
    memory.word(inode + 40, block)
    memory.word(inode + 48, mapping)
    memory.word(inode + 64, 4711)
    memory.put(block, bytes(64))
    memory.word(block + 16, 0xFFE << 20 | 9, 4)
    memory.word(block + 40, kind)
    memory.word(kind, kind + 64)
    memory.put(kind + 64, b"ext4\0")
    dentry = BASE + 0x10000
    memory.word(inode + 128, dentry + 176)
    for name in [*reversed(names), "/"]:
        parent = dentry if name == "/" else dentry + 0x1000
        memory.word(dentry + 24, parent)
        memory.word(dentry + 40, dentry + 0x200)
        memory.put(dentry + 0x200, name.encode() + b"\0")
        dentry = parent
    return inode


@pytest.mark.parametrize("named_union", [True, False])
def test_the_file_of_a_page_is_named(named_union: bool) -> None:
    memory = Memory()
    cached_file(memory, 7, ["etc", "secret key"])
    found = kernel(memory, named_union).file_of(7, 9)
    assert found is not None
    # Not mounted here, so it is named within its file system; the third page of the folio that starts at index 3.
    assert (found.path, found.offset, found.device, found.inode) == ("/etc/secret key", 5 * PAGE, (0xFFE, 9), 4711)
    assert found.file_system == "ext4"


def test_what_does_not_add_up_is_no_file() -> None:
    memory = Memory()
    inode = cached_file(memory, 7, ["x"])
    assert kernel(memory).file_of(8, 8) is None  # no such page
    memory.word(VMEMMAP_BASE + 7 * 64 + 24, BASE + 0x1001)
    assert kernel(memory).file_of(7, 7) is None  # anonymous memory
    memory.word(VMEMMAP_BASE + 7 * 64 + 24, 0x1000)
    assert kernel(memory).file_of(7, 7) is None  # not a kernel address
    memory.word(VMEMMAP_BASE + 7 * 64 + 24, BASE + 0x1000)
    memory.word(inode + 48, BASE + 0x5000)
    assert kernel(memory).file_of(7, 7) is None  # an inode that does not know of it


def test_folders_that_never_end() -> None:
    memory = Memory()
    cached_file(memory, 7, ["loop"])
    memory.word(BASE + 0x11000 + 24, BASE + 0x10000)  # the root's parent is the file
    found = kernel(memory).file_of(7, 7)
    assert found is not None and found.path == "inode 4711"


def test_slab_and_reference_count() -> None:
    memory = Memory()
    page = VMEMMAP_BASE + 64 * 20
    memory.put(page, bytes(64))
    memory.word(page + 8, BASE + 0x8000)
    memory.word(BASE + 0x8000 + 96, BASE + 0x9000)
    memory.put(BASE + 0x9000, b"kmalloc-128\0")
    objects = kernel(memory)
    assert objects.slab_of(20) == "kmalloc-128" and objects.slab_of(21) == ""
    assert objects.unused(20)
    memory.put(page + 52, struct.pack("<I", 1))
    assert not objects.unused(20) and not objects.unused(21)
