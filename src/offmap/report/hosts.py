"""What was found on one host, and the worst of it.

A report that contradicts itself is refused: what calls itself hidden must have figures that say so too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus
from offmap.report.decode import Malformed, decode
from offmap.report.document import Host, NotAudited, Vm

__all__ = [
    "AUDIT",
    "AUDIT_ALL",
    "GRAVITY",
    "SHOWN",
    "TIME",
    "HostReport",
    "exit_status_of",
    "failed_report",
    "parse_report",
    "worst",
]

AUDIT, AUDIT_ALL = "offmap-audit/2", "offmap-audit-all/1"
SHOWN = 500  # of a VM's mappings; documents may have more
TIME = "%Y-%m-%dT%H:%M:%SZ"  # audit.host.utc_now


@dataclass(frozen=True)
class HostReport:
    """What was found on one host.

    Attributes:
        schema: of the JSON it came as.
        offmap: version that made it.
        time: when, as audit.host.utc_now says it.
        host: facts of the host; None where the audit failed before it could ask.
        vms: those that were audited.
        not_audited: those that could not be.
        notes: why there may be more VMs than were found, or why there was no audit at all.
        failed: there was no audit at all.
        source: the file it came from; empty for an audit that was just made.
    """

    schema: str
    offmap: str
    time: str
    host: Host
    vms: tuple[Vm, ...] = ()
    not_audited: tuple[NotAudited, ...] = ()
    notes: tuple[str, ...] = ()
    failed: bool = False
    source: str = ""
    document: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def verdict(self) -> Verdict | None:
        """The worst of its VMs; None if there is none, so that nothing had to be hidden."""
        verdicts = [vm.verdict for vm in self.vms]
        if self.not_audited or self.notes or self.failed:
            verdicts.append(Verdict.UNKNOWN)
        return worst(verdicts)

    @property
    def seconds(self) -> float:
        """What its audits took together."""
        return sum(vm.seconds for vm in self.vms)


GRAVITY = (None, Verdict.HIDDEN, Verdict.UNKNOWN, Verdict.EXPOSED)


def worst(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """Exposed before unknown before hidden; None if there is nothing to judge."""
    return max(verdicts, key=GRAVITY.index, default=None)


def exit_status_of(verdict: Verdict | None) -> ExitStatus:
    """No VM at all is nothing exposed."""
    return ExitStatus.DONE if verdict is None else verdict.exit_status


@dataclass(frozen=True)
class _Stamp:
    """What every result begins with."""

    schema: str
    offmap: str
    time: str
    host: Host


@dataclass(frozen=True)
class _All:
    """A result of ``--all``."""

    vms: tuple[Vm, ...]
    not_audited: tuple[NotAudited, ...]
    notes: tuple[str, ...]


def parse_report(document: Any, source: str = "") -> HostReport:
    """One host's report, of an ``offmap-audit/2`` or ``offmap-audit-all/1`` result.

    Args:
        document: what json.loads gave.
        source: name of the file.

    Raises:
        Malformed: it is none, or it contradicts itself.
    """
    if not isinstance(document, dict) or not isinstance(document.get("schema"), str):
        raise Malformed("it names no schema")
    if document["schema"] not in {AUDIT, AUDIT_ALL}:
        raise Malformed(f"its schema is {document['schema']!r:.80}, not {AUDIT} or {AUDIT_ALL}")
    stamp = decode(_Stamp, document)
    if stamp.schema == AUDIT:
        found = _All((decode(Vm, _shortened(document)),), (), ())
    else:
        vms = document.get("vms")
        found = decode(_All, document | {"vms": [_shortened(vm) for vm in vms] if isinstance(vms, list) else vms})
    try:
        datetime.strptime(stamp.time, TIME)
    except ValueError:
        raise Malformed(f"its time is {stamp.time!r:.40}") from None
    pids = [vm.pid for vm in found.vms] + [failure.pid for failure in found.not_audited]
    if len(pids) != len(set(pids)):
        raise Malformed("it has a VM twice")
    for vm in found.vms:
        _check(vm)
    return HostReport(
        stamp.schema,
        stamp.offmap,
        stamp.time,
        stamp.host,
        found.vms,
        found.not_audited,
        found.notes,
        source=source,
        document=document,
    )


def _shortened(vm: Any) -> Any:
    """A VM's result, its lists of mappings cut to what is ever shown: on large hosts they are most of it."""
    if not isinstance(vm, dict):
        return vm
    vm = dict(vm)
    for name in ("aliases", "direct_map_ranges"):
        ranges, omitted = vm.get(name), vm.get(f"{name}_omitted")
        if isinstance(ranges, list) and type(omitted) is int and len(ranges) > SHOWN:
            vm |= {name: ranges[:SHOWN], f"{name}_omitted": omitted + len(ranges) - SHOWN}
    return vm


def failed_report(offmap: str, time: str, host: Host, reason: str) -> HostReport:
    """The report of an audit that came to no result: unknown, whatever an earlier one had said."""
    return HostReport(AUDIT_ALL, offmap, time, host, notes=(reason,), failed=True)


def _check(vm: Vm) -> None:
    """What calls itself hidden must have figures that say so; figures must add up.

    Raises:
        Malformed: they don't.
    """
    pages = vm.pages
    where = f"VM {vm.pid}: "
    if min(vm.pages_by_state.values()) < 0 or any(cell.unmapped_pages < 0 for cell in vm.physical.cells):
        raise Malformed(where + "its pages do not add up")
    mapped = pages.mapped_pages or (
        not pages.excluded_mapped_pages and any(cell.mapped_pages for cell in vm.physical.cells)
    )
    speaks_against = (
        mapped,
        pages.unknown_pages or any(cell.unknown_pages for cell in vm.physical.cells),
        not pages.pages_populated,
        pages.direct_map_pages or pages.alias_pages or pages.excluded_direct_pages,
        vm.reach or vm.aliases or vm.direct_map_ranges,
        vm.walk.unreadable,
        pages.canaries_found or (vm.scan is not None and vm.scan.found),
        vm.partial,
        any(part.source == "guess" for part in vm.ranges),
    )
    if vm.verdict is Verdict.HIDDEN and any(speaks_against):
        raise Malformed(where + "it says hidden, and its figures do not")
    if vm.verdict is not Verdict.EXPOSED and pages.mapped_pages:
        raise Malformed(where + f"it says {vm.verdict.value}, and {pages.mapped_pages} of its pages are mapped")
