"""One conclusion for each host kernel, written by rules: what hides, what it loses, what is not known."""

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from offmap.compare.cell_result import CellResult
from offmap.compare.kinds import BASELINE, kind_names, kind_of
from offmap.compare.questions import CATALOGUE, MIN_PAIRS, Answer, Group, Question
from offmap.compare.report.status import (
    KindFinding,
    Status,
    finding_of,
    least_lost,
    status_of,
    why_undetermined,
)
from offmap.compare.report.words import TIMES, number, release_of, short_kernel

NOISE = "\N{ALMOST EQUAL TO} "

COSTS: tuple[Question, ...] = tuple(asked for asked in CATALOGUE.values() if asked.group is Group.COSTS)


class ConclusionText(Struct, frozen=True):
    """What is concluded of one host kernel, by rules, in words.

    Attributes:
        host_kernel: its name in the matrix; a path by its last part.
        release: what uname says, all of it if its cells had several kernels (see notes); empty if no host came up.
        answer: what hides on this kernel, in one sentence.
        choice: what those that hide lose, in one or two sentences; empty if none hides.
        unsettled: what could not be determined, one line each.
    """

    host_kernel: str
    release: str
    answer: str
    choice: str
    unsettled: tuple[str, ...]


class Conclusion(ConclusionText, frozen=True):
    """A conclusion, and a finding for each kind of the matrix, in its order; also for those that were not run."""

    findings: tuple[KindFinding, ...]


def conclude(results: Sequence[CellResult]) -> list[Conclusion]:
    """One for each host kernel, in the order in which they come."""
    kernels = dict.fromkeys(result.spec.host_kernel for result in results)
    return [_conclusion(kernel, [cell for cell in results if cell.spec.host_kernel == kernel]) for kernel in kernels]


def kinds_of(results: Sequence[CellResult]) -> list[str]:
    """Every kind that is compared, in the order of the matrix; what is not in the matrix comes last."""
    run = {result.spec.backend for result in results}
    return [*kind_names(), *sorted(run - set(kind_names()))]


def _conclusion(kernel: str, cells: Sequence[CellResult]) -> Conclusion:
    by_kind: dict[str, list[CellResult]] = {}
    for cell in cells:
        by_kind.setdefault(cell.spec.backend, []).append(cell)
    plain = by_kind.get(BASELINE, [])
    findings = tuple(
        finding_of(kind, by_kind.get(kind, []), plain, by_kind.get(_baseline_of(kind), plain))
        for kind in kinds_of(cells)
    )
    releases = dict.fromkeys(found for cell in cells if (found := release_of(cell)))  # several, of several runs
    return Conclusion(
        short_kernel(kernel),
        list_words([*releases]),
        _answer(findings),
        _choice(findings),
        tuple(_unsettled(findings)),
        findings,
    )


def _baseline_of(kind: str) -> str:
    """Plain RAM under the kind's own VMM: what another VMM has not, is no loss of the kind."""
    return kind_of(kind).baseline.name if kind in kind_names() else BASELINE


def _with(findings: Sequence[KindFinding], *statuses: Status) -> list[str]:
    return [finding.backend for finding in findings if finding.status in statuses]


def list_words(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _answer(findings: Sequence[KindFinding]) -> str:
    hide = _with(findings, Status.HIDES)
    partly = _with(findings, Status.PARTLY)
    open_ = _with(findings, Status.UNDETERMINED, Status.FAILED, Status.DEADLINE)
    if hide:
        said = f"{list_words(hide)} {'boots and hides' if len(hide) == 1 else 'boot and hide'} all guest RAM"
    elif partly:
        said = "Nothing hides in every setting"
    elif open_:
        said = "Nothing was found to hide"
    else:
        said = "Nothing that was run hides here"
    if partly:
        said += f"; {list_words(partly)} in some settings"
    if open_:
        said += f"; of {list_words(open_)} it could not be determined"
    oops = _with(findings, Status.OOPS)
    if oops:
        said += f"; {list_words(oops)} brought the host down"
    return f"{said[0].upper()}{said[1:]}." if said.startswith("Nothing") else f"{said}."


def _choice(findings: Sequence[KindFinding]) -> str:
    hide = [finding for finding in findings if finding.status is Status.HIDES]
    if not hide:
        return ""
    titles = {finding.backend: titles_of(finding.lost) for finding in hide}
    if len(hide) == 1:
        open_ = len(hide[0].undetermined)
        also = f"; of {open_} more it could not be determined" if open_ else ""
        return f"It loses {list_words(titles[hide[0].backend]) or 'nothing that was determined'}{also}."
    best = least_lost(findings)
    if best is not None:
        lost = list_words(titles[best.backend]) or "nothing"
        sure = ", even if all that is not known of it were lost" if best.undetermined else ""
        return f"{best.backend} loses least{sure}: {lost}."
    common = [id for id in hide[0].lost if all(id in finding.lost for finding in hide)]
    said = ""
    if common:
        said = f"All of them lose {list_words(titles_of(common))}. "
    own = []
    for finding in sorted(hide, key=lambda one: len(one.lost) + len(one.undetermined)):
        rest = titles_of(id for id in finding.lost if id not in common)
        open_ = len(finding.undetermined)
        if rest or open_ or not common:
            own.append(
                f"{finding.backend} {list_words(rest) or 'nothing'}" + (f" ({open_} not determined)" * bool(open_))
            )
    if not own:
        return f"{said[:-2]}, and no more."
    return f"{said}{'Beyond that' if common else 'Lost'}: {'; '.join(own)}."


_NOUNS = {
    "works.smp": "a second vCPU",
    "works.balloon": "the balloon",
    "works.ram_snapshot": "snapshots of RAM",
    "hidden.zeroed": "being zeroed at its end",
    "hidden.restored": "being given back at its end",
    "breaks.gdb_attach": "gdb",
    "breaks.drop_caches": "its life after drop_caches",
    "breaks.compaction": "its life after compaction",
    "breaks.memory_pressure": "its life after memory pressure",
    "breaks.hibernation": "the host's hibernation",
    "breaks.kexec": "kexec",
}
"""The name of the loss, where a question's answer is no. The other titles are nouns already."""


def titles_of(ids: Iterable[str]) -> list[str]:
    """Names of what these questions ask for, as things that can be lost."""
    return [_NOUNS.get(id, CATALOGUE[id].title) for id in ids]


def _unsettled(findings: Sequence[KindFinding]) -> list[str]:
    lines = []
    for finding in findings:
        for cell in finding.cells:
            status = status_of(cell)
            where = f"{cell.spec.title}"
            if status is Status.UNDETERMINED:
                lines.append(f"{where}: {'; '.join(why_undetermined(cell)[:3])}")
            elif status in {Status.FAILED, Status.DEADLINE}:
                lines.append(f"{where}: {status.word}: {cell.reason}")
    none = Counter(id for finding in findings if finding.status is Status.HIDES for id in finding.undetermined)
    hide = [finding for finding in findings if finding.status is Status.HIDES]
    for id, count in none.items():
        of = [finding.backend for finding in hide if id in finding.undetermined]
        who = "all that hide" if count == len(hide) and count > 1 else list_words(of)
        why = dict.fromkeys(finding.undetermined[id] for finding in hide if id in finding.undetermined)
        lines.append(f"{titles_of([id])[0]}, of {who}: {'; '.join(why)}")
    not_run = _with(findings, Status.NOT_RUN)
    if not_run:
        lines.append(f"not run on this kernel: {list_words(not_run)}")
    return lines


def cost_of(finding: KindFinding, asked: Question) -> str:
    """The range of the medians over the cells that hide (over all, where none does), with its unit.

    NOISE stands before a ratio that is no farther from 1 than plain RAM is from itself.
    """
    cells = finding.hiding or finding.cells
    answers = [(cell, cell.answer(asked.id)) for cell in cells]
    paired = [(cell, answer) for cell, answer in answers if answer.ratio is not None]
    if paired:
        medians = [answer.ratio.median for _, answer in paired if answer.ratio is not None]
        noise = "" if all(_told_apart(answer, finding.control_of(cell)) for cell, answer in paired) else NOISE
        return noise + _range([f"{TIMES}{number(value)}" for value in (min(medians), max(medians))])
    values = [float(answer.value) for _, answer in answers if answer.value is not None]
    return f"{_range([number(value) for value in (min(values), max(values))])} {asked.unit}".strip() if values else "?"


def _range(ends: Sequence[str]) -> str:
    low, high = ends
    return low if low == high else f"{low} to {high}"


def _told_apart(answer: Answer, control: CellResult | None) -> bool:
    """Whether each pair lies beyond 1 and beyond every pair of plain RAM against itself, on the same side.

    Of five pairs each, chance does that on each side once in 252 times; of quartiles far more often.
    """
    mine = _pairs(answer)
    noise = _pairs(control.answer(answer.question)) if control is not None else []
    if len(noise) < MIN_PAIRS:
        return False
    return min(mine) > max(1.0, *noise) or max(mine) < min(1.0, *noise)


def _pairs(answer: Answer) -> list[float]:
    pairs = zip(answer.samples, answer.baseline, strict=False)
    return [mine / plain for mine, plain in pairs if plain > 0]
