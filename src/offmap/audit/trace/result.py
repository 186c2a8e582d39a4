"""What a trace says, as it is published."""

from offmap.audit.host import Time
from offmap.audit.verdict import Verdict
from offmap.report.typed import Address, Count, Document, Seconds


class TracedMapping(Document, frozen=True):
    """A kernel mapping of guest pages that was made while the trace ran.

    Attributes:
        event: The function that made it.
        va: Its kernel address; 0x0 if that is not told.
        pa: Physical address of the first guest page that it maps.
        pages: Guest pages that it maps.
        guest_phys_addr: Where the guest has the first of them; null if that is not known.
        life_us: Microseconds for which it was there; null if it still is, or if its end is not traced.
        task: Name of the thread that made it.
        tid: Of that thread.
        stack: The functions that led to it, the innermost first.
    """

    event: str
    va: Address
    pa: Address
    pages: Count
    guest_phys_addr: Count | None
    life_us: Count | None
    task: str
    tid: Count
    stack: tuple[str, ...]


class Traced(Document, frozen=True, tag_field="schema", tag="offmap-audit-trace/1"):
    """What was traced since the last such line: further lines of offmap audit --watch --trace --json.

    Attributes:
        schema: Name and version of this form.
        time: Of its end, in UTC.
        pid: PID of the VMM.
        verdict: exposed, if guest pages were mapped; unknown, if that cannot be told; hidden, if none was.
        seconds: How long it was.
        events: Mappings that this host made in this time, of whatever memory.
        mappings: Those of guest pages.
        undetermined: Why there may be more of them.
        not_traced: What cannot be traced on this kernel.
    """

    time: Time
    pid: Count
    verdict: Verdict
    seconds: Seconds
    events: Count
    mappings: tuple[TracedMapping, ...]
    undetermined: tuple[str, ...]
    not_traced: tuple[str, ...]
