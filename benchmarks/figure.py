"""One measured figure with its peer's beside it, as the line of JSON that every benchmark prints."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from offmap import __version__
from offmap.audit.host import host_facts

__all__ = ["Figure", "Limit", "median_interval"]

SCHEMA = "offmap-benchmark/1"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a figure must reach.

    Attributes:
        of: the field (``ours`` or ``ratio``) that is limited.
        at_most, at_least: inclusive; None where there is no such bound.
        all_pairs: for "no slower than": it is missed only if every pair of samples, taken by turns, is beyond. (Of five
            pairs of equals that happens once in 32 times.)
    """

    of: str
    at_most: float | None = None
    all_pairs: bool = False
    at_least: float | None = None

    def allows(self, value: float | None) -> bool:
        """Whether it is within the bounds; what there is no value of is not."""
        if value is None:
            return False
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def to_json(self, value: float | None, pairs: Sequence[float]) -> dict[str, Any]:
        """With ``met``: of the value, or with ``all_pairs`` of any of the pairs."""
        bounds = {"at_most": self.at_most, "at_least": self.at_least}
        result: dict[str, Any] = {"of": self.of}
        result |= {name: bound for name, bound in bounds.items() if bound is not None}
        if self.all_pairs:
            return {**result, "met": self.allows(value) or any(map(self.allows, pairs)), "all_pairs": True}
        return {**result, "met": self.allows(value)}


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians of the samples that one run took of us and of the peer, by turns.

    Attributes:
        benchmark, name: what was measured.
        unit: of every sample.
        ours: our samples, at least one.
        peer_is: what the peer is; empty where a figure has none.
        peer: the peer's samples, from the same run.
        limit: what it must reach, if anything.
        facts: what else a reader needs to judge it.
    """

    benchmark: str
    name: str
    unit: str
    ours: Sequence[float]
    peer_is: str = ""
    peer: Sequence[float] = ()
    limit: Limit | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; ``ratio`` is ours over the peer's, ``spread`` the least and the greatest sample and pair."""
        ours = median(self.ours)
        peer = median(self.peer) if self.peer else None
        ratio = ours / peer if peer else None
        pairs = [mine / theirs for mine, theirs in zip(self.ours, self.peer, strict=False) if theirs]
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "offmap": __version__,
            "benchmark": self.benchmark,
            "figure": self.name,
            "unit": self.unit,
            "ours": _round(ours),
            "peer": _round(peer),
            "peer_is": self.peer_is or None,
            "ratio": _round(ratio),
            "n": len(self.ours),
            "spread": {"ours": _spread(self.ours), "peer": _spread(self.peer), "ratio": _spread(pairs)},
        }
        if self.limit is not None:
            result["limit"] = self.limit.to_json({"ours": ours, "ratio": ratio}[self.limit.of], pairs)
        return {**result, **self.facts, "host": host_facts().to_json()}

    def print(self) -> None:
        """One line on standard output."""
        print(json.dumps(self.to_json()), flush=True)


def _round(value: float | None) -> float | None:
    """Four significant digits: more than any of these measurements has."""
    return None if value is None else float(f"{value:.4g}")


def _spread(samples: Sequence[float]) -> list[float | None] | None:
    return [_round(min(samples)), _round(max(samples))] if samples else None


def median_interval(pairs: Sequence[float]) -> tuple[float, float] | None:
    """Where the median of all such pairs is, with 95 %: between two of them, by the binomial distribution."""
    ordered, count = sorted(pairs), len(pairs)
    beyond, tail = -1, 0.0
    while (tail := tail + math.comb(count, beyond + 1) / 2**count) <= 0.025:
        beyond += 1
    if beyond < 0:
        return None  # too few
    return ordered[beyond], ordered[count - 1 - beyond]
