"""What changed between two audits of a watch, as lines of text."""

from offmap.audit.report.text import KIND_NAMES
from offmap.audit.result_sets import Change, Changes, Difference
from offmap.report.typed import plain
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

_SHOWN = 8  # of each sort; --json has them all


def render_changes(changes: Changes) -> list[str]:
    """One line for each stretch, exposing ones first, and how many more there are."""
    lines = []
    for what in sorted(changes.pages, key=_URGENCY.index):
        listed = [change for change in changes.changes if change.what is what]
        lines += [_line(change) for change in listed[:_SHOWN]]
        shown = sum(change.bytes for change in listed[:_SHOWN]) // PAGE_SIZE
        if rest := changes.pages[what] - shown:
            lines.append(f"  {what.value:<12} {rest} more pages ({format_size(rest * PAGE_SIZE)})")
    return [plain(line) for line in lines]


_URGENCY = (Difference.MAPPED, *(what for what in Difference if what is not Difference.MAPPED))


def _line(change: Change) -> str:
    where = f"{change.userspace_addr:#x}"
    if change.guest_phys_addr is not None:
        where += f" (guest {change.guest_phys_addr:#x})"
    text = f"  {change.what.value:<12} {where} {format_size(change.bytes)}"
    if change.what is Difference.MOVED and change.pa_before is not None and change.pa is not None:
        text += f", from {change.pa_before:#x} to {change.pa:#x}"
    elif change.pa is not None:
        text += f", at {change.pa:#x}"
    if change.why:
        text += f": {change.why}"
    elif change.reaches:
        first = change.reaches[0]
        caller = f", by {first.caller}" if first.caller else ""
        text += f": {_kinds(change.kinds)} at {first.va:#x}{caller}"
    elif change.pa is not None:
        text += f": {_kinds(change.kinds) or 'no mapping found'}"
    return text


def _kinds(kinds: tuple[str, ...]) -> str:
    return " and ".join(KIND_NAMES.get(kind, kind) for kind in kinds)
