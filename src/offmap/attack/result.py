"""The published result of an attack. Its JSON, the JSON Schema and the decoding of files follow from these types."""

import json
from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta

from offmap.audit.host import HostFacts, Time
from offmap.errors import ExitStatus
from offmap.report.typed import Address, Count, Document, Seconds, json_schema, one_of

SHORTEST_RUN = 16
"""Fewer bytes of a secret are no finding: eight may stand anywhere by chance, and the console said them."""


class Outcome(StrEnum):
    """How an attack came out."""

    RECOVERED = "recovered"  # the secret was read, and is the right one
    REACHED = "reached"  # a page of the guest's is mapped, and the primitive cannot read it here
    ENDS = "ends"  # no kernel mapping leads on
    UNKNOWN = "unknown"  # the trail was lost, or the control did not get through

    @property
    def exit_status(self) -> ExitStatus:
        return _STATUS[self]


_STATUS = {
    Outcome.RECOVERED: ExitStatus.EXPOSED,
    Outcome.REACHED: ExitStatus.EXPOSED,
    Outcome.ENDS: ExitStatus.DONE,
    Outcome.UNKNOWN: ExitStatus.UNDETERMINED,
}


class Stage(Document, frozen=True, kw_only=True):
    """A step of the chain.

    Attributes:
        name: What it looks for.
        passed: Whether it was found.
        found: What was found, or why the chain stops here.
        reads: Words of eight bytes that were asked for.
        bytes: Bytes that were read.
        failures: Addresses that were not mapped.
        seconds: How long it took here.
    """

    name: str
    passed: bool
    found: str
    reads: Count
    bytes: Count
    failures: Count
    seconds: Seconds


class Residue(Document, frozen=True, kw_only=True):
    """What the attacker reads of the guest all the same.

    Attributes:
        name: What it is.
        bytes: How much.
        note: What it says.
    """

    name: str
    bytes: Count
    note: str


class Run(Document, frozen=True, kw_only=True):
    """Bytes of the secret that stand together in memory that the host kernel maps.

    Attributes:
        va: Kernel address of the first.
        pa: Its physical address.
        bytes: How many; 16 at least.
        region: Which part of the kernel's address space that is.
    """

    va: Address
    pa: Address
    bytes: Count
    region: str


class Part(Document, frozen=True, kw_only=True):
    """A part of the memory that was searched.

    Attributes:
        name: What it is: free pages, slab, kernel stacks, …
        bytes: How much.
    """

    name: str
    bytes: Count


class Sweep(Document, frozen=True, kw_only=True):
    """The search for any 16 bytes of the secret in all memory that the host kernel maps.

    Attributes:
        secret_bytes: Bytes of the secret.
        bytes_read: Bytes that were searched, by each mapping that there is of them.
        pages_unread: Pages of memory that are mapped, and that this primitive can read by none of their mappings.
        device_pages: Mapped pages of devices' registers and of firmware's tables, which are not read.
        seconds: How long it took here.
        longest: Bytes of the longest run; 0 if there is none of 16 or more.
        runs: Where they stand; 1000 at most.
        parts: What was searched.
    """

    secret_bytes: Count
    bytes_read: Count
    pages_unread: Count
    device_pages: Count
    seconds: Seconds
    longest: Count
    runs: tuple[Run, ...]
    parts: tuple[Part, ...] = ()


class Hours(Document, frozen=True, kw_only=True):
    """How long the bytes that were read take at a published leak rate.

    Attributes:
        leak: The attack that was published.
        bytes_per_second: Its rate.
        source: Where its authors say so.
        hours: For the bytes of this attack.
    """

    leak: str
    bytes_per_second: float
    source: str
    hours: Seconds


class Attempt(Document, frozen=True, kw_only=True):
    """The chain against one VM.

    Attributes:
        pid: Of the VMM's process.
        target: What it is after.
        outcome: recovered: it got the secret. reached: a page of the guest's is mapped, and this primitive cannot read
            it. ends: no kernel mapping leads on. unknown: the trail was lost.
        stage: Where it came out so.
        reason: Why.
        stages: All steps, in order. On a control that was recovered, what says that a chain ends is tried after it.
        reads: Words of eight bytes that were asked for, until it came out; what is tried after that is not counted.
        bytes: Bytes that were read, in all.
        failures: Addresses that were not mapped, in all.
        seconds: How long it took here.
        guest_pages: Pages of the guest's RAM that the VMM's page tables have; null if they were not counted.
        mapped_pages: Of these, the pages that some kernel mapping has; null if they were not looked for.
        missing_pages: Pages of guest RAM that the VMM's page tables have not; null if they were not counted.
        user_pages: Pages of the guest's that were read by the VMM's own mapping, as no kernel mapping led to them.
        sweep: What a search of all that is mapped found; null if none was asked for, or it could not be made.
        residues: What the attacker reads of the guest all the same.
    """

    pid: Count
    target: str
    outcome: Annotated[str, one_of(Outcome)]
    stage: str
    reason: str
    stages: tuple[Stage, ...]
    reads: Count
    bytes: Count
    failures: Count
    seconds: Seconds
    guest_pages: Count | None = None
    mapped_pages: Count | None = None
    missing_pages: Count | None = None
    user_pages: Count = 0
    sweep: Sweep | None = None
    residues: tuple[Residue, ...] = ()


class AttackResult(Document, frozen=True, kw_only=True):
    """An attack on a VM, and the same on a plain one beside it.

    Attributes:
        schema: Names the form of this document.
        offmap: Version that made it.
        time: When.
        host: Facts of the host.
        primitive: What read the kernel's memory: kcore or module.
        knowledge: What the attacker knew beforehand.
        outcome: Of the whole: that of the attempt. But "ends" only beside a control that got through.
        reason: Why, in words.
        attempt: On the VM in question.
        control: On a VM with plain RAM on the same host; null if there was none.
        times: How long this would take at published leak rates; empty unless it was recovered.
    """

    schema: Annotated[Literal["offmap-attack/1"], Meta(description="Names the form of this document.")] = (
        "offmap-attack/1"
    )
    offmap: str
    time: Time
    host: HostFacts
    primitive: str
    knowledge: tuple[str, ...]
    outcome: Annotated[str, one_of(Outcome)]
    reason: str
    attempt: Attempt
    control: Attempt | None
    times: tuple[Hours, ...] = ()

    @property
    def exit_status(self) -> ExitStatus:
        return Outcome(self.outcome).exit_status


def attack_schema() -> str:
    """The JSON Schema (draft 2020-12) of the result; ends with a newline."""
    schema = json_schema([AttackResult], "attack", "What `offmap attack --json` prints.")
    return json.dumps(schema, indent=2) + "\n"
