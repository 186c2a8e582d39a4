"""Sizes as people write them: ``256M``, ``2G``, ``0x60000000``, as the kernel's memparse() reads them."""

import re

from offmap.errors import OffmapError

_SUFFIXES = "KMGTPE"
# No leading zeros: memparse() takes them for octal, and people for nothing. No more digits than 64 bits can have.
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19})([KMGTPEkmgtpe]?)(?:i?[Bb])?")


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` names. Raises OffmapError: not a size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OffmapError(f"{text!r} is not a size", "write a number of bytes, or one with K, M or G, like 256M")
    number, suffix = match.groups()
    return int(number, 0) << (10 * (_SUFFIXES.index(suffix.upper()) + 1) if suffix else 0)


def format_size(size: int) -> str:
    """`size` bytes for people: the largest binary unit that loses nothing, else one decimal."""
    for power in range(len(_SUFFIXES), 0, -1):
        unit = 1 << 10 * power
        if size >= unit:
            return f"{size // unit if size % unit == 0 else round(size / unit, 1)} {_SUFFIXES[power - 1]}iB"
    return f"{size} B"


def printable(text: str) -> str:
    """`text` of unknown origin, made safe for a terminal or a log: ``?`` stands for each character with an effect."""
    return "".join(c if c.isprintable() else "?" for c in text)
