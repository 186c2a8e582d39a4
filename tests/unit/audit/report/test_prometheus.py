"""Metrics as Prometheus's own client reads them back."""

from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from offmap.audit.report.hosts import HostReport, failed_report, parse_report
from offmap.audit.report.prometheus import LISTED, render_prometheus

from .samples import PAGE, Json, every_vm, exposed, not_audited, pages, scan, total, unknown, vm

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(reports: Iterable[HostReport], merged: bool = False) -> Samples:
    """All samples; fails on one that is there twice, and on a family without help or type."""
    text = render_prometheus(list(reports), merged)
    assert text.endswith("\n")
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type == "gauge", family
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def of(document: Json) -> Samples:
    return samples([parse_report(document)])


def value(found: Samples, name: str, **labels: str) -> float:
    """The one sample with this name that has these labels, among others."""
    (only,) = [
        number for (each, have), number in found.items() if each == name and labels.items() <= dict(have).items()
    ]
    return only


def test_states_add_up_to_the_ram() -> None:
    found = of(exposed())
    sizes = {
        state: value(found, "offmap_guest_ram_bytes", state=state, pid="170", process="qemu-system-x86", vmm="QEMU")
        for state in ("exposed", "unknown", "hidden", "unmapped", "unpopulated", "excluded")
    }
    assert sizes == {
        "exposed": 100 * PAGE,
        "unknown": 0,
        "hidden": 0,  # the VM is not
        "unmapped": 80 * PAGE,
        "unpopulated": 76 * PAGE,
        "excluded": 0,
    }
    assert value(found, "offmap_direct_map_bytes") == 98 * PAGE
    assert value(found, "offmap_alias_bytes", region="kernel text mapping") == 2 * PAGE


@pytest.mark.parametrize(("document", "verdict"), [(vm(), "hidden"), (exposed(), "exposed"), (unknown(), "unknown")])
def test_verdict_is_a_state_set(document: Json, verdict: str) -> None:
    found = of(document)
    for name in ("offmap_audit_verdict", "offmap_vm_verdict", "offmap_audit_vms"):
        states = {each: value(found, name, verdict=each) for each in ("hidden", "exposed", "unknown")}
        assert states == {each: float(each == verdict) for each in states}
    assert value(found, "offmap_audit_success") == 1
    assert value(found, "offmap_audit_timestamp_seconds") == 1795387826
    assert value(found, "offmap_audit_duration_seconds") == 1.25
    assert value(found, "offmap_audit_info", kernel="6.12.0", offmap="0.1.0") == 1
    assert value(found, "offmap_host_direct_map_bytes", page_size="4096") == 20 << 20


def test_hidden_is_said_of_no_page_of_a_vm_that_is_not() -> None:
    for document in (exposed(), unknown()):
        found = of(document)
        assert value(found, "offmap_guest_ram_bytes", state="hidden") == 0
    found = of(vm(ram=8))
    assert value(found, "offmap_guest_ram_bytes", state="hidden") == 8 * PAGE
    assert value(found, "offmap_guest_ram_bytes", state="unmapped") == 0


def test_a_partial_audit_is_no_success() -> None:
    assert value(of(unknown(partial="process 7 ended during the audit")), "offmap_audit_success") == 0


def test_a_failed_audit_alerts_and_says_hidden_nowhere() -> None:
    report = failed_report("0.1.0", "2026-11-22T22:50:26Z", parse_report(vm()).host, "no /proc/kcore")
    found = samples([report])
    assert value(found, "offmap_audit_success") == 0
    assert value(found, "offmap_audit_verdict", verdict="unknown") == 1
    assert value(found, "offmap_audit_verdict", verdict="hidden") == 0
    assert value(found, "offmap_audit_timestamp_seconds") == 1795387826
    assert not any(number for (_, labels), number in found.items() if {"hidden"} & {text for _, text in labels})


def test_a_vm_that_was_not_audited_alerts() -> None:
    found = of(every_vm(vm(), not_audited=[not_audited()]))
    assert value(found, "offmap_audit_success") == 0
    assert value(found, "offmap_audit_verdict", verdict="unknown") == 1
    assert value(found, "offmap_vm_verdict", pid="172", verdict="unknown") == 1
    assert value(found, "offmap_audit_vms", verdict="unknown") == 1


def test_no_vm_is_no_verdict() -> None:
    found = of(every_vm())
    assert {value(found, "offmap_audit_verdict", verdict=each) for each in ("hidden", "exposed", "unknown")} == {0}
    assert value(found, "offmap_audit_success") == 1


def test_what_a_secret_speaks_against_is_not_hidden() -> None:
    found = of(vm(verdict="exposed", pages=pages(10, canaries_found=1), scan=scan(1), ram=10))
    assert value(found, "offmap_guest_ram_bytes", state="hidden") == 0
    assert value(found, "offmap_guest_ram_bytes", state="unknown") == 10 * PAGE
    assert value(found, "offmap_canaries_found") == 1
    assert value(found, "offmap_vm_verdict", verdict="exposed") == 1


def test_labels_are_escaped() -> None:
    name = 'a"\\b\nc} 1\n# HELP x'
    found = of(exposed(process=name))
    assert value(found, "offmap_vm_verdict", verdict="exposed", process='a"\\b\\nc} 1\\n# HELP x') == 1


def test_series_are_bounded_and_the_gravest_stay() -> None:
    many = [vm(number) for number in range(1, LISTED + 20)]
    found = of(every_vm(*many, exposed(9999), not_audited=[not_audited(8888)]))
    assert value(found, "offmap_vm_verdict", pid="9999", verdict="exposed") == 1
    assert value(found, "offmap_vm_verdict", pid="8888", verdict="unknown") == 1
    assert sum(name == "offmap_vm_verdict" for name, _ in found) == 3 * LISTED
    assert value(found, "offmap_audit_omitted_vms") == LISTED + 21 - LISTED
    assert value(found, "offmap_audit_vms", verdict="hidden") == LISTED + 19


def test_regions_are_bounded() -> None:
    lying = [total(1, alias=True) | {"region": f"region {number}"} for number in range(1000)]
    found = of(exposed(reach=lying))
    assert sum(name == "offmap_alias_bytes" for name, _ in found) == 32


def test_merged_hosts_are_labelled_and_those_of_one_host_put_together() -> None:
    reports = [parse_report(vm(1, name="a")), parse_report(exposed(2, host=vm(name="a")["host"])), parse_report(vm(1))]
    found = samples(reports, merged=True)
    assert value(found, "offmap_audit_verdict", host="a", verdict="exposed") == 1
    assert value(found, "offmap_audit_verdict", host="host1", verdict="hidden") == 1
    assert value(found, "offmap_audit_duration_seconds", host="a") == 2.5
    assert all("host" in dict(labels) for _, labels in found)
