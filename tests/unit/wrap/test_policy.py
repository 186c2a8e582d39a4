"""What a wrapper's user allows."""

from offmap.errors import ExitStatus
from offmap.wrap.policy import Policy


def test_the_default_ends_what_is_exposed_and_leaves_what_nobody_could_judge() -> None:
    assert Policy().ends(ExitStatus.EXPOSED, clock_alone=True) == "--on-exposed"
    assert Policy().ends(ExitStatus.UNDETERMINED) == ""
    assert Policy().ends(ExitStatus.DONE) == ""
    assert Policy(keep_clock=True).ends(ExitStatus.EXPOSED, clock_alone=True) == ""
    assert Policy(keep_clock=True).ends(ExitStatus.EXPOSED) == "--on-exposed"
    strict = Policy(kill=False, kill_undetermined=True)
    assert (strict.ends(ExitStatus.EXPOSED), strict.ends(ExitStatus.UNDETERMINED)) == ("", "--on-undetermined")
