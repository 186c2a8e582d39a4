"""What evidence states: an in-toto statement whose predicate holds the verdict and the host that it was made on.

Canonical JSON has no fractions, so all times are whole milliseconds. No kernel address is stated: evidence travels.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from offmap.audit.host import Time
from offmap.audit.verdict import Verdict
from offmap.report.typed import Count, Document, one_of

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:offmap:evidence:1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
REPORT_NAME = "offmap-audit.json"


class Subject(Document, frozen=True):
    """What the statement is about.

    Attributes:
        name: Of the file.
        digest: By algorithm, in hexadecimal.
    """

    name: str
    digest: dict[str, str]


class Moment(Document, frozen=True):
    """A moment, by the clocks of the host.

    Attributes:
        time: In UTC.
        uptime_ms: Milliseconds since the host booted, its sleep included.
    """

    time: Time
    uptime_ms: Count


class Extent(Document, frozen=True):
    """What an audit looked at.

    Attributes:
        sources: How it is known what is guest RAM: memslot, range, kvm or guess.
        ram_bytes: Guest RAM that was judged.
        levels: Of the page tables that were walked.
        tables: Page tables that were read.
        runs: Stretches of kernel mappings that were found.
        unreadable_bytes: Kernel addresses whose page tables could not be read.
        duration_ms: How long the audit took. Outside of this time nothing was looked at.
        stretch_ms: The stretch of time that the verdict is true for, as far as walks at random moments of it can tell.
        walks: Whole walks of the page tables in it.
        roots: Roots of page tables that were looked at, by kind.
        scanned: Whether all that the kernel has mapped was also read and searched.
    """

    sources: tuple[str, ...]
    ram_bytes: Count
    levels: Count
    tables: Count
    runs: Count
    unreadable_bytes: Count
    duration_ms: Count
    stretch_ms: Count
    walks: Count
    roots: dict[str, Count]
    scanned: bool


class Vm(Document, frozen=True):
    """What was found of one VM.

    Attributes:
        pid: Of its VMM.
        process: The VMM's command name.
        vmm: What kind of VMM it is; empty if that is not known.
        verdict: hidden, exposed or unknown.
        notes: What must be known about the verdict.
        partial: Why the audit ended early; null if it did not.
        pages: The counts that the verdict rests on, by name; those that were not counted are left out.
        coverage: What was looked at.
    """

    pid: Count
    process: str
    vmm: str
    verdict: Verdict
    notes: tuple[str, ...]
    partial: str | None
    pages: dict[str, Count]
    coverage: Extent


class Unjudged(Document, frozen=True):
    """A VM without a verdict.

    Attributes:
        pid: Of its VMM.
        process: The VMM's command name.
        reason: Why it has none.
    """

    pid: Count
    process: str
    reason: str


class Ima(StrEnum):
    """What the kernel's integrity measurement (IMA) does on the host."""

    UNKNOWN = "unknown"  # securityfs does not tell
    ABSENT = "absent"  # this kernel has none
    BOOT_ONLY = "boot only"  # it has measured nothing but the boot: no policy
    MEASURES = "measures"


class Host(Document, frozen=True):
    """The host and its kernel, as they describe themselves.

    Attributes:
        name: As uname -n.
        kernel: Release, as uname -r.
        kernel_build_id: Of the kernel image, from /sys/kernel/notes; null if it has none.
        boot_id: Random, made by the kernel at its start.
        command_line: Of the kernel.
        taint: As /proc/sys/kernel/tainted.
        lockdown: none, integrity or confidentiality; null if that is not told.
        modules: Build ID of each loaded module, by its name; null if it has none.
        livepatches: Names of the kernel's live patches.
        ima: unknown, absent, boot only, or measures.
        ima_measurements: Entries of its list; null if that is not told.
    """

    name: str
    kernel: str
    kernel_build_id: str | None
    boot_id: str
    command_line: str
    taint: Count
    lockdown: str | None
    modules: dict[str, str | None]
    livepatches: tuple[str, ...]
    ima: Annotated[str, one_of(Ima)]
    ima_measurements: Count | None


class Auditor(Document, frozen=True):
    """The program that made the verdict, as it describes itself.

    Attributes:
        version: Of offmap.
        digest: SHA-256 of the list that sha256sum prints of all its files, in the order of their names.
        python: Version of the interpreter.
        python_digest: SHA-256 of the interpreter's file.
        libraries: Versions of the libraries that judged with it, by name.
    """

    version: str
    digest: str
    python: str
    python_digest: str
    libraries: dict[str, str]


class Predicate(Document, frozen=True):
    """The verdict, what it rests on, and where it was made.

    Attributes:
        nonce: What the one who asked for the evidence gave; null if nothing.
        began: Before anything was looked at.
        ended: After everything was.
        verdict: The worst of all VMs; null if there was none.
        every_vm: Whether all VMs of the host were asked for, or one process.
        vms: The VMs that were judged.
        not_audited: The VMs that were not. Each counts as unknown.
        notes: Why there may be more VMs.
        limits: What the verdict does not say.
        host: The host.
        auditor: The auditor.
    """

    nonce: str | None
    began: Moment
    ended: Moment
    verdict: Verdict | None
    every_vm: bool
    vms: tuple[Vm, ...]
    not_audited: tuple[Unjudged, ...]
    notes: tuple[str, ...]
    limits: tuple[str, ...]
    host: Host
    auditor: Auditor


class Statement(Document, frozen=True):
    """An in-toto statement, version 1.

    Attributes:
        _type: Says so.
        subject: The report that offmap audit --json prints in the same run.
        predicateType: The form of the predicate.
        predicate: The predicate.
    """

    type: Annotated[str, one_of((STATEMENT,))] = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicate_type: Annotated[str, one_of((PREDICATE,))] = msgspec.field(name="predicateType")
    predicate: Predicate
