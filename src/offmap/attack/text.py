"""The result of an attack as text: the answer first, then the chain, then what else there is to read."""

from collections.abc import Iterator

from offmap.attack.result import SHORTEST_RUN, AttackResult, Attempt, Outcome
from offmap.report.typed import plain
from offmap.units import format_size

_RUNS = 8  # shown of a sweep
_COLORS = {Outcome.RECOVERED: "31", Outcome.REACHED: "31", Outcome.ENDS: "32", Outcome.UNKNOWN: "33"}


def headline(attempt: Attempt) -> str:
    """One line: how an attempt came out, and after how many reads."""
    reads = f"{attempt.reads:,} reads"
    if attempt.outcome == Outcome.RECOVERED:
        return f"{attempt.target} recovered in {reads}"
    if attempt.outcome == Outcome.REACHED:
        return f"the guest's memory is reached after {reads}"
    if attempt.outcome == Outcome.ENDS:
        return f'ends at "{attempt.stage}" after {reads}'
    return f'lost at "{attempt.stage}" after {reads}'


def render_text(result: AttackResult, color: bool = False) -> str:
    """All of it."""
    return "\n".join(_lines(result, color))


def _lines(result: AttackResult, color: bool) -> Iterator[str]:
    word = result.outcome.upper()
    if color:
        word = f"\x1b[1;{_COLORS[Outcome(result.outcome)]}m{word}\x1b[0m"
    yield plain(f"{word}: {result.reason}") if not color else f"{word}: {plain(result.reason)}"
    for title, attempt in (("attack", result.attempt), ("control", result.control)):
        if attempt is None:
            continue
        yield ""
        yield plain(f"  {title} on process {attempt.pid}: {headline(attempt)}")
        yield from _stages(attempt)
        if attempt.user_pages:
            yield f"  guest pages read by the VMM's own mapping {attempt.user_pages:,}"
        if attempt.guest_pages is not None:
            yield f"  guest pages {attempt.guest_pages:,}, of them mapped {attempt.mapped_pages:,}"
    yield from _sweep(result.attempt)
    if result.attempt.residues:
        yield ""
        yield "  what is read of the guest all the same"
        for residue in result.attempt.residues:
            yield plain(f"  {format_size(residue.bytes):>10}  {residue.name}: {residue.note}")
    if result.times:
        yield ""
        for each in result.times:
            yield plain(f"  {hours(each.hours):>10}  at {each.bytes_per_second:,g} B/s ({each.leak})")
    yield ""
    yield plain(f"  primitive {result.primitive}; {'; '.join(result.knowledge)}")
    yield "  No speculative execution took place: the primitive stands for a leak."


def _sweep(attempt: Attempt) -> Iterator[str]:
    if attempt.sweep is None:
        return
    yield ""
    yield f"  what was searched for any {SHORTEST_RUN} bytes of the secret"
    for part in attempt.sweep.parts:
        yield f"  {format_size(part.bytes):>10}  {part.name}"
    if not attempt.sweep.runs:
        return
    yield ""
    yield "  where the secret stands in what the host kernel maps"
    for run in attempt.sweep.runs[:_RUNS]:
        yield f"  {format_size(run.bytes):>10}  {run.va:#x}, physical {run.pa:#x}, {run.region}"
    if len(attempt.sweep.runs) > _RUNS:
        yield f"  and {len(attempt.sweep.runs) - _RUNS} more"


def _stages(attempt: Attempt) -> Iterator[str]:
    width = max((len(stage.name) for stage in attempt.stages), default=0)
    for stage in attempt.stages:
        mark = "ok" if stage.passed else "--"
        yield plain(f"    {mark}  {stage.name:{width}}  {stage.reads:>9,} reads  {stage.found}")


def hours(number: float) -> str:
    """A time for people."""
    return f"{number * 60:.1f} min" if number < 1 else f"{number:,.1f} h"
