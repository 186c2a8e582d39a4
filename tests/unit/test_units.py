"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.errors import OffmapError
from offmap.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x60000000", 0x60000000),
        ("0X10", 16),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("256MiB", 256 << 20),
        ("256MB", 256 << 20),
        ("1G", 1 << 30),
        (" 2K ", 2048),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "M", "1.5G", "-1", "+1", "1Q", "1 G", "0x", "1e9", "twelve", "1_000", "\u0661", "010", "0256M"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OffmapError, match="is not a size"):
        parse_size(text)


def test_more_digits_than_python_converts_are_refused() -> None:
    with pytest.raises(OffmapError, match="is not a size"):
        parse_size("9" * 5000)


@given(st.one_of(st.text(max_size=12), st.from_regex(r"[0-9xXa-f]{1,8}[KMGTPE]?i?B?", fullmatch=True)))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except OffmapError as error:
        assert "\n" not in str(error)


@given(st.integers(0, 1 << 62))
def test_formatted_sizes_are_within_their_rounding(size: int) -> None:
    number, unit = format_size(size).split()
    scale = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50, "EiB": 1 << 60}
    assert abs(float(number) * scale[unit] - size) <= 0.051 * scale[unit]


def test_whole_sizes_lose_nothing() -> None:
    assert format_size(256 << 20) == "256 MiB"
    assert format_size(1536 << 20) == "1.5 GiB"
    assert format_size(4095) == "4.0 KiB"
    assert format_size(12) == "12 B"
