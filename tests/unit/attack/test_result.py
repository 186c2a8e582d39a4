"""What is said of an attack: text, JSON that is read back as it was, a page that escapes what came from the host."""

import json

import jsonschema
import msgspec
import pytest

from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.html import render_html
from offmap.attack.result import AttackResult, Part, Run, Sweep, attack_schema
from offmap.attack.target import PlantedSecret
from offmap.attack.text import render_text
from offmap.report.typed import Address, decode, parse_json

from .machine import DIGEST, KNOWN, PID, Machine


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "hidden"])
def result(request: pytest.FixtureRequest) -> AttackResult:
    victim = Victim(PID, PlantedSecret("sh", DIGEST))
    return attack(Machine(hidden=request.param), Beforehand(KNOWN, KNOWN), victim, victim)


def test_text_begins_with_the_answer(result: AttackResult) -> None:
    text = render_text(result)
    assert text.startswith(
        "RECOVERED: the secret planted in sh recovered in " if result.times else "UNKNOWN: the control"
    )
    assert "what is read of the guest all the same" in text
    assert "No speculative execution took place" in text
    assert text in render_text(result) and "\x1b" not in text
    assert "\x1b[1;" in render_text(result, color=True)


def test_json_is_read_back_as_it_was(result: AttackResult) -> None:
    assert decode(AttackResult, parse_json(json.dumps(result.to_json()).encode())) == result


def test_json_is_of_its_schema(result: AttackResult) -> None:
    schema = json.loads(attack_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(result.to_json())), schema)


def test_runs_of_a_sweep_are_listed(result: AttackResult) -> None:
    run = Run(va=Address(0xFFFF_8880_0000_1000), pa=Address(0x1000), bytes=16, region="slab")
    found = Sweep(
        secret_bytes=32,
        bytes_read=1,
        pages_unread=0,
        device_pages=0,
        seconds=1.0,
        longest=16,
        runs=(run,) * 10,
        parts=(Part(name="free pages", bytes=3 << 20),),
    )
    swept = msgspec.structs.replace(result, attempt=msgspec.structs.replace(result.attempt, sweep=found))
    text = render_text(swept)
    assert text.count("16 B  0xffff888000001000, physical 0x1000, slab") == 8
    assert "and 2 more" in text
    assert "3 MiB  free pages" in text and "free pages" in render_html(swept)
    assert "0xffff888000001000" in render_html(swept)
    jsonschema.validate(json.loads(json.dumps(swept.to_json())), json.loads(attack_schema()))


def test_the_page_stops_where_the_attack_did(result: AttackResult) -> None:
    page = render_html(result)
    assert page.count("<svg") == 2
    assert ('class="stop"' in page) == (not result.times)
    assert "No speculative execution took place" in page


def test_names_from_the_host_are_escaped(result: AttackResult) -> None:
    stage = msgspec.structs.replace(result.attempt.stages[0], found="<script>alert(1)</script>\x1b[2J")
    attempt = msgspec.structs.replace(result.attempt, stages=(stage,), reason="<b>\x1b")
    hostile = msgspec.structs.replace(result, attempt=attempt, reason="<b>\x1b[2J")
    page = render_html(hostile)
    assert "<script>alert" not in page and "<b>" not in page and "\x1b" not in page
    assert "\x1b" not in render_text(hostile)
