"""Results that somebody has tampered with: refused, or shown; nothing else."""

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.audit.report.hosts import parse_report
from offmap.audit.report.html import render_html
from offmap.audit.report.prometheus import render_prometheus
from offmap.audit.report.text import render_fleet, render_vm
from offmap.audit.verdict import Verdict
from offmap.report.typed import Malformed

from .samples import Json, every_vm, exposed, not_audited, scan, unknown, vm
from .test_html import Page
from .test_prometheus import samples

DOCUMENT = every_vm(vm(1, scan=scan(1)), exposed(2), unknown(3), not_audited=[not_audited(4)], notes=["a note"])

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**52, 2**63, 2**64 - 1, 2**64, 10**400, 1e308, float("inf"), float("nan")]),
    st.text(max_size=8),
    st.sampled_from(
        ["<script>", '"', "\\", "\n", "\x1b[2J", "\ud800", "0x0", "0xffffffffffffffff", "hidden", "exposed"]
    ),
    st.just([]),
    st.just({}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


PLACES = places(DOCUMENT)


def changed(document: Json, path: tuple[Any, ...], value: Any) -> Json:
    made = copy.deepcopy(document)
    at: Any = made
    *way, last = path
    try:
        for key in way:
            at = at[key]
        if isinstance(at, dict | list):
            at[last] = value
    except (KeyError, IndexError, TypeError):
        pass  # an earlier change took it away
    return made


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_tampered_results_are_refused_or_shown(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    document = DOCUMENT
    for path, value in changes:
        document = changed(document, path, value)
    try:
        report = parse_report(json.loads(json.dumps(document)))
    except Malformed as error:
        assert "\n" not in str(error)
        return
    texts = [render_fleet([report]), *(render_vm(each) for each in report.vms)]
    assert not set("\x1b\r\x00") & set("".join(texts))
    samples([report])
    render_prometheus([report, report], merged=True).encode()
    text = render_html([report])
    text.encode()
    page = Page(text)
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert sum(tag == "script" for tag, _ in page.elements) <= 3  # ours, and the numbers of two pictures
    for each in report.vms:
        if each.verdict is Verdict.HIDDEN:
            assert not each.pages.mapped_pages and not each.pages.unknown_pages
