"""Audits as text: one line of verdict, then a short table; 80 columns."""

import textwrap
from collections.abc import Iterable, Sequence

from offmap.audit.reach import Kind, Reach
from offmap.audit.report.hosts import HostReport
from offmap.audit.result import AuditResult
from offmap.audit.scan_result import Place, Scan
from offmap.audit.verdict import Verdict, worst
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

_SHOWN = 8  # lines of detail per list; --json has them all
_COLUMNS = 80

KIND_NAMES = {
    Kind.DIRECT_MAP: "direct map",
    "kernel_image": "kernel image",
    "module": "module",
    "vmalloc": "vmalloc",
    "vmap": "vmap",
    "memremap": "memremap",
    "ioremap": "ioremap",
    "vmalloc_space": "vmalloc space",
    "vmemmap": "vmemmap",
    "fixmap": "fixmap",
    "cpu_entry_area": "cpu_entry_area",
    "espfix": "%esp fixup stacks",
    "efi": "EFI",
    "ldt_remap": "LDT remap",
    "kasan": "KASAN shadow",
    "vsyscall": "vsyscall page",
    "other": "elsewhere",
}
"""audit.reach.Kind for people."""

_STYLE = {Verdict.HIDDEN: "1;32", Verdict.EXPOSED: "1;31", Verdict.UNKNOWN: "1;33"}  # ECMA-48 SGR: bold, and a colour


def state_names(vm: AuditResult) -> dict[str, str]:
    """Names for people of the states in AuditResult.pages_by_state.

    A page without a mapping is called hidden only if the whole VM is hidden.
    """
    return {
        "exposed": "mapped by the kernel",
        "unknown": "unknown",
        "hidden": "hidden" if vm.verdict is Verdict.HIDDEN else "no mapping found",
        "unpopulated": "not populated",
        "excluded": "kept from the guest",
    }


def verdict_line(vm: AuditResult) -> str:
    """The verdict on one VM, with the figures it rests on."""
    pages = vm.pages
    who = f"{vm.process} ({vm.pid})"
    if vm.verdict is Verdict.HIDDEN:
        line = f"HIDDEN: none of the {pages.pages_populated} guest pages of {who} is mapped"
    elif vm.verdict is Verdict.EXPOSED and pages.mapped_pages:
        line = f"EXPOSED: {pages.mapped_pages} of {pages.pages_populated} guest pages of {who} are mapped"
    elif vm.verdict is Verdict.EXPOSED:
        line = f"EXPOSED: secrets of {who} are readable in kernel memory, though no mapping of its pages was found"
    else:
        line = f"UNKNOWN: it cannot be told if guest pages of {who} are mapped"
    if vm.scan is not None:
        line += f"; {vm.scan.count} found"
    return line


def fleet_line(reports: Sequence[HostReport]) -> str:
    """The verdict on all VMs of some hosts."""
    verdicts = [verdict for report in reports for verdict in report.verdicts]
    whole = worst(report.verdict for report in reports)
    hosts = {report.host.name for report in reports}
    where = f"on {next(iter(hosts)) or 'this host'}" if len(hosts) == 1 else f"on {len(hosts)} hosts"
    total = len(verdicts)
    if whole is None:
        return f"NO VM: no process {where} holds a KVM VM"
    count = verdicts.count(whole)
    if whole is Verdict.HIDDEN:
        return f"HIDDEN: no page of {_vms(total)} {where} is mapped by the host kernel"
    if whole is Verdict.EXPOSED:
        return f"EXPOSED: the host kernel maps guest memory of {count} of {_vms(total)} {where}"
    if any(report.failed for report in reports):
        return f"UNKNOWN: the audit {where} failed, so that nothing is known"
    if count:
        return f"UNKNOWN: {count} of {_vms(total)} {where} could not be judged; none is known to be exposed"
    return f"UNKNOWN: there may be VMs {where} that were not audited; none is known to be exposed"


def _vms(count: int) -> str:
    return f"{count} VM{'' if count == 1 else 's'}"


def render_vm(vm: AuditResult, color: bool = False) -> str:
    """The report on one VM; ends without a newline.

    Args:
        color: the reader is a terminal.
    """
    lines = [_colored(verdict_line(vm), vm.verdict, color), ""]
    if vm.partial:
        lines += _wrapped("partial", vm.partial)
    lines.append(_row("guest RAM", vm.pages.ram_pages))
    names = state_names(vm)
    for state, pages in vm.pages_by_state.items():
        if not pages and state == "excluded":
            continue
        lines.append(_row(names[state], pages, _remark(vm, state)))
        if state == "unknown":
            for reason, count in vm.pages.unknown_reasons.items():
                lines += _wrapped("", f"{count} pages: {reason}", indent="      ")
    lines += _mapped_by(vm)
    lines.append("")
    for part in vm.ranges[:_SHOWN]:
        backend = f", {part.backend}" if part.backend else ""
        guest = "" if part.guest_phys_addr is None else f" at guest {part.guest_phys_addr:#x}"
        lines += _wrapped(part.source, f"{part.va:#x} {format_size(part.bytes)}{guest}{backend}")
    lines += _more(len(vm.ranges), "ranges")
    for alias in vm.aliases[:_SHOWN]:
        lines += _wrapped("alias", _mapping(alias))
    lines += _more(len(vm.aliases) + vm.aliases_omitted, "aliases")
    if vm.sharing is not None and vm.sharing.shared_pages:
        others = [f"{each.process} ({each.pid}): {each.pages}" for each in (vm.sharing.processes or ())[:_SHOWN]]
        lines += _wrapped(
            "shared", f"{vm.sharing.shared_pages} pages with other processes {', '.join(others)}".rstrip()
        )
    lines += _wrapped(
        "walk",
        f"{sum(vm.walk.tables.values())} tables in {vm.walk.levels} levels, {vm.walk.runs} runs, "
        f"{vm.walk.seconds:.2f} s",
    )
    if vm.sandbox is not None:
        lines += _wrapped("sandbox", str(vm.sandbox))
    if vm.scan is not None:
        lines += _scan(vm.scan)
    if vm.oracle is not None:
        lines += _wrapped("oracle", str(vm.oracle))
    for note in vm.notes:
        lines += _wrapped("note", note)
    return "\n".join(lines)


def _row(name: str, pages: int, remark: str = "") -> str:
    return f"  {name:<20} {pages:>10} pages  {format_size(pages * PAGE_SIZE):>10}  {remark}".rstrip()


def _remark(vm: AuditResult, state: str) -> str:
    pages = vm.pages
    if state == "unpopulated" and pages.not_populated_pages:
        return "no page there yet"
    if state == "excluded":
        return f"{pages.excluded_mapped_pages} of them mapped"
    return ""


def _mapped_by(vm: AuditResult) -> list[str]:
    """What maps the guest's pages, a line for each sort of mapping."""
    pages = vm.pages
    if not pages.mapped_pages:
        return []
    lines = ["", f"  {'mapped by':<20} {'pages':>10}  {'size':>10}  of pages  rights  ranges"]
    if pages.direct_map_pages and not any(total.kind == Kind.DIRECT_MAP for total in vm.reach):
        lines.append(
            f"  {'direct map':<20} {pages.direct_map_pages:>10}  {format_size(pages.direct_map_pages * PAGE_SIZE):>10}"
        )
    for total in vm.reach[:_SHOWN]:
        lines.append(
            f"  {KIND_NAMES.get(total.kind, total.region)[:20]:<20} {total.pages:>10}  "
            f"{format_size(total.pages * PAGE_SIZE):>10}  {format_size(total.page_size):<8}  "
            f"{total.rights:<6}  {total.ranges:>6}"
        )
        if total.caller:
            lines += _wrapped("", f"by {total.caller}", indent="      ")
    return [*lines, *_more(len(vm.reach), "sorts of mappings")]


def _mapping(mapping: Reach) -> str:
    kind = KIND_NAMES.get(mapping.kind, mapping.region)
    return f"{mapping.va:#x} -> {mapping.pa:#x} {format_size(mapping.bytes)} {mapping.rights} {kind}"


def _scan(scan: Scan) -> list[str]:
    lines = _wrapped(
        "scan",
        f"{format_size(scan.bytes_scanned)} read in {scan.seconds:.1f} s, "
        f"{format_size(scan.bytes_unread)} mapped but not readable through /proc/kcore",
    )
    for hit in scan.found[:_SHOWN]:
        for place in hit.places[:1]:
            more = f" and {len(hit.places) - 1} more" if len(hit.places) > 1 else ""
            lines += _wrapped("canary", f"{hit.canary:04x} at {_place(place)}{more}")
    lines += _more(len(scan.found), "canaries")
    for place in scan.places[:_SHOWN]:
        lines += _wrapped("secret", f"at {_place(place)}")
    return lines + _more(len(scan.places), "places")


def _place(place: Place) -> str:
    return f"{place.va:#x}, {place.region}: {place.described_owner}"


def render_fleet(reports: Sequence[HostReport], color: bool = False) -> str:
    """The report on all VMs of one or more hosts, a line for each VM, the gravest first; ends without a newline."""
    reports = sorted(reports, key=lambda report: -1 if report.verdict is None else report.verdict.gravity, reverse=True)
    lines = [_colored(fleet_line(reports), worst(report.verdict for report in reports), color)]
    rows = [(report, vm) for report in reports for vm in report.vms]
    by_host = len({report.host.name for report in reports}) > 1
    if rows or any(report.not_audited for report in reports):
        host = f"{'host':<14} " if by_host else ""
        lines += ["", f"  {host}{'VM':<{_vm_width(by_host)}} verdict {'RAM':>9} {'mapped':>9} {'unknown':>9}"]
    for report in reports:
        for vm in sorted(report.vms, key=lambda vm: vm.verdict.gravity, reverse=True):
            states = vm.pages_by_state
            sizes = (vm.pages.ram_pages, states["exposed"], states["unknown"])
            figures = " ".join(f"{format_size(pages * PAGE_SIZE):>9}" for pages in sizes)
            lines.append(_fleet_row(report, vm.process, vm.pid, vm.verdict, figures, by_host, color))
        for failure in report.not_audited:
            unseen = " ".join(f"{'-':>9}" for _ in range(3))
            lines.append(_fleet_row(report, failure.process, failure.pid, Verdict.UNKNOWN, unseen, by_host, color))
    notes = [*_fleet_notes(reports, by_host)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _vm_width(by_host: bool) -> int:
    return 24 if by_host else 32


def _fleet_row(
    report: HostReport, process: str, pid: int, verdict: Verdict, figures: str, by_host: bool, color: bool
) -> str:
    width = _vm_width(by_host)
    name = f"{process[: width - len(str(pid)) - 3]} ({pid})"
    host = f"{_cut(report.host.name, 14):<14} " if by_host else ""
    return f"  {host}{name:<{width}} {_colored(f'{verdict.value:<7}', verdict, color)} {figures}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _fleet_notes(reports: Sequence[HostReport], by_host: bool) -> Iterable[str]:
    for report in reports:
        host = f"{report.host.name}: " if by_host else ""
        for note in report.notes:
            yield from _wrapped("note", host + note)
        for failure in report.not_audited:
            yield from _wrapped("note", f"{host}{failure.process} ({failure.pid}) was not audited: {failure.reason}")
        for vm in report.vms:
            for note in ([vm.partial] if vm.partial else []) + list(vm.notes):
                yield from _wrapped("note", f"{host}{vm.process} ({vm.pid}): {note}")


def _wrapped(word: str, text: str, indent: str = "") -> list[str]:
    """A line that begins with `word`, broken where 80 columns end."""
    first = indent or f"  {word:<8} "
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=" " * (len(first) + 2 * bool(indent)),
        break_on_hyphens=False,
    )


def _more(count: int, what: str) -> list[str]:
    return [f"           and {count - _SHOWN} more {what} (--json has more)"] if count > _SHOWN else []


def _colored(line: str, verdict: Verdict | None, color: bool) -> str:
    """`line` with its first word in the verdict's colour."""
    if not color or verdict is None:
        return line
    word, colon, rest = line.partition(":")
    return f"\x1b[{_STYLE[verdict]}m{word}\x1b[0m{colon}{rest}"
