"""What was found on one host: the object that all renderers take, of a fresh audit or of a file from elsewhere."""

from dataclasses import dataclass, field

from offmap.audit.host import HostFacts, parse_time
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import EveryVm, NotAudited
from offmap.audit.verdict import Verdict, worst
from offmap.errors import ExitStatus
from offmap.report.typed import Document, Malformed, decode


def schema_of(kind: type[Document]) -> str:
    """Name and version of this form of result."""
    return str(kind.__struct_config__.tag)


AUDIT, AUDIT_ALL = schema_of(AuditResult), schema_of(EveryVm)
SHOWN = 500  # of a VM's mappings; documents may have more


@dataclass(frozen=True)
class HostReport:
    """What was found on one host.

    Attributes:
        schema: of the JSON it came as.
        offmap: version that made it.
        time: when, as audit.host.utc_now says it.
        host: facts of the host.
        vms: those that were audited.
        not_audited: those that could not be.
        notes: why there may be more VMs than were found, or why there was no audit at all.
        failed: there was no audit at all.
        source: the file it came from; empty for an audit that was just made.
        document: the JSON it came as.
    """

    schema: str
    offmap: str
    time: str
    host: HostFacts
    vms: tuple[AuditResult, ...] = ()
    not_audited: tuple[NotAudited, ...] = ()
    notes: tuple[str, ...] = ()
    failed: bool = False
    source: str = ""
    document: object = field(default=None, compare=False, repr=False)

    @property
    def verdicts(self) -> list[Verdict]:
        """One for each VM; unknown for one that could not be audited."""
        return [vm.verdict for vm in self.vms] + [Verdict.UNKNOWN for _ in self.not_audited]

    @property
    def verdict(self) -> Verdict | None:
        """The worst of its VMs; None if there is none, so that nothing had to be hidden."""
        return worst([*self.verdicts, Verdict.UNKNOWN if self.notes or self.failed else None])

    @property
    def seconds(self) -> float:
        """What its audits took together."""
        return sum(vm.seconds for vm in self.vms)


def parse_report(document: object, source: str = "") -> HostReport:
    """One host's report, of an ``offmap-audit/2`` or ``offmap-audit-all/1`` result.

    Args:
        document: what ``parse_json`` gave.
        source: name of the file.

    Raises:
        Malformed: it is none, or it contradicts itself.
    """
    if not isinstance(document, dict) or not isinstance(document.get("schema"), str):
        raise Malformed("it names no schema")
    if document["schema"] == AUDIT:
        audit = decode(AuditResult, _shortened(document))
        report = HostReport(AUDIT, audit.offmap, audit.time, audit.host, (audit,), source=source, document=document)
    elif document["schema"] == AUDIT_ALL:
        vms = document.get("vms")
        found = decode(EveryVm, document | {"vms": [*map(_shortened, vms)] if isinstance(vms, list) else vms})
        parts = (found.vms, found.not_audited, found.notes)
        report = HostReport(AUDIT_ALL, found.offmap, found.time, found.host, *parts, source=source, document=document)
        if found.exit_status is not ExitStatus.DONE and report.verdict in {None, Verdict.HIDDEN}:
            # A later version may have more reasons to say so than are known here.
            raise Malformed(f"its exit status is {found.exit_status.value}, and nothing in it says why")
    else:
        raise Malformed(f"its schema is {document['schema']!r:.80}, not {AUDIT} or {AUDIT_ALL}")
    parse_time(report.time)
    pids = [vm.pid for vm in report.vms] + [failure.pid for failure in report.not_audited]
    if len(pids) != len(set(pids)):
        raise Malformed("it has a VM twice")
    for vm in report.vms:
        vm.check()
    return report


def _shortened(vm: object) -> object:
    """A VM's result. Its lists of mappings are cut to the part that is shown: on large hosts they are most of it."""
    if not isinstance(vm, dict):
        return vm
    vm = dict(vm)
    for name in ("aliases", "direct_map_ranges"):
        ranges, omitted = vm.get(name), vm.get(f"{name}_omitted")
        if isinstance(ranges, list) and type(omitted) is int and len(ranges) > SHOWN:
            vm |= {name: ranges[:SHOWN], f"{name}_omitted": omitted + len(ranges) - SHOWN}
    return vm


def failed_report(offmap: str, time: str, host: HostFacts, reason: str) -> HostReport:
    """The report of an audit that came to no result: unknown, whatever an earlier one had said."""
    return HostReport(AUDIT_ALL, offmap, time, host, notes=(reason,), failed=True)
