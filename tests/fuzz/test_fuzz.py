"""A short share of what ``make fuzz`` does, and that it finds what is wrong."""

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from offmap.devices.virtio import queue as queue_module
from offmap.devices.virtio.blk import Blk
from offmap.devices.virtio.dma import Dma
from offmap.devices.virtio.queue import Chain

from .run import TARGETS, Failed, Runner, corpus, inputs

CASES = 1000
LEAST_COVERED = 78  # percent of the branches; the rest are those of unreached.toml


@pytest.mark.parametrize("name", TARGETS)
def test_no_case_fails_and_most_get_further_than_the_first_check(name: str) -> None:
    with Runner(name) as runner:
        for data in (*corpus(name), *islice(inputs(1), CASES)):
            runner(data)
        score = runner.score
    assert score.cases >= CASES
    assert score.refused < score.cases / 2


def found(name: str) -> Failed:
    """What a target finds."""
    with Runner(name) as runner, pytest.raises(Failed) as failed:
        for data in (*corpus(name), *islice(inputs(1), 20 * CASES)):
            runner(data)
    return failed.value


def test_a_device_that_writes_to_a_page_that_is_kept_from_the_guest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Dma.__init__
    monkeypatch.setattr(Dma, "__init__", lambda self, regions, excluded=(): make(self, regions))
    assert "kept from the guest" in str(found("rng").__cause__)


def test_a_queue_that_believes_a_long_chain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = queue_module._straight

    def one_too_many(head: int, *rest: object) -> Chain | None:
        chain = straight(head, *rest)  # type: ignore[arg-type]
        return None if chain is None else chain._replace(readable_bytes=chain.readable_bytes + 1)

    monkeypatch.setattr(queue_module, "_straight", one_too_many)
    assert isinstance(found("queue").__cause__, AssertionError)


def test_a_device_that_raises_what_is_no_error_of_the_driver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Blk, readable: list[memoryview], writable: list[memoryview]) -> int:
        raise IndexError("a bug")

    monkeypatch.setattr(Blk, "_get_id", broken)
    assert isinstance(found("drive").__cause__, IndexError)


def test_the_corpus_reaches_most_branches() -> None:
    """In a process of its own: coverage must be there before the modules that it looks at."""
    command = [sys.executable, "-m", "tests.fuzz", "--coverage"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    print(done.stdout)
    share = re.search(r"branches reached \(([\d.]+) %\)", done.stdout)
    assert share and float(share[1]) > LEAST_COVERED
    # What is reached by luck may be missed.
    assert done.stdout.count("no reason given") < 10
