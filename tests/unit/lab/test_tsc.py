"""The time stamp counter's frequency, measured on this machine."""

import platform

import pytest

from offmap.lab.tsc import tsc_khz


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no x86: there is no such counter to measure")
def test_it_is_the_same_each_time() -> None:
    first, second = tsc_khz(), tsc_khz()
    if first is None or second is None:
        pytest.skip("this machine is too busy, or forbids it: the frequency was not measured")
    assert 500_000 < first < 10_000_000
    assert second == pytest.approx(first, rel=0.002)
