"""Canaries: secrets that are planted in a guest's RAM and searched for in the kernel's.

A canary is the text PREFIX ID ``:`` NONCE ``:`` CHECK. ID is 4 and NONCE 32 lower-case hex digits; CHECK is the SHA-256
of the text ``KEY:ID:NONCE``, in hex. KEY is 32 hex digits, fresh for each run, and never part of a canary. So the
searcher holds only the prefix, canaries of earlier runs do not count, and a guest can make canaries with a shell and
``sha256sum``. The longer the prefix, the more bytes a search skips. No two neighbours in it have the hash of two zeroes
in glibc's memmem (``hash2`` in string/memmem.c), or the search would skip less of zeroes, of which free memory is full.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import NewType

from offmap.errors import OffmapError

CanaryKey = NewType("CanaryKey", str)

PREFIX = b"OFFMAPCANARY2: put here by offmap, to see where else it is seen:"
CANARY_LENGTH = len(PREFIX) + 4 + 1 + 32 + 1 + 64
_FORM = re.compile(PREFIX + rb"([0-9a-f]{4}):([0-9a-f]{32}):([0-9a-f]{64})")


@dataclass(frozen=True)
class Canary:
    """A valid canary that was found; the number and nonce tell it from others."""

    number: int
    nonce: str


def new_key() -> CanaryKey:
    """A fresh random key."""
    return CanaryKey(secrets.token_hex(16))


def parse_key(text: str) -> CanaryKey:
    """Check a key that a user gave. Raises OffmapError: not 32 hex digits."""
    key = text.lower()
    if not re.fullmatch("[0-9a-f]{32}", key):
        raise OffmapError(f"{text!r} is not a canary key", "give the 32 hex digits that the canaries were made with")
    return CanaryKey(key)


def _check(key: CanaryKey, number: str, nonce: str) -> str:
    return hashlib.sha256(f"{key}:{number}:{nonce}".encode("ascii")).hexdigest()


def make_canary(key: CanaryKey, number: int) -> bytes:
    """A new canary of CANARY_LENGTH bytes.

    Args:
        key: the run's key.
        number: 0 to 65535, to be told apart by.
    """
    if not 0 <= number <= 0xFFFF:
        raise ValueError(f"canary number {number} does not fit 4 hex digits")
    text, nonce = f"{number:04x}", secrets.token_hex(16)
    return PREFIX + f"{text}:{nonce}:{_check(key, text, nonce)}".encode("ascii")


def parse_canary(data: bytes | bytearray | memoryview, key: CanaryKey) -> Canary | None:
    """The canary that ``data`` starts with, or None if it is none of this key's."""
    match = _FORM.match(data)
    if match is None:
        return None
    number, nonce, check = (part.decode("ascii") for part in match.groups())
    return Canary(int(number, 16), nonce) if _check(key, number, nonce) == check else None
