"""Audits as one page of HTML. The template gets dictionaries of text and numbers.

All lists are bounded. Where a list is cut, the gravest come first.
"""

from collections.abc import Iterable, Sequence

from offmap.audit.report.drawing import drawings
from offmap.audit.report.hosts import HostReport
from offmap.audit.report.text import fleet_line, verdict_line
from offmap.audit.report.vm_view import NOTES, View, mapping_view, notes_of, reasons_of, secrets_of, size_of, vm_view
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import NotAudited
from offmap.audit.verdict import Verdict, worst
from offmap.report.html import render_page
from offmap.units import format_size

ROWS = 2000  # VMs in the table
HOSTS = 100  # hosts with a section of their own
DETAILS = 48  # VMs of a host with a section of their own
MAPPINGS = 400  # rows of a host's table of mappings
_SECRETS = 200
_OPEN = 4  # sections that are open from the start

_WORDS = {Verdict.HIDDEN: "HIDDEN", Verdict.EXPOSED: "EXPOSED", Verdict.UNKNOWN: "UNKNOWN", None: "NO VM"}
_RANK = {Verdict.EXPOSED: 0, Verdict.UNKNOWN: 1, Verdict.HIDDEN: 2, None: 3}


def render_html(reports: Sequence[HostReport]) -> str:
    """The page of one VM, of one host or of many hosts."""
    return render_page("audit.html.j2", _page_view(reports), ["style.css"], "page.js", "offmap.audit.report")


def _page_view(reports: Sequence[HostReport]) -> View:
    reports = sorted(reports, key=lambda report: (_RANK[report.verdict], report.host.name))
    single = len(reports) == 1 and len(reports[0].vms) == 1 and reports[0].verdict is reports[0].vms[0].verdict
    by_host = len(reports) > 1
    whole = worst(report.verdict for report in reports)
    names = list(dict.fromkeys(report.host.name for report in reports))
    title = names[0] or "this host" if len(names) == 1 else f"{len(names)} hosts"
    if single:
        title = f"{_who(reports[0].vms[0])} on {title}"
    line = verdict_line(reports[0].vms[0]) if single else fleet_line(reports)
    rows = sorted(_rows(reports), key=lambda row: (row["rank"], row["host"], row["pid"]))
    times = sorted(report.time for report in reports)
    return {
        "title": title,
        "word": _WORDS[whole],
        "verdict": _css(whole),
        "line": line.partition(": ")[2],
        "when": _time(times[0]) if times[0] == times[-1] else f"{_time(times[0])} to {_time(times[-1])}",
        "versions": ", ".join(dict.fromkeys(report.offmap for report in reports)),
        "schemas": ", ".join(dict.fromkeys(report.schema for report in reports)),
        "lab": all(report.host.lab for report in reports),
        "figures": _figures(reports),
        "notes": list(_page_notes(reports, by_host, single))[:NOTES],
        "summary": [_summary(report) for report in reports[:ROWS]],
        "table": [] if single else rows[:ROWS],
        "table_title": f"VMs of {len(names)} hosts" if by_host else "VMs of this host",
        "more_rows": 0 if single else max(len(rows) - ROWS, 0),
        "scanned": any(vm.scan is not None for report in reports for vm in report.vms),
        "by_host": by_host,
        "hosts": [
            _host(report, single, at < _OPEN and report.verdict not in {Verdict.HIDDEN, None})
            for at, report in enumerate(reports[:HOSTS])
        ],
        "more_hosts": max(len(reports) - HOSTS, 0),
    }


def _css(verdict: Verdict | None) -> str:
    return "none" if verdict is None else verdict.value


def _who(vm: AuditResult | NotAudited) -> str:
    return f"{vm.process} ({vm.pid})"


def _time(text: str) -> str:
    return text.replace("T", " ").replace("Z", " UTC")


def _figures(reports: Sequence[HostReport]) -> list[View]:
    """The few numbers that stand beside the verdict."""
    vms = [vm for report in reports for vm in report.vms]
    states: dict[str, int] = {}
    for vm in vms:
        for state, pages in vm.pages_by_state.items():
            states[state] = states.get(state, 0) + pages
    ram = sum(vm.pages.ram_pages for vm in vms)
    hidden = "hidden" if all(vm.verdict is Verdict.HIDDEN for vm in vms) else "no mapping found"
    found = [
        ("guest RAM", ram),
        ("mapped by the kernel", states.get("exposed", 0)),
        ("unknown", states.get("unknown", 0)),
        (hidden, states.get("hidden", 0)),
    ]
    figures: list[View] = [{"name": name, "value": size_of(pages)} for name, pages in found] if vms else []
    if len(vms) > 1:
        figures.insert(0, {"name": "VMs audited", "value": f"{len(vms)}"})
    if missed := sum(len(report.not_audited) for report in reports):
        figures.append({"name": "VMs not audited", "value": f"{missed}"})
    return figures


def _page_notes(reports: Iterable[HostReport], by_host: bool, single: bool) -> Iterable[str]:
    """Warnings about the verdict, which stand before everything else."""
    for report in reports:
        host = f"{report.host.name}: " if by_host else ""
        for note in report.notes:
            yield host + note
        for failure in report.not_audited:
            yield f"{host}{_who(failure)} was not audited, so its memory is unknown: {failure.reason}"
        if single:
            for vm in report.vms:
                yield from reasons_of(vm)
                yield from notes_of(vm)


def _summary(report: HostReport) -> View:
    """The line of a host among others."""
    verdicts = report.verdicts
    return {
        "name": report.host.name,
        "verdict": _css(report.verdict),
        "rank": _RANK[report.verdict],
        "counts": [
            len(verdicts),
            *(verdicts.count(each) for each in (Verdict.EXPOSED, Verdict.UNKNOWN, Verdict.HIDDEN)),
        ],
        "kernel": report.host.kernel,
        "when": f"{_time(report.time)[:16]} UTC",
        "offmap": report.offmap,
    }


def _rows(reports: Iterable[HostReport]) -> Iterable[View]:
    for report in reports:
        for vm in report.vms:
            states = vm.pages_by_state
            pages = (vm.pages.ram_pages, states["exposed"], vm.pages.alias_pages, states["unknown"], states["hidden"])
            sizes = [(size_of(count), count) for count in pages]
            found = "not looked for" if vm.scan is None else vm.scan.count
            yield _row(report, vm, vm.verdict, vm.partial or "", sizes, found)
        for failure in report.not_audited:
            yield _row(report, failure, Verdict.UNKNOWN, failure.reason, [("-", -1)] * 5, "-")


def _row(
    report: HostReport,
    vm: AuditResult | NotAudited,
    verdict: Verdict,
    reason: str,
    sizes: list[tuple[str, int]],
    found: str | int,
) -> View:
    """A row of the table of VMs."""
    return {
        "host": report.host.name,
        "verdict": verdict.value,
        "rank": _RANK[verdict],
        "process": vm.process,
        "pid": vm.pid,
        "vmm": vm.vmm.vmm,
        "reason": reason,
        "sizes": sizes,
        "found": found,
    }


def _host(report: HostReport, single: bool, opened: bool) -> View:
    vms = sorted(report.vms, key=lambda vm: (_RANK[vm.verdict], -vm.pages.mapped_pages, vm.pid))
    mappings = [(vm, mapping) for vm in vms for mapping in (*vm.aliases, *vm.direct_map_ranges)]
    every = len(mappings) + sum(vm.aliases_omitted + vm.direct_map_ranges_omitted for vm in vms)
    shown = mappings[:MAPPINGS]
    caption = f"Guest memory by kernel address, {every:,} ranges in all; aliases of each VM first."
    if every > len(shown):
        caption = f"The first {len(shown)} of {every:,} ranges, aliases of each VM first; the JSON result has more."
    return {
        "name": report.host.name or "this host",
        "verdict": _css(report.verdict),
        "open": opened,
        "single": single,
        "notes": [*report.notes][:NOTES],
        "pictures": drawings(report),
        "vms": [
            vm_view(vm, single, at < _OPEN and vm.verdict is not Verdict.HIDDEN) for at, vm in enumerate(vms[:DETAILS])
        ],
        "more_vms": max(len(vms) - DETAILS, 0),
        "mappings": [mapping_view(vm, mapping) for vm, mapping in shown],
        "mappings_caption": caption,
        "secrets": list(secrets_of(vms))[:_SECRETS],
        "facts": _facts(report),
    }


def _facts(report: HostReport) -> list[tuple[str, str]]:
    host = report.host
    facts = [
        ("name", host.name),
        ("kernel", host.kernel),
        ("CPU", host.cpu),
        ("microcode", host.microcode),
        ("memory", format_size(host.memory_bytes)),
        ("command line", host.cmdline),
        ("disposable lab host", "yes" if host.lab else "no"),
        ("audited", _time(report.time) + (f", in {report.seconds:.1f} s" if report.vms else "")),
        ("by", f"offmap {report.offmap}, {report.schema}" + (f", from {report.source}" if report.source else "")),
    ]
    if report.vms:
        walk = report.vms[-1].walk
        pages = ", ".join(
            f"{format_size(size)} in {name} pages" for name, size in walk.direct_map_bytes.items() if size
        )
        facts.append(("direct map", pages))
    return [(name, value) for name, value in facts if value]
