"""Option values: what is none is told in one line."""

import argparse

import pytest

from offmap.cli.arguments import count, seconds


def test_values() -> None:
    assert (count("1"), count("12")) == (1, 12)
    assert (seconds("0.5"), seconds("600")) == (0.5, 600.0)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "two", "²"])
def test_no_count(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not 1 or more"):
        count(text)


@pytest.mark.parametrize("text", ["0", "-1", "", "soon", "inf", "nan"])
def test_no_seconds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of seconds"):
        seconds(text)
