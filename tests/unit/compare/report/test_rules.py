"""The rules of the conclusions: nothing is concluded from what is missing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.kinds import kind_names
from offmap.compare.questions import CATALOGUE, Answer, Kind
from offmap.compare.report.conclude import NOISE, conclude, cost_of
from offmap.compare.report.status import LOSSES, Status, finding_of, least_lost, status_of, why_undetermined
from offmap.compare.report.words import TIMES

from .compare_samples import PLAIN, cell, without

EVIDENCE = tuple(id for id in CATALOGUE if id.startswith("hidden.") and id not in {"hidden.zeroed", "hidden.restored"})
NOT_NEEDED = (
    *("hidden.excluded_pages", "hidden.populated_pages", "hidden.scanned_bytes"),
    *("hidden.attack", "hidden.attack_reads"),
)
NEEDED = tuple(id for id in (*EVIDENCE, "works.boot") if id not in NOT_NEEDED)

WEAKER = {
    Status.HIDES: {Status.HIDES, Status.PARTLY, Status.UNDETERMINED},
    Status.PARTLY: {Status.PARTLY, Status.UNDETERMINED, Status.FAILED, Status.DEADLINE},
    Status.EXPOSED: set(Status) - {Status.HIDES, Status.PARTLY},
}
"""What may become of a status when answers are taken away; any other stays what it is."""


@st.composite
def any_answer(draw: st.DrawFn, id: str) -> Answer:
    asked = CATALOGUE[id]
    value: bool | float | None
    if asked.kind is Kind.TRI_STATE:
        value = draw(st.sampled_from([True, True, True, False, None]))
    else:
        value = draw(st.sampled_from([0.0, 0.0, 32.0, None]))
    return Answer(id, value, "" if value else "because")


@st.composite
def any_cell(draw: st.DrawFn, backend: str | None = None) -> CellResult:
    """Mostly a good one, with some answers that are not."""
    made = cell(
        backend or draw(st.sampled_from(kind_names())),
        outcome=draw(st.sampled_from([CellOutcome.BOOTED] * 6 + list(CellOutcome))),
        kvm_clock=draw(st.sampled_from(["auto", "off", "on"])),
        vcpus=draw(st.sampled_from([1, 2])),
    )
    changed = draw(st.sets(st.sampled_from(list(CATALOGUE)), max_size=8))
    answers = {**made.answered, **{id: draw(any_answer(id)) for id in changed}}
    return replace(made, answers=tuple(answers.values()))


@st.composite
def and_less(draw: st.DrawFn, cells: list[CellResult]) -> list[CellResult]:
    """The same cells with some answers taken away."""
    return [
        without(each, *draw(st.sets(st.sampled_from([*NEEDED, *(asked.id for asked in LOSSES)]), max_size=6)))
        for each in cells
    ]


@given(st.data())
def test_a_missing_answer_never_makes_a_cell_better(data: st.DataObject) -> None:
    full = data.draw(any_cell())
    (less,) = data.draw(and_less([full]))
    before, after = status_of(full), status_of(less)
    assert after is before or after in WEAKER.get(before, {before})
    assert not (after is Status.HIDES and before is not Status.HIDES)


@settings(max_examples=150)
@given(st.data())
def test_a_missing_answer_never_makes_a_conclusion_stronger(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(kind_names()), min_size=1, max_size=4, unique=True))
    full = [data.draw(any_cell(kind)) for kind in kinds for _ in range(data.draw(st.integers(1, 2)))]
    less = data.draw(and_less(full))
    (before,), (after,) = conclude(full), conclude(less)
    for was, now in zip(before.findings, after.findings, strict=True):
        # Where one cell is exposed and another hides, only the latter is left to be said once the proof is gone.
        if was.status is not Status.EXPOSED:
            assert now.status is was.status or now.status in WEAKER.get(was.status, {was.status})
        assert len(now.hiding) <= len(was.hiding)
    # One whose proof is gone can be compared with the others now, or be the best: it is left out on both sides.
    pairs = zip(before.findings, after.findings, strict=True)
    kept = [(was, now) for was, now in pairs if was.status is not Status.EXPOSED or now.status is Status.EXPOSED]
    best_before, best_after = least_lost([was for was, _ in kept]), least_lost([now for _, now in kept])
    assert best_after is None or (best_before is not None and best_before.backend == best_after.backend)


@settings(max_examples=150)
@given(st.data())
def test_losses_are_never_fewer_for_what_is_not_known(data: st.DataObject) -> None:
    """Counted at their worst; baselines that are missing included."""
    full = data.draw(any_cell("unplugged"))
    plain = data.draw(any_cell("memfd"))
    less, less_plain = data.draw(and_less([full, plain]))
    was, now = (finding_of("unplugged", [one], [beside]) for one, beside in ((full, plain), (less, less_plain)))
    assert set(was.lost) <= {*now.lost, *now.undetermined} and set(was.undetermined) <= set(now.undetermined)


def test_hides_if_all_the_evidence_says_so() -> None:
    assert status_of(cell("unplugged")) is Status.HIDES and not why_undetermined(cell("unplugged"))
    for kind in PLAIN:
        assert status_of(cell(kind)) is Status.EXPOSED


@pytest.mark.parametrize("id", NEEDED)
def test_each_piece_of_the_evidence_is_needed(id: str) -> None:
    less = without(cell("unplugged"), id)
    assert status_of(less) is Status.UNDETERMINED
    assert why_undetermined(less) == [f"{CATALOGUE[id].title}: not asked"]


@pytest.mark.parametrize(
    ("id", "value"),
    [
        ("hidden.before_io", False),
        ("hidden.after_io", False),
        ("hidden.attack", False),
        ("hidden.canaries_found", 1.0),
        ("hidden.canaries_found_after_io", 1.0),
        ("hidden.direct_map_pages", 1.0),
        ("hidden.alias_pages_after_io", 1.0),
    ],
)
@pytest.mark.parametrize("outcome", list(CellOutcome))
def test_one_piece_against_it_is_enough_however_the_cell_ended(
    id: str, value: bool | float, outcome: CellOutcome
) -> None:
    found = cell("unplugged", outcome=outcome, answers={id: Answer(id, value, "seen")})
    assert status_of(found) is Status.EXPOSED


@pytest.mark.parametrize(
    ("id", "value"), [("hidden.control", False), ("hidden.unknown_pages", 3.0), ("works.boot", False)]
)
def test_without_a_control_or_with_pages_unknown_nothing_is_hidden(id: str, value: bool | float) -> None:
    found = cell("unplugged", answers={id: Answer(id, value, "seen")})
    assert status_of(found) is Status.UNDETERMINED


def test_an_attack_that_says_nothing_leaves_it_to_the_evidence() -> None:
    reached = Answer("hidden.attack", None, "reached: kcore cannot read there")
    assert status_of(cell("unplugged", answers={"hidden.attack": reached})) is Status.HIDES
    assert status_of(without(cell("unplugged"), "hidden.attack")) is Status.HIDES


@pytest.mark.parametrize("outcome", [one for one in CellOutcome if one is not CellOutcome.BOOTED])
def test_a_cell_that_did_not_get_to_its_end_does_not_hide(outcome: CellOutcome) -> None:
    assert status_of(cell("unplugged", outcome=outcome)).value == outcome.value


def test_of_several_cells() -> None:
    good, bad = (
        cell("unplugged"),
        cell("unplugged", vcpus=2, answers={"hidden.after_io": Answer("hidden.after_io", False, "x")}),
    )
    oops = cell("unplugged", outcome=CellOutcome.OOPS, reason="BUG")
    clock = replace(oops, spec=replace(oops.spec, kvm_clock="on"))
    failed = cell("unplugged", outcome=CellOutcome.FAILED, vcpus=2)
    cases = [
        ([good], Status.HIDES),
        ([good, bad], Status.EXPOSED),
        ([good, oops], Status.OOPS),
        ([good, clock], Status.HIDES),  # which says why offmap does not offer it
        ([clock], Status.OOPS),
        ([good, failed], Status.PARTLY),
        ([failed, clock], Status.FAILED),
        ([], Status.NOT_RUN),
    ]
    for cells, status in cases:
        assert finding_of("unplugged", cells, []).status is status


def test_what_plain_ram_has_not_either_is_not_lost() -> None:
    no = {"works.async_pf": Answer("works.async_pf", False, "not offered")}
    guest = cell("unplugged", answers=no)
    assert not finding_of("unplugged", [guest], [cell("memfd", answers=no)]).lost
    assert "works.async_pf" in finding_of("unplugged", [guest], [cell("memfd")]).lost
    assert "works.async_pf" in finding_of("unplugged", [guest], [without(cell("memfd"), "works.async_pf")]).lost


def test_what_its_vmm_has_not_is_not_lost() -> None:
    no = {"works.vhost_net": Answer("works.vhost_net", False, "Firecracker has no vhost")}
    hidden, plain = cell("firecracker-unplugged", answers=no), cell("firecracker-anon", answers=no)
    for cells, lost in (([hidden, plain, cell("memfd")], {}), ([hidden, cell("memfd")], {"works.vhost_net"})):
        (one,) = conclude(cells)
        assert {*next(f for f in one.findings if f.backend == "firecracker-unplugged").lost} == {*lost}


def test_the_sentences() -> None:
    no = {"works.balloon": Answer("works.balloon", False, "PFNMAP")}
    (one,) = conclude(
        [
            cell("memfd"),
            cell("unplugged", answers=no),
            cell("secretmem", outcome=CellOutcome.REFUSED, reason="GUP"),
            cell("reserved", outcome=CellOutcome.DEADLINE, reason="600 s"),
            cell("secretmem-bridge", outcome=CellOutcome.OOPS, reason="BUG"),
        ]
    )
    assert one.answer == (
        "unplugged boots and hides all guest RAM; of reserved it could not be determined; "
        "secretmem-bridge brought the host down."
    )
    assert one.choice == "It loses the balloon."
    assert "reserved on debian:6.12, guest debian:6.12, 1 vCPU: not in time: 600 s" in one.unsettled
    assert one.unsettled[-1].startswith("not run on this kernel: anon, hugetlb")


def test_nothing_hides_is_not_said_of_what_was_not_seen() -> None:
    (one,) = conclude([cell("memfd"), cell("reserved", outcome=CellOutcome.FAILED, reason="x")])
    assert one.answer == "Nothing was found to hide; of reserved it could not be determined." and not one.choice
    (one,) = conclude([cell("memfd"), cell("secretmem", outcome=CellOutcome.REFUSED, reason="x")])
    assert one.answer == "Nothing that was run hides here."


def test_least_lost_needs_a_margin() -> None:
    def losing(kind: str, *ids: str, unknown: tuple[str, ...] = ()) -> CellResult:
        lost = {id: Answer(id, False, "no") for id in ids}
        return without(cell(kind, answers=lost), *unknown)

    two = ("works.balloon", "works.vhost_net")

    def best(*cells: CellResult) -> str | None:
        (one,) = conclude(cells)
        found = least_lost(one.findings)
        return found.backend if found else None

    assert best(losing("unplugged", "works.balloon"), losing("reserved", *two)) == "unplugged"
    assert best(losing("unplugged", "works.balloon", unknown=("breaks.kexec",)), losing("reserved", *two)) is None
    assert best(losing("unplugged"), without(losing("reserved", *two), "hidden.after_io")) is None
    assert best(losing("unplugged")) is None


def test_a_cost_must_stand_out_of_the_noise() -> None:
    """Plain RAM against itself shows how much of a difference is none."""

    def copy(kind: str, *samples: float) -> CellResult:
        answer = Answer("costs.copy", samples[2], samples=samples, baseline=(100.0,) * len(samples))
        return cell(kind, answers={"costs.copy": answer})

    def said(*cells: CellResult) -> str:
        (one,) = conclude(cells)
        (finding,) = [each for each in one.findings if each.backend == "unplugged"]
        return cost_of(finding, CATALOGUE["costs.copy"])

    noisy, quiet = copy("memfd", 70, 80, 100, 120, 130), copy("memfd", 99, 99, 100, 101, 101)
    less = copy("unplugged", 80, 85, 90, 91, 92)
    assert said(quiet, less) == f"{TIMES}0.9"
    assert said(noisy, less) == said(less) == f"{NOISE}{TIMES}0.9"
    assert said(quiet, copy("unplugged", 80, 90, 99, 110, 120)).startswith(NOISE)
    assert said(quiet, copy("unplugged", 80, 80, 81)) == "81 MB/s"
    assert said(quiet, without(less, "costs.copy")) == "?"


@pytest.mark.parametrize("outcome", [one for one in CellOutcome if one is not CellOutcome.BOOTED])
def test_what_a_cell_said_that_did_not_get_to_its_end_is_no_loss(outcome: CellOutcome) -> None:
    """The guest may have been gone already."""
    gone = {"breaks.gdb_attach": Answer("breaks.gdb_attach", False, "the guest did not live through it")}
    assert not finding_of("unplugged", [cell("unplugged", outcome=outcome, answers=gone)], [cell("memfd")]).lost
