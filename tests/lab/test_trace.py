"""A mapping of 100 µs between two audits is reported each time, and nothing is where there is none."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from offmap.audit.result_sets import audit_schema
from offmap.audit.trace.result import Traced
from offmap.kmod.lab_build import load
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel

from .alias_module import alias_module

pytestmark = pytest.mark.lab

TARGET = str(Path(__file__).with_name("trace_target.py"))
FLASHES = 5


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, lab_host: LabHost) -> Iterator[LabHost]:
    """Give the shared host with the module that maps what a test asks for."""
    module = alias_module(lab_kernel)
    assert lab_host.options.out is not None
    here = lab_host.options.out / module.name
    here.write_bytes(module.read_bytes())
    assert load(lab_host, here) == ""
    yield lab_host
    assert lab_host.output(["rmmod", module.stem]).status == 0


def watched(host: LabHost, kind: str, count: int) -> tuple[int, list[Any]]:
    """Status of the watch, and all that it printed."""
    done = host.output([sys.executable, TARGET, kind, str(count), "0", "100"])
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert lines, done.stderr.decode()
    validator = jsonschema.Draft202012Validator(audit_schema((Traced,)))
    for line in lines:
        validator.validate(line)
    return done.status, lines


@pytest.mark.parametrize(("kind", "event"), [("reserved", "ioremap_page_range"), ("anon", "vmap")])
def test_each_mapping_is_reported(host: LabHost, kind: str, event: str) -> None:
    status, (first, *traced) = watched(host, kind, FLASHES)
    assert status == 1 and (first["verdict"] == "hidden") == (kind == "reserved")
    mappings = [mapping for line in traced for mapping in line["mappings"]]
    assert len(mappings) == FLASHES
    for mapping in mappings:
        assert (mapping["event"], mapping["pages"], mapping["guest_phys_addr"]) == (event, 1, 0)
        assert mapping["life_us"] >= 100 and int(mapping["va"], 16) > 1 << 63
        assert "alias_write" in mapping["stack"]
    assert host.output(["sh", "-c", "ls /sys/kernel/tracing/instances | grep offmap"]).stdout == b""
    assert host.output(["sh", "-c", "grep offmap /sys/kernel/tracing/kprobe_events"]).stdout == b""


def test_nothing_is_said_where_nothing_is_mapped(host: LabHost) -> None:
    status, (first, *traced) = watched(host, "reserved", 0)
    assert (status, first["verdict"], [line["verdict"] for line in traced]) == (0, "hidden", ["hidden"]), traced


def test_memory_that_is_exchanged_after_the_last_audit_is_seen_at_the_end(host: LabHost) -> None:
    done = host.output([sys.executable, TARGET, "reserved", "-1", "0", "0"])
    first, change, traced = (json.loads(line) for line in done.stdout.decode().splitlines())
    assert (done.status, first["verdict"], traced["schema"]) == (1, "hidden", "offmap-audit-trace/1")
    assert (change["schema"], change["verdict"]) == ("offmap-audit-change/1", "exposed")
