"""JSON that is not what it says it is."""

import json
from enum import Enum
from typing import Any

import pytest

from offmap.report.typed import Address, Count, Document, Malformed, Seconds, decode, parse_json, plain


class Colour(Enum):
    RED = "red"


class Thing(Document, frozen=True):
    number: Count
    text: str = "none"
    at: Address | None = None
    part: Seconds = 0.0
    flag: bool = False
    pair: tuple[Count, str] = (0, "")
    many: tuple[Count, ...] = ()
    counts: dict[str, Count] | None = None
    colour: Colour = Colour.RED


def test_all_kinds() -> None:
    value = {
        "number": 3,
        "text": "a\nb",
        "at": "0xff",
        "part": 1,
        "flag": True,
        "pair": [1, "x"],
        "many": [1, 2],
        "counts": {"a": 1},
        "colour": "red",
        "of a later version": [],
    }
    thing = decode(Thing, value)
    assert thing == Thing(3, "a\\nb", Address(255), 1.0, True, (1, "x"), (1, 2), {"a": 1}, Colour.RED)
    assert decode(Thing, {"number": 0, "at": None}) == Thing(0)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ([], "the whole"),
        ({}, "the whole: .*number"),
        ({"number": True}, "number"),
        ({"number": -1}, "number"),
        ({"number": 1 << 64}, "number"),
        ({"number": 1.0}, "number"),
        ({"number": 10**400}, "number"),
        ({"number": 1, "of a later version": [1 << 64]}, r"of a later version\[0\]"),
        ({"number": "1"}, "number"),
        ({"number": 1, "text": None}, "text"),
        ({"number": 1, "at": 1}, "at"),
        ({"number": 1, "at": "0xG"}, "at"),
        ({"number": 1, "at": "0x1" + "0" * 16}, "at"),
        ({"number": 1, "part": "1"}, "part"),
        ({"number": 1, "part": float("nan")}, "part"),
        ({"number": 1, "part": float("inf")}, "part"),
        ({"number": 1, "part": 10**400}, "part"),
        ({"number": 1, "flag": 1}, "flag"),
        ({"number": 1, "pair": [1]}, "pair"),
        ({"number": 1, "pair": [1, 2]}, r"pair\[1\]"),
        ({"number": 1, "many": {"a": 1}}, "many"),
        ({"number": 1, "many": [1, []]}, r"many\[1\]"),
        ({"number": 1, "counts": {"a": "b"}}, "counts"),
        ({"number": 1, "colour": "blue"}, "colour"),
        ({"number": 1, "colour": []}, "colour"),
    ],
)
def test_what_is_wrong_is_named(value: Any, where: str) -> None:
    with pytest.raises(Malformed, match=f"^{where}"):
        decode(Thing, value)


def test_plain_text_moves_no_cursor() -> None:
    assert plain("a b\u00e9") == "a b\u00e9"
    assert plain("\x1b\r\n\u202e\ud800\x7f\u2028") == "\\x1b\\r\\n\\u202e\\ud800\\x7f\\u2028"


def test_what_is_written_is_read_back() -> None:
    thing = Thing(3, "a", Address(1 << 63), 1.5, True, (1, "x"), (1, 2), {"a": 1})
    assert decode(Thing, json.loads(json.dumps(thing.to_json()))) == thing
    assert thing.to_json()["at"] == "0x8000000000000000"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON: nested too deeply"),
        (b'{"a": ' * 100_000, "is not JSON: nested too deeply"),
        (b"9" * 10_000, "is not JSON"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "has 'c' twice in one object"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(text: bytes, said: str) -> None:
    with pytest.raises(Malformed, match=said) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_what_is_nested_deeply_is_refused_by_the_decoder_too() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(Malformed, match="nested too deeply"):
        decode(Thing, {"number": 1, "of a later version": value})
