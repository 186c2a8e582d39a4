"""What a wrapper's user allows, and how it reaches the supervisor."""

import itertools

import pytest

from offmap.errors import ExitStatus
from offmap.wrap.policy import Policy

NAMES = list(vars(Policy()))


@pytest.mark.parametrize("values", list(itertools.product((False, True), repeat=len(NAMES))))
def test_the_supervisor_gets_what_the_user_chose(values: tuple[bool, ...]) -> None:
    policy = Policy(**dict(zip(NAMES, values, strict=True)))
    assert vars(Policy.from_words(policy.words())) == vars(policy)


def test_the_default_ends_what_is_exposed_and_leaves_what_nobody_could_judge() -> None:
    assert Policy().ends(ExitStatus.EXPOSED, clock_alone=True) == "--on-exposed"
    assert Policy().ends(ExitStatus.UNDETERMINED) == ""
    assert Policy().ends(ExitStatus.DONE) == ""
    assert Policy(keep_clock=True).ends(ExitStatus.EXPOSED, clock_alone=True) == ""
    assert Policy(keep_clock=True).ends(ExitStatus.EXPOSED) == "--on-exposed"
    strict = Policy(kill=False, kill_undetermined=True)
    assert (strict.ends(ExitStatus.EXPOSED), strict.ends(ExitStatus.UNDETERMINED)) == ("", "--on-undetermined")
