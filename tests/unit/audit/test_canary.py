"""Canaries: their form, and that a shell can make them."""

import subprocess
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.canary import CANARY_LENGTH, PREFIX, make_canary, new_key, parse_canary, parse_key
from offmap.errors import OffmapError


@given(st.integers(0, 0xFFFF))
def test_made_canary_is_valid_under_its_key_only(number: int) -> None:
    key = new_key()
    canary = make_canary(key, number)
    assert len(canary) == CANARY_LENGTH
    found = parse_canary(canary + b"rest", key)
    assert found is not None and found.number == number
    assert parse_canary(canary, new_key()) is None


def test_a_search_for_the_prefix_skips_all_it_can_of_zeroes() -> None:
    def hashed(first: int, second: int) -> int:
        return (second - (first << 3)) % 256  # glibc 2.36, string/memmem.c, hash2

    assert hashed(0, 0) not in {hashed(*pair) for pair in pairwise(PREFIX)}


@given(st.binary(max_size=140))
def test_any_other_bytes_are_no_canary(data: bytes) -> None:
    assert parse_canary(PREFIX + data, new_key()) is None


def test_one_flipped_bit_anywhere_is_noticed() -> None:
    key = new_key()
    canary = make_canary(key, 7)
    for index in range(CANARY_LENGTH):
        broken = bytearray(canary)
        broken[index] ^= 1
        assert parse_canary(broken, key) is None


def test_shell_can_make_one() -> None:
    key, nonce = new_key(), "0123456789abcdef" * 2
    script = f"printf '%s' {key}:002a:{nonce} | sha256sum | cut -d' ' -f1"
    check = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    found = parse_canary(PREFIX + f"002a:{nonce}:{check}".encode(), key)
    assert found is not None and (found.number, found.nonce) == (0x2A, nonce)


@pytest.mark.parametrize("text", ["", "12", "g" * 32, "0" * 33])
def test_bad_key_is_refused(text: str) -> None:
    with pytest.raises(OffmapError, match="canary key"):
        parse_key(text)


def test_key_is_case_blind() -> None:
    assert parse_key("ABCDEF0123456789" * 2) == "abcdef0123456789" * 2
