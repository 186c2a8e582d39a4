"""Make a statement of a report."""

import hashlib
import json

import msgspec

from offmap.audit.evidence.auditor import auditor
from offmap.audit.evidence.host import host, moment
from offmap.audit.evidence.statement import (
    PREDICATE,
    REPORT_NAME,
    STATEMENT,
    Extent,
    Moment,
    Predicate,
    Statement,
    Subject,
    Unjudged,
    Vm,
)
from offmap.audit.report.hosts import AUDIT_ALL, HostReport
from offmap.audit.result import AuditResult

LIMITS = (
    "between two walks, and before and after the audit, nothing was looked at",
    "bytes of the guest that were copied elsewhere are not looked for, unless it was scanned for a canary or secret",
    "that memory is not mapped says nothing of processor buffers, devices, or the VMM's own mapping",
)


def make_statement(report: HostReport, nonce: str | None, began: Moment) -> Statement:
    """State what was found, and where.

    Args:
        nonce: of the one who asked for it.
        began: before anything was looked at.

    Raises:
        KernelError: this host does not tell what belongs into it.
    """
    printed = json.dumps(report.document, indent=2) + "\n"  # by ``offmap audit --json``
    digest = hashlib.sha256(printed.encode()).hexdigest()
    predicate = Predicate(
        nonce=nonce,
        began=began,
        ended=moment(),
        verdict=report.verdict,
        every_vm=report.schema == AUDIT_ALL,
        vms=tuple(_vm(vm) for vm in report.vms),
        not_audited=tuple(Unjudged(each.pid, each.process, each.reason) for each in report.not_audited),
        notes=report.notes,
        limits=LIMITS,
        host=host(),
        auditor=auditor(),
    )
    return Statement(STATEMENT, (Subject(REPORT_NAME, {"sha256": digest}),), PREDICATE, predicate)


def _vm(audit: AuditResult) -> Vm:
    counts = msgspec.structs.asdict(audit.pages)
    walk, over = audit.walk, audit.coverage
    coverage = Extent(
        sources=tuple(sorted({str(part.source) for part in audit.ranges})),
        ram_bytes=sum(part.bytes for part in audit.ranges),
        levels=walk.levels,
        tables=sum(walk.tables.values()),
        runs=walk.runs,
        unreadable_bytes=sum(span.bytes for span in walk.unreadable),
        duration_ms=round(audit.seconds * 1000),
        stretch_ms=0 if over is None else round(over.seconds * 1000),
        walks=1 if over is None else over.walks,
        roots={} if over is None else over.roots,
        scanned=audit.scan is not None,
    )
    return Vm(
        pid=audit.pid,
        process=audit.process,
        vmm=audit.vmm.vmm,
        verdict=audit.verdict,
        notes=audit.notes,
        partial=audit.partial,
        pages={name: count for name, count in counts.items() if isinstance(count, int)},
        coverage=coverage,
    )
