"""The symbols of a kernel image: the tables that /proc/kallsyms is made of, found in the file.

A distribution's image has no symbol table. But the kernel carries its own (``scripts/kallsyms.c``): names packed with
256 tokens, a marker for each 256th name, and an offset for each address. Nothing says where they are, and their order
differs from release to release. So each is found by its content: the token table by the tokens of the digits and by the
index behind it, the names by their number in front of them and the markers behind them. What is found is believed only
if it fits to the byte.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from offmap.audit.btf import Unknown

_DIGITS = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00"  # their tokens stand for themselves
_TOKENS = 256
_EVERY = 256  # names to a marker
_FEWEST, _MOST = 10_000, 2_000_000  # symbols
_IMAGE = (1 << 64) - (2 << 30)  # where the kernel image can be linked to: the last two GiB


@dataclass(frozen=True)
class _Names:
    """Packed names: where the first is, how many there are, and where the markers end."""

    first: int
    count: int
    end: int


def read_symbols(rodata: bytes, va: int, wanted: frozenset[str]) -> dict[str, int]:
    """Link-time addresses of those of the wanted symbols that the image has.

    Args:
        rodata: the section that has the tables.
        va: its link-time address.

    Raises:
        Unknown: there are no such tables.
    """
    names = _find_names(rodata)
    found = _find_tokens(rodata)
    if names is None or found is None:
        raise Unknown("the kernel image has no table of symbols (CONFIG_KALLSYMS)")
    tokens, after = found
    numbers = dict(_numbers(rodata, names, tokens, wanted | {"_text"}))
    for decode in _addressings(rodata, va, names, after):
        start = decode(numbers["_text"]) if "_text" in numbers else 0
        # _text is where the image begins: CONFIG_PHYSICAL_START, aligned to CONFIG_PHYSICAL_ALIGN (at least 2 MiB).
        if start >= _IMAGE and not start % (2 << 20):
            return {name: address for name, number in numbers.items() if (address := decode(number))}
    raise Unknown("the kernel image has symbols, but their addresses are not where they are known to be")


def _aligned(at: int, to: int) -> int:
    return at + -at % to


def _find_names(image: bytes) -> _Names | None:
    words = np.frombuffer(image, dtype="<u4", count=len(image) // 4)
    for at in (np.flatnonzero((words > _FEWEST) & (words < _MOST)) * 4).tolist():
        count = int.from_bytes(image[at : at + 4], "little")
        for first in {_aligned(at + 4, 4), _aligned(at + 4, 8)}:
            end = _end_of_names(image, first, count)
            if end is not None:
                return _Names(first, count, end)
    return None


def _end_of_names(image: bytes, first: int, count: int) -> int | None:
    """Where the markers end, if there are so many names and their markers behind them."""
    at, marks = first, []
    for number in range(count):
        if number % _EVERY == 0:
            marks.append(at - first)
        following = _following(image, at)
        if following is None:
            return None
        at = following
    expected = struct.pack(f"<{len(marks)}I", *marks)
    for to in (4, 8):
        start = _aligned(at, to)
        if image[start : start + len(expected)] == expected:
            return start + len(expected)
    return None


def _following(image: bytes, at: int) -> int | None:
    """Where the name after this one is; None if this is none."""
    if at + 2 > len(image):
        return None
    length = image[at]
    if length & 0x80:
        length = length & 0x7F | image[at + 1] << 7
        at += 1
    return at + 1 + length if length else None


def _find_tokens(image: bytes) -> tuple[list[bytes], int] | None:
    """The tokens, and where their index ends."""
    digits = -1
    while (digits := image.find(_DIGITS, digits + 1)) >= 0:
        # 48 tokens come before that of "0". What comes before the first is padding or another table.
        ends = [at for at in range(max(digits - 2048, 0), digits) if not image[at]][-48:]
        if len(ends) < 48:
            continue
        for start in range(ends[0] - 1, max(ends[0] - 64, 0), -1):
            if start % 4:
                continue
            tokens, index, at = [], [], start
            for _ in range(_TOKENS):
                end = image.find(b"\0", at, at + 64)
                if end < 0:
                    break
                tokens.append(image[at:end])
                index.append(at - start)
                at = end + 1
            if len(index) < _TOKENS:
                continue
            expected = struct.pack(f"<{_TOKENS}H", *index)
            for to in (4, 8):
                behind = _aligned(at, to)
                if image[behind : behind + len(expected)] == expected:
                    return tokens, behind + len(expected)
    return None


def _numbers(image: bytes, names: _Names, tokens: list[bytes], wanted: frozenset[str]) -> Iterator[tuple[str, int]]:
    """The number of each wanted symbol."""
    packed = {name.encode() for name in wanted}
    at = names.first
    for number in range(names.count):
        following = _following(image, at)
        if following is None:
            return
        length = image[at] & 0x7F | image[at + 1] << 7 if image[at] & 0x80 else image[at]
        name = b"".join([tokens[each] for each in image[following - length : following]])[1:]  # after the type
        if name in packed:
            packed.discard(name)
            yield name.decode(), number
        at = following


class _Addressing:
    """What the offsets that begin there are relative to.

    Args:
        base: an address; None where each is relative to its own place (since 7.0).
    """

    def __init__(self, image: bytes, va: int, names: _Names, at: int, base: int | None) -> None:
        self._va, self._at, self._base = va, at, base
        self._offsets = np.frombuffer(image, dtype="<i4", count=names.count, offset=at)
        # CONFIG_KALLSYMS_ABSOLUTE_PERCPU: offsets count backwards, and what is not negative is a per-CPU address.
        self._backwards = base is not None and bool((self._offsets < 0).any())

    def __call__(self, number: int) -> int:
        """The address of a symbol; 0 if it is none in the kernel image."""
        offset = int(self._offsets[number])
        if self._base is None:
            address = self._va + self._at + 4 * number + offset
        elif self._backwards:
            address = self._base - 1 - offset if offset < 0 else 0
        else:
            address = self._base + (offset & 0xFFFF_FFFF)
        return address if _IMAGE <= address < 1 << 64 else 0


def _addressings(image: bytes, va: int, names: _Names, after: int) -> Iterator[_Addressing]:
    size = 4 * names.count
    for to in (4, 8):
        start = _aligned(after, to)
        if start + size + 16 > len(image):
            continue
        # Since 6.4 behind the tokens, and until 7.0 followed by what they are relative to.
        for base_at in {_aligned(start + size, 4), _aligned(start + size, 8)}:
            base = int.from_bytes(image[base_at : base_at + 8], "little")
            if base >= _IMAGE:
                yield _Addressing(image, va, names, start, base)
        yield _Addressing(image, va, names, start, None)
    # Before, in front of the number of symbols.
    base_at = names.first - 16
    base, start = int.from_bytes(image[base_at : base_at + 8], "little"), base_at - _aligned(size, 8)
    if base >= _IMAGE and start >= 0:
        yield _Addressing(image, va, names, start, base)
