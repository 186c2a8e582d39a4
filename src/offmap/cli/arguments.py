"""Types of option values that several commands share. Each gives the value, or one line why it is wrong."""

import argparse


def count(text: str) -> int:
    """A whole number, 1 or more. Raises ArgumentTypeError: the text is no such number."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def seconds(text: str) -> float:
    """A finite time in seconds, more than 0. Raises ArgumentTypeError: the text is no such time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value
