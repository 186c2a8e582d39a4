"""Questions and answers: never a default, never the wrong kind."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.compare.questions import CATALOGUE, Answer, Better, Kind


def test_ids_name_their_group() -> None:
    assert all(question.id.partition(".")[0] == question.group.value for question in CATALOGUE.values())
    assert len({question.title for question in CATALOGUE.values()}) == len(CATALOGUE)


def test_what_counts_for_hiding_is_better_lower() -> None:
    for name in ("direct_map_pages", "alias_pages", "unknown_pages", "canaries_found"):
        assert CATALOGUE[f"hidden.{name}"].better is Better.LOWER


@pytest.mark.parametrize(
    ("question", "value", "reason"),
    [
        ("works.boot", None, ""),  # not determined, and nobody knows why
        ("works.boot", 1, ""),  # a number where a yes or no is asked for
        ("works.boot", "yes", ""),
        ("costs.boot", True, ""),
        ("costs.unheard_of", 1.0, ""),
    ],
)
def test_what_is_no_answer(question: str, value: bool | float | None, reason: str) -> None:
    with pytest.raises(ValueError, match=r"question|value|answer|number|tri-state"):
        Answer(question, value, reason)


_floats = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.sampled_from(sorted(CATALOGUE)),
    st.booleans(),
    _floats,
    st.text(min_size=1),
    st.lists(_floats),
    st.lists(_floats),
    st.text(),
)
def test_answers_go_through_json(
    name: str, yes: bool, number: float, reason: str, samples: list[float], baseline: list[float], detail: str
) -> None:
    value = yes if CATALOGUE[name].kind is Kind.TRI_STATE else number
    for one in (value, None):
        answer = Answer(name, one, reason, tuple(samples), tuple(baseline), detail)
        assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer


@pytest.mark.parametrize("data", [{}, {"question": "works.boot"}, [], None, {"question": "x", "value": None}])
def test_what_is_not_an_answer_is_not_read_as_one(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"question|object|value"):
        msgspec.convert(data, Answer)


def test_a_ratio_is_of_pairs() -> None:
    answer = Answer("costs.boot", 2.0, samples=(2, 4, 6, 8, 10), baseline=(1, 2, 3, 4, 2.5))
    ratio = answer.ratio
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (2, 2, 2, 5)


def test_few_pairs_are_no_ratio() -> None:
    assert Answer("costs.boot", 2.0, samples=(2,) * 4, baseline=(1,) * 4).ratio is None
    assert Answer("costs.boot", 2.0, samples=(2,) * 9).ratio is None
    assert Answer("costs.boot", 2.0, samples=(2,) * 5, baseline=(1, 1, 1, 1, 0)).ratio is None


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=5))
def test_the_median_lies_in_its_spread(pairs: list[tuple[float, float]]) -> None:
    ratio = Answer("costs.boot", 1.0, samples=tuple(a for a, _ in pairs), baseline=tuple(b for _, b in pairs)).ratio
    assert ratio is not None
    assert ratio.low <= ratio.median * (1 + 1e-9) and ratio.median <= ratio.high * (1 + 1e-9)
    assert math.isfinite(ratio.median)
