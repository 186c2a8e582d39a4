"""The line of JSON that a benchmark prints."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "figure.py"
    spec = importlib.util.spec_from_file_location("offmap_benchmarks_figure", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def test_medians_spread_and_ratio(figure: ModuleType) -> None:
    data = figure.Figure("b", "f", "s", [3.0, 1.0, 2.0], "other", [4.0, 4.0, 5.0]).to_json()
    assert (data["ours"], data["peer"], data["ratio"], data["n"]) == (2.0, 4.0, 0.5, 3)
    assert data["spread"] == {"ours": [1.0, 3.0], "peer": [4.0, 5.0], "ratio": [0.25, 0.75]}
    assert "limit" not in data


@pytest.mark.parametrize(("of", "at_most", "met"), [("ratio", 0.5, True), ("ratio", 0.4, False), ("ours", 1.9, False)])
def test_limit(figure: ModuleType, of: str, at_most: float, met: bool) -> None:
    data = figure.Figure("b", "f", "s", [2.0], "other", [4.0], figure.Limit(of, at_most)).to_json()
    assert data["limit"] == {"of": of, "at_most": at_most, "met": met}


@pytest.mark.parametrize(("at_least", "met"), [(0.5, True), (0.6, False)])
def test_limit_of_what_is_better_the_more_there_is(figure: ModuleType, at_least: float, met: bool) -> None:
    data = figure.Figure("b", "f", "MB/s", [2.0], "other", [4.0], figure.Limit("ratio", at_least=at_least)).to_json()
    assert data["limit"] == {"of": "ratio", "at_least": at_least, "met": met}
    alone = figure.Figure("b", "f", "MB/s", [2.0], limit=figure.Limit("ratio", at_least=at_least)).to_json()
    assert alone["limit"]["met"] is False


def test_a_limit_without_a_peer_is_not_met(figure: ModuleType) -> None:
    data = figure.Figure("b", "f", "s", [2.0], limit=figure.Limit("ratio", 1.0)).to_json()
    assert data["ratio"] is None
    assert data["limit"]["met"] is False


@pytest.mark.parametrize(("ours", "met"), [([2, 2, 2], False), ([2, 2, 0.9], True), ([0.9, 0.9, 2], True)])
def test_no_slower_is_missed_only_if_every_pair_says_so(figure: ModuleType, ours: list[float], met: bool) -> None:
    limit = figure.Limit("ratio", 1.0, all_pairs=True)
    data = figure.Figure("b", "f", "s", ours, "other", [1.0, 1.0, 1.0], limit).to_json()
    assert data["limit"] == {"of": "ratio", "at_most": 1.0, "met": met, "all_pairs": True}


def test_a_peer_of_nothing_has_no_ratio(figure: ModuleType) -> None:
    assert figure.Figure("b", "f", "flushes", [1.0], "other", [0.0]).to_json()["ratio"] is None


def test_one_line_of_json_with_the_hosts_facts(figure: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    figure.Figure("b", "f", "s", [1 / 3], facts={"exits": 7}).print()
    (line,) = capsys.readouterr().out.splitlines()
    data = json.loads(line)
    assert data["ours"] == 0.3333
    assert data["exits"] == 7
    assert {"kernel", "cpu", "memory_bytes"} <= set(data["host"])


def test_too_few_samples_have_no_interval(figure: ModuleType) -> None:
    assert figure.median_interval([1.0] * 5) is None
    assert figure.median_interval([6.0, 1.0, 3.0, 2.0, 5.0, 4.0]) == (1.0, 6.0)


def test_the_interval_has_the_median_of_all_nearly_always(figure: ModuleType) -> None:
    dice = random.Random(1)
    intervals = [figure.median_interval([dice.random() for _ in range(25)]) for _ in range(1000)]
    assert 940 < sum(low <= 0.5 <= high for low, high in intervals) < 990
