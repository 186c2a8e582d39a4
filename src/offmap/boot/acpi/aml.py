"""ACPI Machine Language: the few terms that describe a virtual machine's devices.

Each function returns the encoding of one term, so a device reads as its ASL source would. Source: ACPI 6.4, chapter 20
(AML specification), section 19.3.4 (EISA IDs).
"""

# Opcodes, ACPI 6.4 section 20.3.
ZERO_OP, ONE_OP = b"\x00", b"\x01"
NAME_OP, SCOPE_OP = b"\x08", b"\x10"
BYTE_PREFIX, WORD_PREFIX, DWORD_PREFIX, STRING_PREFIX, QWORD_PREFIX = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
BUFFER_OP, PACKAGE_OP = b"\x11", b"\x12"
DEVICE_OP = b"\x5b\x82"
NULL_NAME, DUAL_NAME_PREFIX, MULTI_NAME_PREFIX = b"\x00", b"\x2e", b"\x2f"

LEAD_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
NAME_CHARS = LEAD_CHARS | frozenset("0123456789")


def pkg_length(content: int) -> bytes:
    """A package's length field for ``content`` bytes after it; the length counts the field itself (20.2.4)."""
    if content + 1 <= 0x3F:
        return bytes([content + 1])
    for following in (1, 2, 3):
        total = content + 1 + following
        if total < 1 << (4 + 8 * following):
            return bytes([following << 6 | total & 0xF]) + (total >> 4).to_bytes(following, "little")
    raise ValueError(f"an AML package of {content} bytes is longer than its length field can say")


def name_string(path: str) -> bytes:
    r"""A path such as ``\_SB.COM1`` or ``_CRS``; segments of fewer than four characters are padded with ``_``."""
    rest = path.lstrip("\\^")
    prefix = path[: len(path) - len(rest)]
    if "\\" in prefix and prefix != "\\":
        raise ValueError(f"{path!r} is no AML name: the root comes first and once")
    segments = rest.split(".") if rest else []
    for segment in segments:
        if not 1 <= len(segment) <= 4 or segment[0] not in LEAD_CHARS or not NAME_CHARS.issuperset(segment):
            raise ValueError(f"{segment!r} in {path!r} is no AML name segment")
    encoded = b"".join(segment.ljust(4, "_").encode("ascii") for segment in segments)
    match len(segments):
        case 0:
            body = NULL_NAME
        case 1:
            body = encoded
        case 2:
            body = DUAL_NAME_PREFIX + encoded
        case count:
            body = MULTI_NAME_PREFIX + bytes([count]) + encoded
    return prefix.encode("ascii") + body


def integer(value: int) -> bytes:
    """An unsigned integer of up to 64 bits, in its shortest form."""
    if value in (0, 1):
        return ONE_OP if value else ZERO_OP
    for prefix, size in ((BYTE_PREFIX, 1), (WORD_PREFIX, 2), (DWORD_PREFIX, 4), (QWORD_PREFIX, 8)):
        if 0 <= value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no unsigned 64-bit integer")


def string(text: str) -> bytes:
    """An ASCII string without NUL."""
    if "\0" in text:
        raise ValueError("an AML string ends at its first NUL")
    return STRING_PREFIX + text.encode("ascii") + b"\0"


def eisaid(text: str) -> bytes:
    """A Plug and Play ID such as ``PNP0501``, compressed to 32 bits (three letters, four hexadecimal digits)."""
    if len(text) != 7 or not text[:3].isupper() or not text[:3].isalpha() or not text[:3].isascii():
        raise ValueError(f"{text!r} is no EISA ID")
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    return DWORD_PREFIX + (a << 26 | b << 21 | c << 16 | int(text[3:], 16)).to_bytes(4, "big")


def _packed(opcode: bytes, content: bytes) -> bytes:
    return opcode + pkg_length(len(content)) + content


def buffer(data: bytes) -> bytes:
    """A buffer that holds ``data``."""
    return _packed(BUFFER_OP, integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """A package of at most 255 elements."""
    return _packed(PACKAGE_OP, bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``."""
    return NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) { terms }``."""
    return _packed(SCOPE_OP, name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) { terms }``."""
    return _packed(DEVICE_OP, name_string(path) + b"".join(terms))
