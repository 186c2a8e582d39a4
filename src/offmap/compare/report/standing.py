"""What may be said of a kind of guest RAM on a kernel, from its cells: rules, and no more than they give.

An answer that is missing is never taken for a good one. To be called hiding, a kind must have every piece of evidence;
one piece against it is enough for the opposite. So an answer taken away can only make what is said weaker.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.questions import CATALOGUE, Better, Group, Kind, Question

__all__ = [
    "LOSSES",
    "KindFinding",
    "Standing",
    "finding_of",
    "least_lost",
    "standing_of",
    "why_undetermined",
]


class Standing(Enum):
    """What may be said of a cell, or of all cells of one kind on one kernel."""

    HIDES = "hides"
    PARTLY = "partly"  # of several cells only: some hide, none is exposed
    EXPOSED = "exposed"
    UNDETERMINED = "undetermined"
    REFUSED = "refused"
    OOPS = "oops"
    FAILED = "failed"
    DEADLINE = "deadline"
    NOT_RUN = "not-run"

    @property
    def word(self) -> str:
        """As a reader sees it."""
        return _WORDS[self][1]

    @property
    def symbol(self) -> str:
        """Beside the word, for who reads across a table."""
        return _WORDS[self][0]


_WORDS = {
    Standing.HIDES: ("●", "hides"),
    Standing.PARTLY: ("◐", "hides in part"),
    Standing.EXPOSED: ("○", "exposed"),
    Standing.UNDETERMINED: ("?", "not determined"),
    Standing.REFUSED: ("⊘", "refused"),
    Standing.OOPS: ("‼", "oops"),
    Standing.FAILED: ("!", "failed"),
    Standing.DEADLINE: ("…", "not in time"),
    Standing.NOT_RUN: ("-", "not run"),
}

_MUST_BE_YES = ("works.boot", "hidden.before_io", "hidden.after_io", "hidden.control")
_MUST_BE_ZERO = (
    "hidden.direct_map_pages",
    "hidden.direct_map_pages_after_io",
    "hidden.alias_pages",
    "hidden.alias_pages_after_io",
    "hidden.unknown_pages",
    "hidden.canaries_found",
    "hidden.canaries_found_after_io",
)
_MUST_BE_SOME = ("hidden.ram_pages", "hidden.canaries_planted")
_AGAINST = tuple(id for id in _MUST_BE_ZERO if id != "hidden.unknown_pages")
"""Of which more than none is mapped guest RAM."""

LOSSES: tuple[Question, ...] = tuple(
    asked
    for asked in CATALOGUE.values()
    if asked.kind is Kind.TRI_STATE
    and asked.better is Better.HIGHER
    and (asked.group in {Group.WORKS, Group.BREAKS} or asked.id in {"hidden.zeroed", "hidden.restored"})
    and asked.id != "works.boot"
)
"""What a guest or a host can lose by hiding; booting and being hidden are judged before."""


def standing_of(result: CellResult) -> Standing:
    """One cell. Evidence of exposure counts however the cell ended; that of hiding only if it came to its end."""

    def value(id: str) -> bool | float | None:
        return result.answer(id).value

    if any(value(id) is False for id in ("hidden.before_io", "hidden.after_io")):
        return Standing.EXPOSED
    if any(value(id) for id in _AGAINST):
        return Standing.EXPOSED
    ended = {
        CellOutcome.REFUSED: Standing.REFUSED,
        CellOutcome.OOPS: Standing.OOPS,
        CellOutcome.FAILED: Standing.FAILED,
        CellOutcome.DEADLINE: Standing.DEADLINE,
    }
    if result.outcome in ended:
        return ended[result.outcome]
    return Standing.UNDETERMINED if why_undetermined(result) else Standing.HIDES


def why_undetermined(result: CellResult) -> list[str]:
    """Which evidence of hiding is missing, and why; nothing if it is complete."""
    missing = []
    for id in (*_MUST_BE_YES, *_MUST_BE_ZERO, *_MUST_BE_SOME):
        answer = result.answer(id)
        title = CATALOGUE[id].title
        if answer.value is None:
            missing.append(f"{title}: {answer.reason}")
        elif id in _MUST_BE_YES and answer.value is not True:
            missing.append(f"{title}: no{f' ({answer.reason})' if answer.reason else ''}")
        elif (id in _MUST_BE_ZERO and answer.value != 0) or (id in _MUST_BE_SOME and not answer.value > 0):
            missing.append(f"{title}: {answer.value:g}")
    return missing


@dataclass(frozen=True, slots=True)
class KindFinding:
    """One kind of RAM on one kernel.

    Attributes:
        standing: of all its cells together.
        cells: all of them.
        hiding: those of them that hide.
        lost: questions that some cell answers with no, and plain RAM in the same setting does not; by id, with the
            reason. Of the cells that hide, else of those that came to their end: a guest that is gone would answer
            everything with no.
        undetermined: questions that no cell answers with no, and not all answer with yes; by id, with the reason.
        baselines: the cells of BASELINE on the same kernel.
    """

    backend: str
    standing: Standing
    cells: tuple[CellResult, ...]
    hiding: tuple[CellResult, ...]
    lost: Mapping[str, str]
    undetermined: Mapping[str, str]
    baselines: tuple[CellResult, ...] = ()

    def control_of(self, cell: CellResult) -> CellResult | None:
        """Plain RAM against itself, in the same setting; None where that was not measured."""
        return next((plain for plain in self.baselines if _setting(plain) == _setting(cell)), None)


def finding_of(backend: str, cells: Sequence[CellResult], baselines: Iterable[CellResult]) -> KindFinding:
    """What its cells say together.

    Args:
        cells: of this kind, on one kernel.
        baselines: of BASELINE on the same kernel.
    """
    if not cells:
        return KindFinding(backend, Standing.NOT_RUN, (), (), {}, {})
    hiding = tuple(cell for cell in cells if standing_of(cell) is Standing.HIDES)
    whole = [cell for cell in cells if cell.outcome is CellOutcome.BOOTED]
    plain = {_setting(cell): cell for cell in baselines}
    lost: dict[str, str] = {}
    open_: dict[str, str] = {}
    for asked in LOSSES:
        for cell in hiding or whole:
            answer = cell.answer(asked.id)
            same = plain.get(_setting(cell))
            if answer.value is None:
                open_.setdefault(asked.id, answer.reason)
            elif answer.value is False and not (same is not None and same.answer(asked.id).value is False):
                lost.setdefault(asked.id, answer.reason)
    open_ = {id: why for id, why in open_.items() if id not in lost}
    return KindFinding(backend, _together(cells), tuple(cells), hiding, lost, open_, tuple(plain.values()))


def _setting(cell: CellResult) -> tuple[str, int, str]:
    return cell.spec.guest_kernel, cell.spec.vcpus, cell.spec.kvm_clock


def _together(cells: Iterable[CellResult]) -> Standing:
    all_of = [(cell, standing_of(cell)) for cell in cells]
    every = {standing for _, standing in all_of}
    if Standing.EXPOSED in every:
        return Standing.EXPOSED
    # With kvm-clock forced on, a refusal or an oops says why it is off by default, not what the kind can do.
    asked = {
        standing
        for cell, standing in all_of
        if not (cell.spec.kvm_clock == "on" and standing in {Standing.REFUSED, Standing.OOPS})
    }
    asked = asked or every
    if Standing.OOPS in asked:
        return Standing.OOPS
    if len(asked) == 1:
        return asked.pop()
    if Standing.HIDES in asked:
        return Standing.PARTLY
    graver = (Standing.UNDETERMINED, Standing.FAILED, Standing.DEADLINE, Standing.REFUSED)
    return next(standing for standing in graver if standing in asked)


def least_lost(findings: Sequence[KindFinding]) -> KindFinding | None:
    """The kind that hides and loses least, whatever the answers were that are missing; None if that is not settled.

    Its losses are counted at their worst (all that is not known is lost), those of its rivals at their best. A rival is
    every other kind that hides or may hide.
    """
    settled = {Standing.EXPOSED, Standing.REFUSED, Standing.OOPS, Standing.NOT_RUN}
    rivals = [finding for finding in findings if finding.standing not in settled]
    for one in findings:
        if one.standing is not Standing.HIDES:
            continue
        worst = len(one.lost) + len(one.undetermined)
        others = [rival for rival in rivals if rival is not one]
        if others and all(rival.standing is Standing.HIDES and worst < len(rival.lost) for rival in others):
            return one
    return None
