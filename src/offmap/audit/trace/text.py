"""What a trace says, for people."""

from offmap.audit.trace.result import Traced, TracedMapping

_CALLERS = 6


def render_trace(traced: Traced) -> list[str]:
    """A line for each mapping of guest pages, and one for each doubt."""
    lines = [f"  {_mapping(each)}" for each in traced.mappings]
    return lines + [f"  undetermined: {reason}" for reason in traced.undetermined]


def trace_line(traced: Traced) -> str:
    """The stretch in one line."""
    return (
        f"traced {traced.seconds:.1f} s: {traced.verdict.value.upper()}, {len(traced.mappings)} of {traced.events:,} "
        "mappings that this host made are of guest pages"
    )


def _mapping(mapping: TracedMapping) -> str:
    guest = "" if mapping.guest_phys_addr is None else f" (guest {mapping.guest_phys_addr:#x})"
    at = f" at {int(mapping.va):#x}" if mapping.va else ""
    pages = "1 page" if mapping.pages == 1 else f"{mapping.pages} pages"
    life = "is still there" if mapping.life_us is None else f"lived for {mapping.life_us:,} µs"
    callers = " < ".join(name for name in mapping.stack if name != mapping.event)
    short = " < ".join(callers.split(" < ")[:_CALLERS])
    return (
        f"a mapping of {pages} from {int(mapping.pa):#x}{guest}{at} {life}; {mapping.event} by {mapping.task} "
        f"({mapping.tid}): {short}"
    )
