"""BTF: the running kernel's own description of its structures (Documentation/bpf/btf.rst), /sys/kernel/btf/vmlinux.

Only what it takes to read a few fields of a few structures: sizes, and offsets of members, through members without a
name too (the unions that ``struct page`` is made of).
"""

import struct
from array import array
from collections.abc import Iterable
from functools import lru_cache
from typing import Self

import numpy as np

from offmap.audit.procfs import read_sysfs

PATH = "/sys/kernel/btf/vmlinux"
_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")  # struct btf_header
_KIND_ARRAY, _KIND_STRUCT, _KIND_UNION = 3, 4, 5
_KIND_FLAG = 1 << 31
# include/uapi/linux/btf.h: 32-bit words of a type by its kind, struct btf_type's three and what follows it: fixed ones,
# and those for each of vlen. A kind that does not exist has none.
_FIXED = np.array([0, 4, 3, 6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3, 4, 3, 3, *[0] * 12], dtype=np.uint32)
_EACH = np.array([0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3, *[0] * 12], dtype=np.uint32)
_MODIFIERS = {8, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag


class Unknown(LookupError):
    """This kernel has no such structure or member, or no BTF at all."""


class Btf:
    """Parsed BTF; structures are found by their names.

    Args:
        data: the content of the file, little-endian.
        module: that of a kernel module's, whose types and strings are numbered on from the kernel's.

    Raises:
        Unknown: it is no BTF, or has types of a kind that is newer than this parser.
    """

    def __init__(self, data: bytes, module: bytes = b"") -> None:
        self._words, self._strings, self._at = array("I"), b"", array("I", [0])  # type 0 is void
        # Asked for again at each field of each task, and searched for among some 130,000 types.
        self._structs: dict[str, int] = {}
        self._offsets: dict[tuple[str, ...], int] = {}
        for part in (data, module) if module else (data,):
            self._add(part)

    def with_module(self, module: bytes) -> "Btf":
        """These types with those of one more module, which do not see each other's. Raises Unknown: it is no BTF."""
        more = Btf.__new__(Btf)
        more._words, more._strings, more._at = self._words[:], self._strings, self._at[:]
        more._structs, more._offsets = {}, {}
        more._add(module)
        return more

    def _add(self, part: bytes) -> None:
        if len(part) < _HEADER.size:
            raise Unknown("no BTF")
        magic, version, _, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(part)
        if magic != _MAGIC or version != 1:
            raise Unknown("no BTF of version 1")
        first = len(self._words)
        self._words += array("I", part[header + type_off : header + type_off + (type_len & -4)])
        self._strings += part[header + str_off : header + str_off + str_len]
        self._index(first)

    @classmethod
    def of_host(cls, path: str = PATH) -> Self:
        """The running kernel's. Raises Unknown: it has none (CONFIG_DEBUG_INFO_BTF is not set)."""
        try:
            return cls(read_sysfs(path))
        except OSError as error:
            raise Unknown(f"cannot read {path}: {error.strerror}") from None

    def _index(self, first: int) -> None:
        """Note where each type is, from this word on."""
        # How long a type would be that has its second word here, for every word at once: there are a million, and what
        # is left to do for each type is an addition.
        info = np.asarray(self._words[first:], dtype=np.uint32)
        kind = info >> 24 & 31
        lengths = (_FIXED[kind] + _EACH[kind] * (info & 0xFFFF)).data
        found: list[int] = []
        at, end = 0, len(lengths)
        note = found.append
        while at < end:
            note(at + first)
            if not (length := lengths[at + 1]):
                raise Unknown(f"BTF has a type of unknown kind {int(kind[at + 1])}")
            at += length
        self._at.extend(found)

    def _struct(self, name: str) -> int:
        if name in self._structs:
            return self._structs[name]
        start = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        words, at = np.asarray(self._words), np.asarray(self._at)
        for found in at[words[at] == start].tolist() if start else ():
            if self._kind(found) == _KIND_STRUCT:
                self._structs[name] = found
                return int(found)
        raise Unknown(f"no struct {name}")

    def _kind(self, at: int) -> int:
        return self._words[at + 1] >> 24 & 31

    def size(self, name: str) -> int:
        """Bytes of a structure."""
        return self._words[self._struct(name) + 2]

    def offset(self, name: str, *members: str) -> int:
        """Byte offset of a member of ``struct name``; several names lead into nested structures.

        Raises:
            Unknown: no such member.
        """
        known = self._offsets.get((name, *members))
        if known is None:
            known = self._offsets[name, *members] = self._find(name, members)[0]
        return known

    def elements(self, name: str, *members: str) -> int:
        """How many elements a member has that is an array. Raises Unknown: no such member, or it is no array."""
        at = self._find(name, members)[1]
        if self._kind(at) != _KIND_ARRAY:
            raise Unknown(f"member {'.'.join(members)} of struct {name} is no array")
        return self._words[at + 5]

    def places(self, name: str, wanted: str) -> list[tuple[str, int]]:
        """Every ``struct WANTED`` that lies inside ``struct name``: the path to it, and its byte offset."""
        found: list[tuple[str, int]] = []
        self._search(self._struct(name), wanted.encode(), "", 0, found)
        return found

    def _search(self, at: int, wanted: bytes, path: str, base: int, found: list[tuple[str, int]]) -> None:
        for member, type_id, bits in self._members(at):
            inner, times, step = self._at[self._resolve(type_id)], 1, 0
            text = self._text(member).decode("ascii", "replace")
            where = f"{path}.{text}".strip(".")
            if self._kind(inner) == _KIND_ARRAY:
                times, inner = self._words[inner + 5], self._at[self._resolve(self._words[inner + 3])]
                step = self._words[inner + 2]
            if self._kind(inner) not in {_KIND_STRUCT, _KIND_UNION}:
                continue
            for index in range(times):
                here = base + bits // 8 + index * step
                if self._kind(inner) == _KIND_STRUCT and self._text(self._words[inner]) == wanted:
                    found.append((where, here))
                else:
                    self._search(inner, wanted, where, here, found)

    def _find(self, name: str, members: tuple[str, ...]) -> tuple[int, int]:
        """(byte offset, place of its type) of a member."""
        at, total = self._struct(name), 0
        for member in members:
            found = self._member(at, member.encode())
            if found is None:
                raise Unknown(f"struct {name} has no member {'.'.join(members)}")
            total += found[0]
            at = self._at[self._resolve(found[1])]
        return total, at

    def _text(self, at: int) -> bytes:
        return self._strings[at : self._strings.index(b"\0", at)]

    def _member(self, at: int, name: bytes) -> tuple[int, int] | None:
        """(byte offset, type) of a member of the structure there, looking into those without a name."""
        for member, type_id, bits in self._members(at):
            text = self._text(member)
            if text == name:
                return bits // 8, type_id
            if not text:
                inner = self._at[self._resolve(type_id)]
                found = self._member(inner, name)
                if found is not None:
                    return bits // 8 + found[0], found[1]
        return None

    def _members(self, at: int) -> Iterable[tuple[int, int, int]]:
        """(name, type, offset in bits) of each member; none where it is no structure."""
        info = self._words[at + 1]
        if self._kind(at) not in {_KIND_STRUCT, _KIND_UNION}:
            return
        for index in range(at + 3, at + 3 + 3 * (info & 0xFFFF), 3):
            name, type_id, offset = self._words[index : index + 3]
            yield name, type_id, offset & 0xFF_FFFF if info & _KIND_FLAG else offset

    def _resolve(self, type_id: int) -> int:
        """Past typedefs and qualifiers."""
        while type_id and self._kind(self._at[type_id]) in _MODIFIERS:
            type_id = self._words[self._at[type_id] + 2]
        return type_id


@lru_cache(maxsize=1)
def host_types() -> Btf:
    """`Btf.of_host`, read once: there are some 130,000 types, and they stay while the kernel runs. Raises as that."""
    return Btf.of_host()
