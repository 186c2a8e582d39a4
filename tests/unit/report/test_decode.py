"""JSON that is not what it says it is."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from offmap.report.decode import Address, Malformed, decode, plain
from offmap.report.hosts import parse_report

from .samples import Json, cell, every_vm, exposed, pages, vm


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Thing:
    number: int
    text: str = "none"
    at: Address | None = None
    part: float = 0.0
    flag: bool = False
    pair: tuple[int, str] = (0, "")
    many: tuple[int, ...] = ()
    counts: dict[str, int] | None = None
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
        ({}, "number is missing"),
        ({"number": True}, "number"),
        ({"number": -1}, "number"),
        ({"number": 1 << 64}, "number"),
        ({"number": 1.0}, "number"),
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
        ({"number": 1, "counts": {"a": "b"}}, r"counts\.a"),
        ({"number": 1, "colour": "blue"}, "colour is none of red"),
        ({"number": 1, "colour": []}, "colour"),
    ],
)
def test_what_is_wrong_is_named(value: Any, where: str) -> None:
    with pytest.raises(Malformed, match=f"^{where}"):
        decode(Thing, value)


def test_plain_text_moves_no_cursor() -> None:
    assert plain("a b\u00e9") == "a b\u00e9"
    assert plain("\x1b\r\n\u202e\ud800\x7f\u2028") == "\\x1b\\r\\n\\u202e\\ud800\\x7f\\u2028"


@pytest.mark.parametrize(
    "document",
    [
        vm(pages=pages(65536, mapped_pages=1, direct_map_pages=1)),
        vm(pages=pages(65536, unknown_pages=1)),
        vm(pages=pages(65536, pages_populated=0, not_populated_pages=65536)),
        vm(pages=pages(65536, canaries_found=1)),
        vm(physical={"ram": [], "cell_bytes": None, "cells": [cell(0, 8192, direct=1)]}),
        vm(verdict="unknown", pages=pages(65536, mapped_pages=1)),
        exposed(pages=pages(256, mapped_pages=300)),
        exposed(physical={"ram": [], "cell_bytes": None, "cells": [cell(0, 8192, direct=3)]}),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(document: Json) -> None:
    for each in (document, every_vm(document)):
        with pytest.raises(Malformed, match=r"^VM 1\d\d: "):
            parse_report(each)


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"schema": 1}, {"schema": "offmap-audit/1"}, {"schema": "offmap-demo/1"}, vm(time="yesterday")],
)
def test_what_is_no_report_is_refused(document: Any) -> None:
    with pytest.raises(Malformed):
        parse_report(document)
