"""Whatever is printed as JSON is of the published schema, and the schema leaves nothing undescribed."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest

from offmap.audit.host import host_facts
from offmap.audit.reach import Kind, PhysicalCell, PhysicalMap, Reach, ReachTotal, Sharer, Sharing, VmmFacts
from offmap.audit.report.hosts import parse_report
from offmap.audit.result import AuditedRange, AuditResult, OracleResult, Source, Span, Walk
from offmap.audit.result_sets import Change, Changes, Difference, EveryVm, NotAudited, audit_schema
from offmap.audit.sandbox_result import Descriptor, VmmSandbox
from offmap.audit.scan_result import Scan, Sort
from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus
from offmap.report.typed import Address

from .samples import Json, every_vm, exposed, not_audited, page_counts, scan, unknown, vm

SCHEMA: Any = json.loads(json.dumps(audit_schema()))


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
        "offmap-audit/2": "AuditResult",
        "offmap-audit-all/1": "EveryVm",
        "offmap-audit-merged/1": "Merged",
        "offmap-audit-change/1": "Changes",
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


ADDRESS = Address(4096)
REACH = Reach(ADDRESS, ADDRESS, 4096, Kind.VMAP, "vmalloc/ioremap space", 4096, True, False, ADDRESS, 4, "f+0x1")
WALKED = Walk(4, 0.1, {"4": 1, "3": 2}, 3, {"4K": 4096}, (Span(ADDRESS, 2, "why"),))
ORACLE = OracleResult("drgn", "0.0.33", 7, 256, 250, 0, 512, 256, 256, 1, 0.5)
SANDBOX = VmmSandbox(
    *(7, 3, 1, ("kill",), True, "filter", 1, ("mnt",), ("pid",), 1, "tmpfs, read-only", False),
    descriptors=(Descriptor(3, "directory", "/", "read"),),
    descriptors_omitted=0,
)
CANARIES = Scan(canaries_found=0, bytes_scanned=1, bytes_unread=2, frames_unread=3, seconds=0.5, found=())
SECRET = msgspec.structs.replace(CANARIES, for_="secret", secret_bytes=32, canaries_found=None)


def audited(**changes: Any) -> AuditResult:
    result = AuditResult(
        offmap="0.1.0",
        time="2026-11-22T22:50:26Z",
        host=host_facts(),
        pid=1,
        process="vmm",
        vmm=VmmFacts("QEMU", "/usr/bin/qemu", 1, 2),
        verdict=Verdict.EXPOSED,
        notes=("a note",),
        partial="it ended",
        pages=page_counts(ram_pages=2, pages_populated=1, direct_map_pages=1, mapped_pages=1, unknown_pages=1),
        ranges=(
            AuditedRange(Address(0), 4096, Source.MEMSLOT, 0, "anon"),
            AuditedRange(Address(0), 4096, Source.GUESS, None, ""),
        ),
        reach=(ReachTotal(Kind.DIRECT_MAP, "direct", 4096, True, False, "", 1, 1),),
        aliases=(REACH,),
        aliases_omitted=0,
        direct_map_ranges=(msgspec.structs.replace(REACH, kind=Kind.DIRECT_MAP, guest_phys_addr=None),),
        direct_map_ranges_omitted=0,
        physical=PhysicalMap(
            ((Address(0), ADDRESS),), 4096, (PhysicalCell(Address(0), 4096, 1, 1, 0, 1, 0, 0, (Kind.DIRECT_MAP,)),)
        ),
        sharing=Sharing(1, 0, (Sharer(2, "other", 1),), 0),
        mapped_guest_ranges=((0, 4096),),
        walk=WALKED,
        scan=None,
        oracle=None,
        seconds=0.5,
    )
    return msgspec.structs.replace(result, **changes)


@pytest.mark.parametrize(
    "result",
    [
        audited(),
        audited(sharing=None, partial=None, physical=PhysicalMap((), None, ()), scan=CANARIES),
        audited(sharing=Sharing(0, 0, None, 0), scan=SECRET, oracle=ORACLE, sandbox=SANDBOX),
    ],
)
def test_what_the_audit_prints_is_of_the_schema_and_is_read_back(result: AuditResult) -> None:
    check(result.to_json())
    report = parse_report(json.loads(json.dumps(result.to_json())))
    assert report.verdict is Verdict.EXPOSED and report.vms == (result,)


def test_every_vm_is_of_the_schema() -> None:
    missed = (NotAudited(2, "crosvm", VmmFacts("", "", 0, 0), "gone"),)
    everything = EveryVm(
        "0.1.0", "2026-11-22T22:50:26Z", host_facts(), ExitStatus.EXPOSED, (audited(),), missed, ("a note",)
    )
    check(everything.to_json())
    assert len(parse_report(everything.to_json()).not_audited) == 1
    check(EveryVm("0.1.0", "2026-11-22T22:50:26Z", host_facts(), ExitStatus.DONE, (), (), ()).to_json())


def test_changes_are_of_the_schema() -> None:
    listed = (
        Change(Difference.MAPPED, ADDRESS, 4096, 0, ADDRESS, ADDRESS, (Kind.VMAP,), (), (REACH,)),
        Change(Difference.LOST, ADDRESS, 4096, why="swapped out"),
    )
    pages = {Difference.MAPPED: 1, Difference.LOST: 1}
    check(Changes("2026-11-22T22:50:26Z", 1, "vmm", Verdict.EXPOSED, 1, pages, listed, 3).to_json())


def test_the_tests_own_samples_are_of_the_schema() -> None:
    for sample in (vm(), exposed(), unknown(), every_vm(vm(), exposed(), not_audited=[not_audited()])):
        check(sample)
    check(vm(scan=scan(2)))


def test_a_reader_is_told_the_words_of_each_enumeration() -> None:
    defs = SCHEMA["$defs"]
    for kind, field, words in (
        ("Reach", "kind", Kind),
        ("ReachTotal", "kind", Kind),
        ("AuditedRange", "source", Source),
        ("Owner", "sort", Sort),
    ):
        assert defs[kind]["properties"][field]["enum"] == [word.value for word in words]
    assert set(defs["Verdict"]["enum"]) == {"hidden", "exposed", "unknown"}
    assert len(defs["Difference"]["enum"]) == len(Difference)


def test_what_is_printed_is_there_whether_or_not_a_reader_may_miss_it() -> None:
    """Fields that old files lack have defaults, so the schema does not require them; what we print has them all."""
    printed = audited(scan=CANARIES, oracle=ORACLE).to_json()
    assert set(printed) == set(SCHEMA["$defs"]["AuditResult"]["properties"])


def test_what_is_wrong_is_not_of_the_schema() -> None:
    for sample in (vm(verdict="fine"), vm(pid=-1), {**vm(), "extra": 1}, vm(time="today")):
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(sample)
