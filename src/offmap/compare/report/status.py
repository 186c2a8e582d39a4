"""The status of a cell, and of a kind of guest RAM on a kernel: rules that follow from the answers.

A missing answer never counts as a good one. A kind hides only with every piece of evidence; one piece against it makes
it exposed. So taking an answer away can only weaken a status. The attack's alone is no evidence of hiding: it is about
one secret, and counts only against.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.questions import CATALOGUE, Better, Group, Kind, Question


class Status(Enum):
    """The result of a cell, or of all cells of one kind on one kernel."""

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
    Status.HIDES: ("●", "hides"),
    Status.PARTLY: ("◐", "hides in part"),
    Status.EXPOSED: ("○", "exposed"),
    Status.UNDETERMINED: ("?", "not determined"),
    Status.REFUSED: ("⊘", "refused"),
    Status.OOPS: ("‼", "oops"),
    Status.FAILED: ("!", "failed"),
    Status.DEADLINE: ("…", "not in time"),
    Status.NOT_RUN: ("-", "not run"),
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
"""At least one such page or secret is guest RAM that the host kernel can reach."""

LOSSES: tuple[Question, ...] = tuple(
    asked
    for asked in CATALOGUE.values()
    if asked.kind is Kind.TRI_STATE
    and asked.better is Better.HIGHER
    and (asked.group in {Group.WORKS, Group.BREAKS} or asked.id in {"hidden.zeroed", "hidden.restored"})
    and asked.id != "works.boot"
)
"""What a guest or a host can lose by hiding. Booting and being hidden are no such loss: they are judged before."""


def status_of(result: CellResult) -> Status:
    """The status of one cell. Exposure counts however the cell ended, hiding only if it came to its end."""

    def value(id: str) -> bool | float | None:
        return result.answer(id).value

    if any(value(id) is False for id in ("hidden.before_io", "hidden.after_io", "hidden.attack")):
        return Status.EXPOSED
    if any(value(id) for id in _AGAINST):
        return Status.EXPOSED
    ended = {
        CellOutcome.REFUSED: Status.REFUSED,
        CellOutcome.OOPS: Status.OOPS,
        CellOutcome.FAILED: Status.FAILED,
        CellOutcome.DEADLINE: Status.DEADLINE,
    }
    if result.outcome in ended:
        return ended[result.outcome]
    return Status.UNDETERMINED if why_undetermined(result) else Status.HIDES


def why_undetermined(result: CellResult) -> list[str]:
    """Each piece of evidence of hiding that is missing, with the reason; empty if none is."""
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
        status: of all its cells together.
        cells: all of them.
        hiding: those of them that hide.
        lost: by question, the reason why a cell answers no where plain RAM in the same setting does not. It is taken
            from the cells that hide, or else from those that came to their end: a guest that is gone answers only no.
        undetermined: by question, the reason why a cell has no answer, where no cell answers no.
        baselines: the cells of BASELINE on the same kernel.
    """

    backend: str
    status: Status
    cells: tuple[CellResult, ...]
    hiding: tuple[CellResult, ...]
    lost: Mapping[str, str]
    undetermined: Mapping[str, str]
    baselines: tuple[CellResult, ...] = ()

    def control_of(self, cell: CellResult) -> CellResult | None:
        """Plain RAM against itself, in the same setting; None where that was not measured."""
        return next((plain for plain in self.baselines if _setting(plain) == _setting(cell)), None)


def finding_of(
    backend: str, cells: Sequence[CellResult], baselines: Sequence[CellResult], beside: Sequence[CellResult] = ()
) -> KindFinding:
    """The finding of one kind on one kernel.

    Args:
        cells: of this kind, on one kernel.
        baselines: of BASELINE on the same kernel.
        beside: on plain RAM under the kind's own VMM, on the same kernel; by default `baselines`.
    """
    if not cells:
        return KindFinding(backend, Status.NOT_RUN, (), (), {}, {})
    hiding = tuple(cell for cell in cells if status_of(cell) is Status.HIDES)
    whole = [cell for cell in cells if cell.outcome is CellOutcome.BOOTED]
    plain = {_setting(cell): cell for cell in beside or baselines}
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
    return KindFinding(backend, _together(cells), tuple(cells), hiding, lost, open_, tuple(baselines))


def _setting(cell: CellResult) -> tuple[str, int, str]:
    return cell.spec.guest_kernel, cell.spec.vcpus, cell.spec.kvm_clock


def _together(cells: Iterable[CellResult]) -> Status:
    all_of = [(cell, status_of(cell)) for cell in cells]
    every = {status for _, status in all_of}
    if Status.EXPOSED in every:
        return Status.EXPOSED
    # With kvm-clock forced on, a refusal or an oops says why it is off by default, not what the kind can do.
    asked = {
        status
        for cell, status in all_of
        if not (cell.spec.kvm_clock == "on" and status in {Status.REFUSED, Status.OOPS})
    }
    asked = asked or every
    if Status.OOPS in asked:
        return Status.OOPS
    if len(asked) == 1:
        return asked.pop()
    if Status.HIDES in asked:
        return Status.PARTLY
    graver = (Status.UNDETERMINED, Status.FAILED, Status.DEADLINE, Status.REFUSED)
    return next(status for status in graver if status in asked)


def least_lost(findings: Sequence[KindFinding]) -> KindFinding | None:
    """The kind that hides and loses least, whatever the missing answers are; None if that is not settled.

    For the kind itself, every missing answer counts as a loss; for its rivals, none does. A rival is any other kind
    that hides or may hide.
    """
    settled = {Status.EXPOSED, Status.REFUSED, Status.OOPS, Status.NOT_RUN}
    rivals = [finding for finding in findings if finding.status not in settled]
    for one in findings:
        if one.status is not Status.HIDES:
            continue
        worst = len(one.lost) + len(one.undetermined)
        others = [rival for rival in rivals if rival is not one]
        if others and all(rival.status is Status.HIDES and worst < len(rival.lost) for rival in others):
            return one
    return None
