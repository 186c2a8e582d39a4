"""Results that contradict themselves, or are none."""

import json
from typing import Any

import pytest

from offmap.audit.report.hosts import parse_report
from offmap.report.typed import Malformed

from .samples import Json, cell, every_vm, exposed, pages, vm


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
        exposed(physical={"ram": [], "cell_bytes": None, "cells": [cell(0, 8192, direct=3) | {"unmapped_pages": 0}]}),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(document: Json) -> None:
    for each in (document, every_vm(document)):
        with pytest.raises(Malformed, match=r"^VM 1\d\d: "):
            parse_report(each)


@pytest.mark.parametrize("status", [1, 2, 3])
def test_a_status_that_no_vm_explains_is_not_taken_for_hidden(status: int) -> None:
    for document in (every_vm(vm(), exit_status=status), every_vm(exit_status=status)):
        with pytest.raises(Malformed, match=f"its exit status is {status}"):
            parse_report(document)


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"schema": 1}, {"schema": "offmap-audit/1"}, {"schema": "offmap-demo/1"}, vm(time="yesterday")],
)
def test_what_is_no_report_is_refused(document: Any) -> None:
    with pytest.raises(Malformed):
        parse_report(document)


@pytest.mark.parametrize(
    "path",
    [
        *(("pages", name) for name in pages(0)),
        *(("vmm", name) for name in vm()["vmm"]),
        *(("host", name) for name in vm()["host"]),
        *(("walk", name) for name in vm()["walk"]),
        *(("physical", name) for name in vm()["physical"]),
        *((name,) for name in vm() if name != "oracle"),
    ],
)
def test_a_figure_that_is_missing_is_not_taken_for_nothing(path: tuple[str, ...]) -> None:
    document = json.loads(json.dumps(vm()))
    at = document
    for name in path[:-1]:
        at = at[name]
    del at[path[-1]]
    with pytest.raises(Malformed):
        parse_report(document)
