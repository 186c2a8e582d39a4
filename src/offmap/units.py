"""Sizes as people write them: ``256M``, ``2G``, ``0x60000000``, as the kernel's memparse() reads them."""

from offmap.errors import OffmapError

_SUFFIXES = "KMGTPE"
_BYTES = ("", "B", "b", "iB", "ib")
_DECIMAL = "0123456789"
_HEXADECIMAL = _DECIMAL + "abcdefABCDEF"


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` names. Raises OffmapError: not a size."""
    written = text.strip()
    # No more digits than 64 bits can have.
    start, digits, most = (2, _HEXADECIMAL, 16) if written[:2] in ("0x", "0X") else (0, _DECIMAL, 20)
    end = start
    while end < min(len(written), start + most) and written[end] in digits:
        end += 1
    number, unit = written[:end], written[end:]
    power = (_SUFFIXES.find(unit[0].upper()) + 1) if unit else 0
    # No leading zeros: memparse() takes them for octal, and people for nothing.
    if end == start or (not start and end > 1 and number[0] == "0") or unit[power > 0 :] not in _BYTES:
        raise OffmapError(f"{text!r} is not a size", "write a number of bytes, or one with K, M or G, like 256M")
    return int(number, 0) << 10 * power


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
