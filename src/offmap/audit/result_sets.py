"""The published results that are made of others: all VMs of a host, many hosts, and what changed between two audits."""

from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Literal

from offmap.audit.host import HostFacts, Time
from offmap.audit.reach import KindName, Reach, VmmFacts
from offmap.audit.result import AuditResult
from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus
from offmap.report.typed import Address, Count, Document, json_schema, one_of


class NotAudited(Document, frozen=True):
    """A process that holds a KVM VM and could not be audited. Its VM is unknown, never left out.

    Attributes:
        pid: Its PID.
        process: Its command name.
        vmm: What kind of VMM it is.
        reason: Why.
        verdict: Always unknown.
    """

    pid: Count
    process: str
    vmm: VmmFacts
    reason: str
    verdict: Literal["unknown"] = "unknown"


class EveryVm(Document, frozen=True, tag_field="schema", tag="offmap-audit-all/1"):
    """Every VM of a host: offmap audit --all --json.

    Attributes:
        schema: Name and version of this form.
        offmap: Version of offmap that made the result.
        time: When the audits ended, in UTC.
        host: The host whose kernel was audited.
        exit_status: The worst: 1 exposed, 3 cannot be determined, 2 failed, 0 hidden or no VM at all.
        vms: In order of their PIDs.
        not_audited: VMs without a verdict.
        notes: Why there may be more VMs than were found; if there are any, the whole is unknown at best.
    """

    offmap: str
    time: Time
    host: HostFacts
    exit_status: Annotated[ExitStatus, one_of((0, 1, 2, 3))]
    vms: tuple[AuditResult, ...]
    not_audited: tuple[NotAudited, ...]
    notes: tuple[str, ...]


class Difference(Enum):
    """What happened to a page between two audits."""

    SLOT_ADDED = "slot added"
    SLOT_REMOVED = "slot removed"
    MAPPED = "mapped"  # the kernel has a mapping of it that it did not have
    UNMAPPED = "unmapped"
    MOVED = "moved"  # another frame stands behind it: migration, copy on write, memory mapped anew
    POPULATED = "populated"
    RETURNED = "returned"  # what could not be seen can be: swapped in, most often
    GONE = "gone"  # there is no page any more
    LOST = "lost"  # it cannot be seen any more: swapped out, most often


class Change(Document, frozen=True):
    """A stretch of guest RAM that the same happened to.

    Attributes:
        what: A memory slot came or went; the kernel mapped or unmapped pages; another frame stands behind them
            (moved); pages are there for the first time (populated), can be seen again (returned), are there no more
            (gone), cannot be seen any more (lost).
        userspace_addr: Where the process has it.
        bytes: Its size.
        guest_phys_addr: Where the guest has it; null if that is not known.
        pa: Physical address of its first page now; null if that is not known.
        pa_before: Physical address of its first page before; null if that is not known.
        kinds: What maps it now.
        kinds_before: What mapped it before.
        reaches: The mappings outside the direct map that reach it now, as far as they are listed.
        why: Why it cannot be seen, if it cannot.
    """

    what: Difference
    userspace_addr: Address
    bytes: Count
    guest_phys_addr: Count | None = None
    pa: Address | None = None
    pa_before: Address | None = None
    kinds: tuple[KindName, ...] = ()
    kinds_before: tuple[KindName, ...] = ()
    reaches: tuple[Reach, ...] = ()
    why: str = ""


class Changes(Document, frozen=True, tag_field="schema", tag="offmap-audit-change/1"):
    """What changed since the audit before: each later line of offmap audit --watch --json.

    Attributes:
        schema: Name and version of this form.
        time: When the audit ended, in UTC.
        pid: PID of the VMM.
        process: Its command name.
        verdict: hidden, exposed or unknown.
        mapped_pages: Pages that any kernel mapping maps now.
        pages: Pages by what happened to them: complete.
        changes: The first stretches, in order of address.
        changes_omitted: Stretches left out of changes.
    """

    time: Time
    pid: Count
    process: str
    verdict: Verdict
    mapped_pages: Count
    pages: dict[Difference, Count]
    changes: tuple[Change, ...]
    changes_omitted: Count


class MergedPart(Document, frozen=True):
    """A result, as its host made it.

    Attributes:
        source: Name of the file it came from.
        result: The result itself.
    """

    source: str
    result: AuditResult | EveryVm


class Merged(Document, frozen=True, tag_field="schema", tag="offmap-audit-merged/1"):
    """Many hosts: offmap audit --merge FILE… --json.

    Attributes:
        schema: Name and version of this form.
        offmap: Version of offmap that merged them.
        time: When they were merged, in UTC.
        verdict: The worst of all; null if there is no VM.
        exit_status: Of the verdict.
        reports: In the order of the files.
    """

    offmap: str
    time: Time
    verdict: Verdict | None
    exit_status: Annotated[ExitStatus, one_of((0, 1, 2, 3))]
    reports: tuple[MergedPart, ...]


def audit_schema(also: Sequence[type[Document]] = ()) -> dict[str, object]:
    """The JSON Schema of whatever ``offmap audit --json`` prints, and of other documents beside it."""
    return json_schema(
        (AuditResult, EveryVm, Merged, Changes, *also),
        "audit",
        "What offmap audit --json prints. A change that would break a reader gets a new number in the form's name; "
        "fields may be added without one, and readers pass over those they don't know.",
    )
