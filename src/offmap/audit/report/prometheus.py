"""Audits in Prometheus's text format, for node_exporter's textfile collector.

Source: "Exposition formats", text-based format 0.0.4, and "Metric and label naming" of the Prometheus documentation.
A verdict is a state set: one series for each possible verdict. One of them is 1, so a rule can ask for any.
Labels are bounded: at most LISTED VMs, the gravest first, and at most 32 regions of each.
"""

from collections.abc import Iterable, Sequence

from offmap.audit.host import parse_time
from offmap.audit.report.hosts import HostReport
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import NotAudited
from offmap.audit.verdict import Verdict, worst
from offmap.uapi.page import PAGE_SIZE

LISTED = 512
"""VMs of a host with series of their own."""

_REGIONS = 32  # a kernel has fewer; a file to be merged may say anything
_VERDICTS = (Verdict.HIDDEN, Verdict.EXPOSED, Verdict.UNKNOWN)
_DIRECT_MAP_SIZES = {"4K": PAGE_SIZE, "2M": 2 << 20, "1G": 1 << 30}

Labels = dict[str, str | int]


class _Family:
    """One metric: its help, and its samples in order. All of ours are gauges."""

    def __init__(self, name: str, help_text: str) -> None:
        self._lines = [f"# HELP {name} {help_text}", f"# TYPE {name} gauge"]
        self._name = name

    def add(self, value: float, labels: Labels) -> None:
        inside = ",".join(f'{key}="{_escape(str(text))}"' for key, text in labels.items())
        # repr of a float gives back the same float; a whole number is written as one.
        number = str(int(value)) if value == int(value) else repr(value)
        self._lines.append(f"{self._name}{{{inside}}} {number}" if inside else f"{self._name} {number}")

    def verdict(self, verdict: Verdict | None, labels: Labels) -> None:
        """Add a state set. Every series is 0 if there was nothing to hide."""
        for each in _VERDICTS:
            self.add(verdict is each, {**labels, "verdict": each.value})

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escape(text: str) -> str:
    """A label's value: backslash, double quote and line feed are the characters that must be escaped."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def render_prometheus(reports: Sequence[HostReport], merged: bool = False) -> str:
    """The whole file. It ends with a line feed, as the format requires.

    Args:
        reports: one for an audit of this host, several for a merged report.
        merged: label every series with the name of its host. Prometheus itself adds the name of this host.
    """
    hosts: dict[str, list[HostReport]] = {}
    for report in reports:
        hosts.setdefault(report.host.name, []).append(report)
    labelled: list[tuple[Labels, list[HostReport]]] = [
        ({"host": name} if merged else {}, of_host) for name, of_host in hosts.items()
    ]
    return "".join(map(str, (*_host_families(labelled), *_vm_families(labelled))))


def _host_families(hosts: Iterable[tuple[Labels, list[HostReport]]]) -> Iterable[_Family]:
    info = _Family("offmap_audit_info", "What made the audit, and the kernel that was audited.")
    success = _Family(
        "offmap_audit_success", "Whether the last audit ran to its end and judged every VM (1), or failed (0)."
    )
    verdict = _Family("offmap_audit_verdict", "The worst verdict on any VM of the host; all 0 if it has none.")
    timestamp = _Family("offmap_audit_timestamp_seconds", "When the last audit ended, since the epoch.")
    duration = _Family("offmap_audit_duration_seconds", "How long the last audit took.")
    vms = _Family("offmap_audit_vms", "VMs of the host, by verdict.")
    direct = _Family("offmap_host_direct_map_bytes", "The host kernel's direct map, by the size of its pages in bytes.")
    for label, reports in hosts:
        for version, kernel in dict.fromkeys((report.offmap, report.host.kernel) for report in reports):
            info.add(1, {**label, "offmap": version, "kernel": kernel})
        partial = any(vm.partial for report in reports for vm in report.vms)
        success.add(not partial and all(not (r.failed or r.not_audited or r.notes) for r in reports), label)
        verdict.verdict(worst(report.verdict for report in reports), label)
        timestamp.add(min(parse_time(report.time).timestamp() for report in reports), label)
        duration.add(sum(report.seconds for report in reports), label)
        verdicts = [each for report in reports for each in report.verdicts]
        for each in _VERDICTS:
            vms.add(verdicts.count(each), {**label, "verdict": each.value})
        walks = [vm.walk for report in reports for vm in report.vms]
        for size, number in walks[-1].direct_map_bytes.items() if walks else ():
            direct.add(number, {**label, "page_size": _DIRECT_MAP_SIZES.get(size, 0)})
    return info, success, verdict, timestamp, duration, vms, direct


def _vm_families(hosts: Iterable[tuple[Labels, list[HostReport]]]) -> Iterable[_Family]:
    verdict = _Family("offmap_vm_verdict", "The verdict on one VM.")
    ram = _Family(
        "offmap_guest_ram_bytes",
        "Guest RAM by state: hidden (no kernel mapping, of a VM that is hidden as a whole), unmapped (no mapping was "
        "found, of a VM that is exposed or unknown), exposed (the kernel maps it), unknown (it could not be judged), "
        "unpopulated (no page there yet), excluded (kept from the guest).",
    )
    direct = _Family("offmap_direct_map_bytes", "Guest RAM in the host kernel's direct map.")
    alias = _Family(
        "offmap_alias_bytes",
        "Guest RAM mapped outside the direct map, by region of the kernel's addresses; counted for each mapping.",
    )
    canaries = _Family("offmap_canaries_found", "Planted secrets that were read in kernel memory.")
    omitted = _Family("offmap_audit_omitted_vms", "VMs that have no series of their own here: there are too many.")
    for label, reports in hosts:
        failures = [failure for report in reports for failure in report.not_audited]
        audited = [vm for report in reports for vm in report.vms]
        audited.sort(key=lambda vm: (vm.verdict.gravity, vm.pages.mapped_pages), reverse=True)
        room = max(LISTED - len(failures), 0)
        for failure in failures[:LISTED]:
            verdict.verdict(Verdict.UNKNOWN, _vm_labels(failure, label))
        for vm in audited[:room]:
            labels = _vm_labels(vm, label)
            verdict.verdict(vm.verdict, labels)
            for state, pages in _states(vm).items():
                ram.add(pages * PAGE_SIZE, {**labels, "state": state})
            direct.add(vm.pages.direct_map_pages * PAGE_SIZE, labels)
            for region, pages in list(vm.alias_pages_by_region.items())[:_REGIONS]:
                alias.add(pages * PAGE_SIZE, {**labels, "region": region})
            if vm.pages.canaries_found is not None:
                canaries.add(vm.pages.canaries_found, labels)
        omitted.add(len(audited) + len(failures) - min(len(audited), room) - min(len(failures), LISTED), label)
    return verdict, ram, direct, alias, canaries, omitted


def _states(vm: AuditResult) -> dict[str, int]:
    """Pages by state. Every VM has a series for each state, so no stale series remains when its verdict changes."""
    states = vm.pages_by_state
    unmapped = 0 if vm.verdict is Verdict.HIDDEN else states["hidden"]
    return states | {"hidden": states["hidden"] - unmapped, "unmapped": unmapped}


def _vm_labels(vm: AuditResult | NotAudited, label: Labels) -> Labels:
    return {**label, "pid": vm.pid, "process": vm.process, "vmm": vm.vmm.vmm}
