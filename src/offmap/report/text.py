"""An audit as text: one line of verdict, then a short table."""

from offmap.audit.audit import AuditResult
from offmap.audit.scan import ScanResult
from offmap.audit.verdict import Verdict
from offmap.units import format_size

__all__ = ["render_audit", "verdict_line"]

PAGE = 4096
_SHOWN = 8  # lines of detail per list; --json has them all


def verdict_line(result: AuditResult) -> str:
    """The verdict of one audit, with the figures it rests on."""
    pages = result.pages
    who = f"{_plain(result.process)} ({result.pid})"
    if result.verdict is Verdict.HIDDEN:
        line = f"HIDDEN: none of the {pages.pages_populated} guest pages of {who} is mapped in the host kernel"
    elif result.verdict is Verdict.EXPOSED and pages.mapped_pages:
        line = (
            f"EXPOSED: {pages.mapped_pages} of {pages.pages_populated} guest pages of {who} "
            f"({format_size(pages.mapped_pages * PAGE)}) are mapped in the host kernel"
        )
    elif result.verdict is Verdict.EXPOSED:
        line = f"EXPOSED: canaries of {who} are readable in kernel memory, though no mapping of its pages was found"
    else:
        line = f"UNKNOWN: it cannot be determined whether the guest pages of {who} are mapped in the host kernel"
    if result.scan is not None:
        count = len(result.scan.found)
        line += f"; {count} {'canary' if count == 1 else 'canaries'} found"
    return line


def render_audit(result: AuditResult) -> str:
    """The whole report; ends without a newline."""
    pages = result.pages
    rows = [
        ("guest RAM", pages.ram_pages, ""),
        ("populated", pages.pages_populated, ""),
        ("in the direct map", pages.direct_map_pages, ""),
        ("aliased elsewhere", pages.alias_pages, _regions(result)),
        ("unknown", pages.unknown_pages, ""),
        ("not populated", pages.not_populated_pages, "no page there, nothing to hide"),
    ]
    if pages.excluded_pages:
        rows.append(("kept from the guest", pages.excluded_pages, f"{pages.excluded_mapped_pages} of them mapped"))
    lines = [verdict_line(result), ""]
    for name, count, remark in rows:
        lines.append(f"  {name:<20} {count:>9} pages  {format_size(count * PAGE):>10}  {remark}".rstrip())
    lines += [f"    unknown: {reason} ({count} pages)" for reason, count in pages.reasons.items()]
    lines.append("")
    for part in result.ram.ranges[:_SHOWN]:
        backend = f", {part.backend}" if part.backend else ""
        lines.append(f"  {part.source.value:<8} {part.va:#014x} {format_size(part.bytes)}{backend}")
    lines += _more(len(result.ram.ranges), "ranges")
    for alias in result.aliases[:_SHOWN]:
        rights = f"r{'w' if alias.writable else '-'}{'x' if alias.executable else '-'}"
        lines.append(
            f"  alias    {alias.va:#018x} -> {alias.pa:#x} {format_size(alias.bytes)} {rights} "
            f"{format_size(alias.page_size)} pages, {alias.region}"
        )
    lines += _more(len(result.aliases), "aliases")
    tables = sum(result.mappings.tables.values())
    lines.append(
        f"  walk     {tables} tables in {result.levels} levels, {len(result.mappings.runs)} runs, "
        f"{result.mappings.seconds:.2f} s"
    )
    if result.scan is not None:
        lines += _scan(result.scan)
    lines += [f"  note     {note}" for note in result.notes]
    return "\n".join(_plain(line) for line in lines)


def _plain(text: str) -> str:
    """Without what moves a terminal's cursor: names that the audited process chose must not write another verdict."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _regions(result: AuditResult) -> str:
    return ", ".join(f"{region}: {count}" for region, count in result.alias_pages_by_region.items())


def _more(count: int, what: str) -> list[str]:
    return [f"           and {count - _SHOWN} more {what} (--json has all)"] if count > _SHOWN else []


def _scan(scan: ScanResult) -> list[str]:
    lines = [
        f"  scan     {format_size(scan.bytes_scanned)} read in {scan.seconds:.1f} s, "
        f"{format_size(scan.bytes_unread)} mapped but not readable through /proc/kcore"
    ]
    found = sorted(scan.found.items(), key=lambda item: item[0].number)
    for canary, places in found[:_SHOWN]:
        where = places[0]
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        owner = "" if where.in_guest else ", not a guest page"
        lines.append(f"  canary   {canary.number:04x} at {where.va:#018x}, {where.region}{owner}{more}")
    lines += _more(len(found), "canaries")
    return lines
