"""The symbol tables of a kernel image, in each order that kernels have had them in, and nothing made up."""

import struct

import pytest

from offmap.attack.kallsyms import read_symbols
from offmap.audit.btf import Unknown

VA = 0xFFFF_FFFF_8200_0000
TEXT = 0xFFFF_FFFF_8100_0000
COUNT = 20_000
WANTED = frozenset({"_text", "init_task", "long" + "g" * 200, "missing"})
TOKENS = [bytes([at]) if 33 <= at < 127 else b"<%02x>" % at for at in range(256)]


def names() -> list[tuple[bytes, int]]:
    """Names with their types, and addresses."""
    found = [(b"T_text", TEXT), (b"Tlong" + b"g" * 200, TEXT + 0x40)]
    found += [(b"tfunction_%d" % at, TEXT + 0x100 + 16 * at) for at in range(COUNT - 4)]
    return [*found, (b"Dinit_task", TEXT + 0x100_0000), (b"Tlast", TEXT + 0x100_0100)]


def image(order: str, align: int = 8, gap: int = 0) -> bytes:
    """A section with the tables, among other things."""
    symbols = names()
    packed, marks = b"", []
    for at, (name, _) in enumerate(symbols):
        if at % 256 == 0:
            marks.append(len(packed))
        length = len(name)
        packed += (bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])) + name
    # Older kernels count backwards (CONFIG_KALLSYMS_ABSOLUTE_PERCPU).
    offsets = [TEXT - 1 - address if order == "before" else address - TEXT for _, address in symbols]
    out = bytearray(b"\x01\x02\x03\x04" * 1000)

    def add(data: bytes, to: int = align) -> int:
        out.extend(bytes(-len(out) % to))
        out.extend(data)
        return len(out) - len(data)

    if order == "before":
        add(struct.pack(f"<{len(offsets)}i", *offsets), 8)
        add(struct.pack("<Q", TEXT), 8)
    add(struct.pack("<I", len(symbols)))
    add(packed)
    add(struct.pack(f"<{len(marks)}I", *marks))
    add(b"\x07\x08\x09" * gap)
    index, text = [], b""
    for token in TOKENS:
        index.append(len(text))
        text += token + b"\0"
    add(text)
    add(struct.pack("<256H", *index))
    if order == "after":
        add(struct.pack(f"<{len(offsets)}i", *offsets))
        add(struct.pack("<Q", TEXT), 8)
    if order == "relative":
        at = len(out) + -len(out) % align
        add(struct.pack(f"<{len(symbols)}i", *(a - (VA + at + 4 * n) for n, (_, a) in enumerate(symbols))))
    out.extend(b"\xff\xee" * 100)
    return bytes(out)


@pytest.mark.parametrize(
    ("order", "align", "gap"), [("after", 8, 0), ("before", 8, 0), ("before", 8, 5000), ("relative", 4, 0)]
)
def test_symbols_are_found_in_every_order(order: str, align: int, gap: int) -> None:
    assert read_symbols(image(order, align, gap), VA, WANTED) == {
        "_text": TEXT,
        "init_task": TEXT + 0x100_0000,
        "long" + "g" * 200: TEXT + 0x40,
    }


def test_no_tables_are_no_symbols() -> None:
    for data in (b"", b"\0" * 100_000, bytes(range(256)) * 400, image("after")[:50_000]):
        with pytest.raises(Unknown, match="no table of symbols"):
            read_symbols(data, VA, WANTED)


def test_offsets_that_lead_elsewhere_are_no_symbols() -> None:
    data = bytearray(image("relative", 4))
    start = data.index(struct.pack("<i", TEXT - (VA + len(data) - 200 - 4 * COUNT)))
    data[start : start + 4] = bytes(4)
    with pytest.raises(Unknown, match="not where they are known to be"):
        read_symbols(bytes(data), VA, WANTED)
