"""What the HTML page says, worked out: plain dictionaries of text and numbers for the template, all lists bounded.

The gravest comes first wherever a list is cut.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from offmap.audit.verdict import Verdict
from offmap.report.document import DIRECT_MAP, PAGE, Mapping, NotAudited, Vm
from offmap.report.drawing import drawings
from offmap.report.hosts import HostReport, worst
from offmap.report.physmap import look_of_kind
from offmap.report.text import KIND_NAMES, fleet_line, state_names, verdict_line
from offmap.units import format_size

__all__ = ["page_view"]

ROWS = 2000  # VMs in the table
HOSTS = 100  # hosts with a section of their own
DETAILS = 48  # VMs of a host with a section of their own
MAPPINGS = 400  # rows of a host's table of mappings
_RANGES = 64
_SECRETS = 200
_NOTES = 40
_OPEN = 4  # sections that are open from the start

_WORDS = {Verdict.HIDDEN: "HIDDEN", Verdict.EXPOSED: "EXPOSED", Verdict.UNKNOWN: "UNKNOWN", None: "NO VM"}
_RANK = {Verdict.EXPOSED: 0, Verdict.UNKNOWN: 1, Verdict.HIDDEN: 2, None: 3}

View = dict[str, Any]


def page_view(reports: Sequence[HostReport]) -> View:
    """All that the template needs, as it names it."""
    reports = sorted(reports, key=lambda report: (_RANK[report.verdict], report.host.name))
    single = len(reports) == 1 and len(reports[0].vms) == 1 and not reports[0].not_audited
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
        "notes": list(_page_notes(reports, by_host, single))[:_NOTES],
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


def _who(vm: Vm | NotAudited) -> str:
    return f"{vm.process} ({vm.pid})"


def _time(text: str) -> str:
    return text.replace("T", " ").replace("Z", " UTC")


def _size(pages: int) -> str:
    return format_size(pages * PAGE)


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
    figures = [{"name": name, "value": _size(pages)} for name, pages in found] if vms else []
    if len(vms) > 1:
        figures.insert(0, {"name": "VMs audited", "value": f"{len(vms)}"})
    if missed := sum(len(report.not_audited) for report in reports):
        figures.append({"name": "VMs not audited", "value": f"{missed}"})
    return figures


def _page_notes(reports: Iterable[HostReport], by_host: bool, single: bool) -> Iterable[str]:
    """Why a verdict is not what it could be, before the reader goes on."""
    for report in reports:
        host = f"{report.host.name}: " if by_host else ""
        for note in report.notes:
            yield host + note
        for failure in report.not_audited:
            yield f"{host}{_who(failure)} was not audited, so its memory is unknown: {failure.reason}"
        if single:
            for vm in report.vms:
                yield from _reasons(vm)
                yield from _notes(vm)


def _reasons(vm: Vm) -> list[str]:
    return [f"{count:,} pages are unknown: {reason}" for reason, count in vm.pages.unknown_reasons.items()][:_NOTES]


def _notes(vm: Vm) -> list[str]:
    return [*([f"This is a partial result: {vm.partial}"] if vm.partial else []), *vm.notes][:_NOTES]


def _rows(reports: Iterable[HostReport]) -> Iterable[View]:
    for report in reports:
        common = {"host": report.host.name, "kernel": report.host.kernel, "when": f"{_time(report.time)[:16]} UTC"}
        for vm in report.vms:
            states = vm.pages_by_state
            sizes = (vm.pages.ram_pages, states["exposed"], vm.pages.alias_pages, states["unknown"], states["hidden"])
            yield {
                **common,
                "verdict": vm.verdict.value,
                "rank": _RANK[vm.verdict],
                "process": vm.process,
                "pid": vm.pid,
                "vmm": vm.vmm.vmm,
                "reason": vm.partial or "",
                "sizes": [(_size(pages), pages) for pages in sizes],
                "found": "not looked for" if vm.scan is None else vm.scan.count,
            }
        for failure in report.not_audited:
            yield {
                **common,
                "verdict": Verdict.UNKNOWN.value,
                "rank": _RANK[Verdict.UNKNOWN],
                "process": failure.process,
                "pid": failure.pid,
                "vmm": failure.vmm.vmm,
                "reason": failure.reason,
                "sizes": [("-", -1)] * 5,
                "found": "-",
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
        "notes": [*report.notes][:_NOTES],
        "pictures": drawings(report),
        "vms": [
            _vm(vm, single, at < _OPEN and vm.verdict is not Verdict.HIDDEN) for at, vm in enumerate(vms[:DETAILS])
        ],
        "more_vms": max(len(vms) - DETAILS, 0),
        "mappings": [_mapping(vm, mapping) for vm, mapping in shown],
        "mappings_caption": caption,
        "secrets": list(_secrets(vms))[:_SECRETS],
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
        ("audited", f"{_time(report.time)}, in {report.seconds:.1f} s"),
        ("by", f"offmap {report.offmap}, {report.schema}" + (f", from {report.source}" if report.source else "")),
    ]
    if report.vms:
        walk = report.vms[-1].walk
        pages = ", ".join(
            f"{format_size(size)} in {name} pages" for name, size in walk.direct_map_bytes.items() if size
        )
        facts.append(("direct map", pages))
    return [(name, value) for name, value in facts if value]


def _vm(vm: Vm, single: bool, opened: bool) -> View:
    names = state_names(vm)
    looks = {"hidden": "hidden" if vm.verdict is Verdict.HIDDEN else "unmapped"}
    parts, x = [], 0.0
    ram = max(vm.pages.ram_pages, 1)
    for state, pages in vm.pages_by_state.items():
        # A sliver of what is grave must be seen: at least 4 of 1000.
        width = max(1000 * pages / ram, 4.0) if pages else 0.0
        parts.append(
            {
                "look": looks.get(state, state),
                "name": names[state],
                "pages": pages,
                "size": _size(pages),
                "share": _share(pages, ram),
                "x": round(min(x, 1000 - width), 2),
                "width": round(width, 2),
            }
        )
        x += width
    return {
        "open": opened,
        "verdict": vm.verdict.value,
        "line": verdict_line(vm).partition(": ")[2],
        "parts": parts,
        "bar_label": ", ".join(f"{part['name']} {part['size']}" for part in parts if part["pages"]),
        "reasons": [] if single else _reasons(vm),  # those of a single VM stand at the top
        "notes": [] if single else _notes(vm),
        "reach": [
            {
                "look": look_of_kind(total.kind).value,
                "name": KIND_NAMES.get(total.kind, total.kind),
                "region": total.region,
                "pages": total.pages,
                "size": _size(total.pages),
                "page_size": format_size(total.page_size),
                "page_bytes": total.page_size,
                "rights": total.rights,
                "ranges": total.ranges,
                "caller": total.caller,
            }
            for total in sorted(vm.reach, key=lambda total: (total.kind != DIRECT_MAP, -total.pages))[:_RANGES]
        ],
        "ranges": [
            {
                "source": {"memslot": "memory slot", "range": "the user", "guess": "a guess"}.get(
                    part.source, part.source
                ),
                "va": f"{part.va:#x}",
                "bytes": part.bytes,
                "size": format_size(part.bytes),
                "guest": "" if part.guest_phys_addr is None else f"{part.guest_phys_addr:#x}",
                "backend": part.backend,
            }
            for part in vm.ranges[:_RANGES]
        ],
        "more_ranges": max(len(vm.ranges) - _RANGES, 0),
        "facts": _vm_facts(vm),
    }


def _vm_facts(vm: Vm) -> list[tuple[str, str]]:
    walk = vm.walk
    tables = sum(walk.tables.values())
    facts = [
        (
            "VMM",
            " ".join(filter(None, (vm.vmm.vmm, vm.vmm.executable, f"{vm.vmm.vcpus} vCPUs" if vm.vmm.vcpus else ""))),
        ),
        ("walk", f"{tables:,} tables in {walk.levels} levels, {walk.runs:,} runs of mappings, {walk.seconds:.3f} s"),
    ]
    for span in walk.unreadable[:4]:
        facts.append(("not walked", f"{span.va:#x}, {format_size(span.bytes)}: {span.reason}"))
    if vm.sharing is not None:
        count = vm.sharing.shared_pages
        text = f"{count:,} pages are mapped by other processes too" if count else "no page is mapped by another process"
        if vm.sharing.processes:
            text += ": " + ", ".join(
                f"{each.process} ({each.pid}): {each.pages:,}" for each in vm.sharing.processes[:8]
            )
        if vm.sharing.uncounted_pages:
            text += f"; of {vm.sharing.uncounted_pages:,} it cannot be counted"
        facts.append(("sharing", text))
    if vm.scan is not None:
        facts.append(
            (
                "scan",
                f"{format_size(vm.scan.bytes_scanned)} of kernel mappings read in {vm.scan.seconds:.1f} s, "
                f"{format_size(vm.scan.bytes_unread)} mapped but not readable there; {vm.scan.count} found",
            )
        )
    return facts


def _share(pages: int, ram: int) -> str:
    """Of all: never 0 % of something, nor 100 % of less than all."""
    share = 100 * pages / ram
    if pages and share < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if pages < ram and share > 99.9 else f"{share:.1f} %".replace(".0 %", " %")


def _mapping(vm: Vm, mapping: Mapping) -> View:
    return {
        "pid": vm.pid,
        "look": look_of_kind(mapping.kind).value,
        "name": KIND_NAMES.get(mapping.kind, mapping.kind),
        "va": f"{mapping.va:#018x}",
        "pa": f"{mapping.pa:#x}",
        "user": f"{mapping.userspace_addr:#x}" if mapping.userspace_addr else "",
        "guest": "" if mapping.guest_phys_addr is None else f"{mapping.guest_phys_addr:#x}",
        "bytes": mapping.bytes,
        "size": format_size(mapping.bytes),
        "page_size": format_size(mapping.page_size),
        "page_bytes": mapping.page_size,
        "rights": mapping.rights,
        "caller": mapping.caller,
    }


def _secrets(vms: Iterable[Vm]) -> Iterable[View]:
    for vm in vms:
        if vm.scan is None:
            continue
        hits = [(f"canary {hit.canary:04x}", place) for hit in vm.scan.found for place in hit.places]
        hits += [("the secret", place) for place in vm.scan.places]
        for name, place in hits:
            yield {
                "pid": vm.pid,
                "secret": name,
                "va": f"{place.va:#018x}",
                "pa": f"{place.pa:#x}",
                "region": place.region,
                "owner": place.said_owner,
            }
