"""The command line that all benchmarks have in common, and what they end in."""

import argparse
import sys
from collections.abc import Callable

from offmap.errors import OffmapError

__all__ = ["benchmark_parser", "exit_status"]


def benchmark_parser(description: str | None, rounds: int, quick: str) -> argparse.ArgumentParser:
    """A parser with ``--rounds`` and ``--quick``.

    Args:
        rounds: by default.
        quick: what is then done, for people.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def exit_status(name: str, measure: Callable[[], int]) -> int:
    """That of ``measure``; or of what it could not do, which is said in one line."""
    try:
        return measure()
    except OffmapError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status
