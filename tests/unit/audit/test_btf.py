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


def test_places_of_a_structure_inside_others_and_in_arrays() -> None:
    build = Builder()
    long = build.add("long", INT, 8, 64)
    wanted = build.struct("map", 16, ("hva", long, 0))
    two = build.add("", ARRAY, 0, wanted, long, 2)
    inner = build.struct("", 40, ("one", wanted, 64), ("two", two, 64 + 128))
    pointer = build.add("", PTR, wanted)
    build.struct("vcpu", 64, ("far", pointer, 0), ("nested", inner, 64))
    btf = Btf(build.data())
    assert btf.places("vcpu", "map") == [("nested.one", 16), ("nested.two", 32), ("nested.two", 48)]
    assert btf.elements("vcpu", "nested", "two") == 2
    with pytest.raises(Unknown, match="no array"):
        btf.elements("vcpu", "far")


def test_modules_go_on_where_the_kernel_ends_and_do_not_see_each_other() -> None:
    kernel = Builder()
    long = kernel.add("long", INT, 8, 64)
    modules = []
    for name in ("kvm", "vcpu_svm"):
        module = Builder()
        module.strings = bytearray()  # numbered on from the kernel's
        first = len(kernel.strings)
        at = len(module.strings) + first
        module.strings += name.encode() + b"\0x\0"
        types = struct.pack("<III", at, STRUCT << 24 | 1, 8) + struct.pack("<III", at + len(name) + 1, long, 0)
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(module.strings))
        modules.append(header + types + bytes(module.strings))
    base = Btf(kernel.data())
    one, other = (base.with_module(module) for module in modules)
    assert (one.size("kvm"), other.offset("vcpu_svm", "x")) == (8, 0)
    for btf, name in ((one, "vcpu_svm"), (other, "kvm"), (base, "kvm")):
        with pytest.raises(Unknown):
            btf.size(name)
