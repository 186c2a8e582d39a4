"""The doctor's exit status: what hides, what does not, what cannot be said."""

import pytest

from offmap.compare.doctor import Diagnosis, Health, exit_status
from offmap.errors import ExitStatus


@pytest.mark.parametrize(
    ("healths", "status"),
    [
        ([Health.HIDING, Health.REFUSED], ExitStatus.DONE),
        ([Health.MOSTLY], ExitStatus.DONE),
        ([Health.UNVERIFIED, Health.REFUSED], ExitStatus.UNDETERMINED),
        ([Health.UNVERIFIED, Health.HIDING], ExitStatus.DONE),
        ([Health.PLAIN, Health.REFUSED], ExitStatus.EXPOSED),
        ([], ExitStatus.EXPOSED),
    ],
)
def test_exit_status(healths: list[Health], status: ExitStatus) -> None:
    assert exit_status([Diagnosis("some", True, health) for health in healths]) is status


def test_a_plain_backend_never_counts_as_hiding() -> None:
    assert exit_status([Diagnosis("anon", False, Health.HIDING)]) is ExitStatus.EXPOSED
