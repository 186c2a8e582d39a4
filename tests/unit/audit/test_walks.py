"""The moments of walks over a stretch of time."""

from itertools import islice, pairwise

from offmap.audit.walks import _moments


def test_moments_ascend_and_are_spread_evenly() -> None:
    rounds = [list(_moments(20, 10.0)) for _ in range(2000)]
    for moments in rounds:
        assert len(moments) == 20 and moments[0] == 0
        assert all(before <= after for before, after in pairwise(moments)) and moments[-1] < 10
    others = [moment for moments in rounds for moment in moments[1:]]
    # 38,000 draws, 3,800 expected in each tenth, standard deviation 58: ten of them.
    for tenth in range(10):
        assert abs(sum(tenth <= moment < tenth + 1 for moment in others) - 3800) < 580


def test_the_moments_of_a_year_are_not_made_beforehand() -> None:
    assert len(list(islice(_moments(20 * 86400 * 365, 86400.0 * 365), 100))) == 100
