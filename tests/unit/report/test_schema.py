"""Whatever is printed as JSON is of the published schema, and the schema leaves nothing undescribed."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from offmap.audit.audit import AuditResult
from offmap.audit.changes import Change, Changes, Difference
from offmap.audit.every_vm import EveryVm, NotAudited
from offmap.audit.guest_ram import GuestRam, RamRange, Source
from offmap.audit.host import host_facts
from offmap.audit.mappings import RUN, KernelMappings, Span
from offmap.audit.oracle import OracleResult
from offmap.audit.placed import Sort
from offmap.audit.reach import (
    Kind,
    PhysicalCell,
    PhysicalMap,
    Reach,
    ReachTotal,
    Sharer,
    Sharing,
    VmmFacts,
)
from offmap.audit.scan import ScanResult
from offmap.audit.verdict import PageCounts, Verdict
from offmap.report import document, scan_document
from offmap.report.hosts import parse_report
from offmap.report.schema import schema_text

from .samples import Json, every_vm, exposed, not_audited, scan, unknown, vm

SCHEMA = json.loads(schema_text())


def strict(schema: Any) -> Any:
    """The schema, with every field forbidden that it does not describe: what we print must be described."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


VALIDATOR = jsonschema.Draft202012Validator(strict(SCHEMA))


def check(value: Any) -> None:
    """Through JSON, as a reader gets it."""
    document = json.loads(json.dumps(value))
    which = {
        "offmap-audit/2": "audit",
        "offmap-audit-all/1": "audit_all",
        "offmap-audit-merged/1": "merged",
        "offmap-audit-change/1": "changes",
    }
    part = {"$ref": f"#/$defs/{which[document['schema']]}", "$defs": strict(SCHEMA["$defs"])}
    errors = list(jsonschema.Draft202012Validator(part).iter_errors(document))  # says more than oneOf does
    assert not errors, [f"{error.json_path}: {error.message:.300}" for error in errors]
    VALIDATOR.validate(document)


def nodes(schema: Any, path: str = "") -> Iterator[tuple[str, Json]]:
    if isinstance(schema, dict):
        for name, each in schema.get("properties", {}).items():
            yield f"{path}.{name}", each
        for key, value in schema.items():
            yield from nodes(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for at, value in enumerate(schema):
            yield from nodes(value, f"{path}[{at}]")


def test_the_schema_is_one_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    bare = [path for path, node in nodes(SCHEMA) if not node.get("description") and "$ref" not in node]
    assert bare == []
    assert all("description" in node for node in SCHEMA["$defs"].values())


REACH = Reach(1, 2, 4096, Kind.VMAP, "vmalloc/ioremap space", 4096, True, False, 3, 4, "f+0x1")
WALKED = KernelMappings(np.zeros(0, dtype=RUN), (Span(1, 2, "why"),), {4: 1, 3: 2}, 0xFFFF_8880_0000_0000)


ORACLE = OracleResult("drgn", "0.0.33", 7, 256, 250, 0, 512, 256, 256, 1, 0.5)


def audited(**changes: Any) -> AuditResult:
    result = AuditResult(
        pid=1,
        process="vmm",
        host=host_facts(),
        ram=GuestRam((RamRange(0, 4096, Source.MEMSLOT, 0, "anon"), RamRange(0, 4096, Source.GUESS))),
        pages=PageCounts(ram_pages=2, pages_populated=1, direct_map_pages=1, mapped_pages=1, unknown_pages=1),
        aliases=(REACH,),
        mappings=WALKED,
        levels=4,
        scan=None,
        verdict=Verdict.EXPOSED,
        notes=("a note",),
        seconds=0.5,
        mapped=((0, 4096),),
        reach=(ReachTotal(Kind.DIRECT_MAP, "direct", 4096, True, False, "", 1, 1),),
        direct_map_ranges=(dataclasses.replace(REACH, kind=Kind.DIRECT_MAP, guest_phys_addr=None),),
        physical=PhysicalMap(((0, 4096),), (PhysicalCell(0, 4096, 1, 1, 0, 1, 0, (Kind.DIRECT_MAP,)),), 4096),
        sharing=Sharing(1, 0, (Sharer(2, "other", 1),)),
        vmm=VmmFacts("QEMU", "/usr/bin/qemu", 1, 2),
        partial="it ended",
    )
    return dataclasses.replace(result, **changes)


@pytest.mark.parametrize(
    "result",
    [
        audited(),
        audited(sharing=None, partial="", physical=PhysicalMap(), scan=ScanResult()),
        audited(sharing=Sharing(0, 0), scan=ScanResult(secret_bytes=32), oracle=ORACLE),
    ],
)
def test_what_the_audit_prints_is_of_the_schema_and_is_read_back(result: AuditResult) -> None:
    check(result.to_json())
    report = parse_report(json.loads(json.dumps(result.to_json())))
    assert report.verdict is Verdict.EXPOSED and report.vms[0].pages.mapped_pages == 1


def test_every_vm_is_of_the_schema() -> None:
    everything = EveryVm(host_facts(), (audited(),), (NotAudited(2, "crosvm", VmmFacts(), "gone"),), ("a note",))
    check(everything.to_json())
    assert len(parse_report(everything.to_json()).not_audited) == 1
    check(EveryVm(host_facts(), ()).to_json())


def test_changes_are_of_the_schema() -> None:
    listed = (
        Change(Difference.MAPPED, 1, 4096, 0, 2, 3, (Kind.VMAP,), (), (REACH,)),
        Change(Difference.LOST, 1, 4096, why="swapped out"),
    )
    check(Changes(listed, {Difference.MAPPED: 1, Difference.LOST: 1}, 3).to_json(audited()))


def test_the_tests_own_samples_are_of_the_schema() -> None:
    for sample in (vm(), exposed(), unknown(), every_vm(vm(), exposed(), not_audited=[not_audited()])):
        check(sample)
    check(vm(scan=scan(2)))


def test_enumerations_are_those_of_the_code() -> None:
    defs = SCHEMA["$defs"]
    assert defs["kind"]["enum"] == [kind.value for kind in Kind]
    assert defs["verdict"]["enum"] == [verdict.value for verdict in Verdict]
    assert defs["range"]["properties"]["source"]["enum"] == [source.value for source in Source]
    assert defs["change"]["properties"]["what"]["enum"] == [what.value for what in Difference]
    assert defs["owner"]["properties"]["sort"]["enum"] == [sort.value for sort in Sort]


def test_what_renderers_read_is_what_the_schema_promises() -> None:
    names = {
        document.Host: "host",
        document.Vmm: "vmm",
        document.Pages: "pages",
        document.RamRange: "range",
        document.Total: "total",
        document.Mapping: "mapping",
        document.Cell: "cell",
        document.Physical: "physical",
        document.Sharing: "sharing",
        document.Sharer: "sharer",
        document.Walk: "walk",
        scan_document.Scan: "scan",
        scan_document.Oracle: "oracle",
        scan_document.Place: "place",
        scan_document.Owner: "owner",
        document.Vm: "audit",
        document.NotAudited: "not_audited",
    }
    for kind, name in names.items():
        described = SCHEMA["$defs"][name]
        for each in dataclasses.fields(kind):
            assert each.name in described["properties"], (name, each.name)
            if each.default is dataclasses.MISSING:
                assert each.name in described["required"], (name, each.name)
            may_be_null = type(None) in typing.get_args(typing.get_type_hints(kind)[each.name])
            assert may_be_null or "null" not in json.dumps(described["properties"][each.name]), (name, each.name)


def test_what_is_wrong_is_not_of_the_schema() -> None:
    for sample in (vm(verdict="fine"), vm(pid=-1), {**vm(), "extra": 1}, vm(time="today")):
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(sample)
