"""Files are found by their path, whatever is mounted on it."""

import msgspec
import pytest

from offmap.attack.linux import Linux
from offmap.attack.page_cache import find_files
from offmap.report.typed import Address

from .machine import DIRECT_MAP, KNOWN, TEXT

BLOCKS = TEXT + 0x4000
MORE = {
    "super_block.s_list": 0x30,
    "super_block.s_root": 0x28,
    "dentry.d_children": 0x10,
    "dentry.d_sib": 0x18,
    "dentry.d_inode": 0x20,
}
KERNEL = msgspec.structs.replace(
    KNOWN,
    symbols={**KNOWN.symbols, "super_blocks": Address(BLOCKS)},
    offsets={**KNOWN.offsets, **MORE},
)
Folder = dict[str, "Folder | int"]


class Files(Linux):
    """A kernel's list of file systems. A name leads to a folder, or to the address of an inode."""

    def __init__(self, systems: dict[str, Folder]) -> None:
        super().__init__(KERNEL)
        self._memory = bytearray(0x1_0000)
        self._next, before = 0x100, BLOCKS
        for kind, root in systems.items():
            block, of_kind = self._new(), self._new()
            self._set(of_kind, "file_system_type", "name", self._text(kind))
            self._set(block, "super_block", "s_type", of_kind)
            self._set(block, "super_block", "s_root", self._entry("/", root))
            self._put(before, block + MORE["super_block.s_list"])
            before = block + MORE["super_block.s_list"]
        self._put(before, BLOCKS)

    def _new(self) -> int:
        self._next += 0x80
        return DIRECT_MAP + self._next

    def _text(self, words: str) -> int:
        at = self._new()
        start = at - DIRECT_MAP
        self._memory[start : start + len(words)] = words.encode()
        return at

    def _put(self, va: int, value: int) -> None:
        at = va - (DIRECT_MAP if va < TEXT else BLOCKS)
        self._memory[at : at + 8] = value.to_bytes(8, "little")

    def _set(self, base: int, name: str, member: str, value: int) -> None:
        self._put(base + KERNEL.offset(name, *member.split(".")), value)

    def _entry(self, name: str, content: "Folder | int") -> int:
        entry = self._new()
        self._set(entry, "dentry", "d_name.name", self._text(name))
        if isinstance(content, int):
            self._set(entry, "dentry", "d_inode", content)
            return entry
        following = 0
        for below, what in content.items():
            child = self._entry(below, what)
            self._set(child, "dentry", "d_sib", following)
            following = child + MORE["dentry.d_sib"]
        self._set(entry, "dentry", "d_children", following)
        return entry

    def read(self, va: int, size: int = 8) -> bytes:
        at = va - (DIRECT_MAP if va < TEXT else BLOCKS)
        return bytes(self._memory[at : at + size])

    def physical(self, pa: int, size: int = 8) -> bytes:
        raise AssertionError


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/etc/ssh/key", [("ext4", 1), ("overlay", 2)]),
        ("/etc/passwd", [("tmpfs", 3)]),  # below an overlay, whose upper folder is one in a tmpfs
        ("/srv/data/secret", [("xfs", 4)]),  # on what is mounted at /srv/data
        ("/srv/data/in/secret", [("xfs", 5), ("xfs", 4)]),
        ("/data/in/secret", [("xfs", 5), ("xfs", 4)]),
        ("/none", []),
        ("/etc", []),
    ],
)
def test_files(path: str, found: list[tuple[str, int]]) -> None:
    files = Files(
        {
            "proc": {},
            "ext4": {"usr": {}, "etc": {"hosts": 9, "ssh": {"other": 8, "key": 1}}},
            "overlay": {"etc": {"ssh": {"key": 2}}},
            "tmpfs": {"upper": {"etc": {"passwd": 3}}},
            "xfs": {"secret": 4, "in": {"secret": 5}},
        }
    )
    assert list(find_files(files, path)) == found
