"""BTF: structures and members are found, through unions without a name too."""

import struct

import pytest

from offmap.audit.btf import Btf, Unknown

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, CONST = 1, 2, 3, 4, 5, 6, 8, 10
FLAG = 1 << 31


class Builder:
    """Puts BTF together, type by type; ids count from 1."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = bytearray(b"\0")
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = self.strings.find(b"\0" + text.encode() + b"\0")
        if at < 0:
            at = len(self.strings) - 1
            self.strings += text.encode() + b"\0"
        return at + 1

    def add(self, name: str, kind: int, size_or_type: int, *words: int, vlen: int = 0, flag: int = 0) -> int:
        self.types += struct.pack("<III", self.name(name), kind << 24 | vlen | flag, size_or_type)
        self.types += struct.pack(f"<{len(words)}I", *words)
        self.count += 1
        return self.count

    def struct(self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT, flag: int = 0) -> int:
        words = [word for text, type_id, bits in members for word in (self.name(text), type_id, bits)]
        return self.add(name, kind, size, *words, vlen=len(members), flag=flag)

    def data(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + bytes(self.strings)


def page() -> Btf:
    """Something like struct page, and a struct with one in it."""
    build = Builder()
    long = build.add("long", INT, 8, 64)
    pointer = build.add("", PTR, long)
    build.add("", ARRAY, 0, long, long, 4)
    build.add("state", ENUM, 4, build.name("ON"), 1, vlen=1)
    inner = build.struct("", 16, ("lru", long, 0), ("mapping", pointer, 64))
    union = build.struct("", 16, ("", inner, 0), ("private", long, 0), kind=UNION)
    build.struct("page", 64, ("flags", long, 0), ("", union, 64), ("_refcount", long, 52 * 8))
    qstr = build.struct("qstr", 16, ("hash", long, 0), ("name", pointer, 64))
    alias = build.add("qstr_t", TYPEDEF, build.add("", CONST, qstr))
    build.struct("dentry", 32, ("d_flags", long, 4 << 24 | 32), ("d_name", alias, 128), flag=FLAG)
    return Btf(build.data())


def test_sizes_and_offsets() -> None:
    btf = page()
    assert btf.size("page") == 64
    assert btf.offset("page", "flags") == 0
    assert btf.offset("page", "mapping") == 16
    assert btf.offset("page", "private") == 8
    assert btf.offset("page", "_refcount") == 52
    assert btf.offset("dentry", "d_flags") == 4  # a bit-field's size is not part of its offset
    assert btf.offset("dentry", "d_name", "name") == 24


def test_asked_again() -> None:
    btf = page()
    for _ in range(2):
        assert (btf.offset("dentry", "d_name"), btf.offset("dentry", "d_name", "name")) == (16, 24)
        with pytest.raises(Unknown, match=r"d_name\.no"):
            btf.offset("dentry", "d_name", "no")


@pytest.mark.parametrize(
    "names", [("page", "nothing"), ("nothing",), ("dentry", "d_name", "no"), ("page", "flags", "x")]
)
def test_what_is_not_there(names: tuple[str, ...]) -> None:
    with pytest.raises(Unknown):
        page().offset(names[0], *names[1:])
    if len(names) == 1:
        with pytest.raises(Unknown):
            page().size(names[0])


def test_no_btf() -> None:
    with pytest.raises(Unknown):
        Btf(b"")
    with pytest.raises(Unknown):
        Btf(bytes(64))
    with pytest.raises(Unknown):
        Btf.of_host("/nonexistent/btf")
    build = Builder()
    build.add("future", 25, 0)
    with pytest.raises(Unknown, match="25"):
        Btf(build.data())
