"""A process that does something is waited for; one that does not, or spins without a word, is given up."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from offmap import patience
from offmap.patience import Watch

MEASURE = patience._slowness


@contextmanager
def running(program: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SPIN_SECONDS", 0.3)
    monkeypatch.setattr(patience, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(patience, "_slowness", lambda: 1.0)


def until_stuck(watch: Watch, meanwhile: Callable[[], None] = lambda: None) -> str:
    while not (why := watch.stuck()):
        meanwhile()
        time.sleep(0.01)
    return why


def test_sleeping_is_doing_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SPIN_SECONDS", 1000.0)  # to start takes processor time, more on a slow machine
    with running("import time; time.sleep(1000)") as pid:
        assert "did nothing for 1 s" in until_stuck(Watch(lambda: pid, lambda: 0))


def test_spinning_without_a_word_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process whose share of a busy machine is used up stands still, and no figure of it says so.
    monkeypatch.setattr(patience, "IDLE_SECONDS", 1000.0)
    with running("while True: pass") as pid:
        assert "processor time without a word" in until_stuck(Watch(lambda: pid, lambda: 0))


def test_who_speaks_may_go_on() -> None:
    words = 0

    def speak() -> None:
        nonlocal words
        words += 1

    with running("while True: pass") as pid:
        watch = Watch(lambda: pid, lambda: words)
        for _ in range(20):
            speak()
            assert watch.stuck() == ""
            time.sleep(0.1)


def test_no_process_is_doing_nothing() -> None:
    assert "did nothing" in until_stuck(Watch(lambda: None, lambda: 0))


def test_limits_are_never_shorter_than_chosen() -> None:
    assert MEASURE() >= 1.0
    measured = patience.calibration()
    assert 1.0 <= measured.slowness <= measured.stretch
    assert "limits are" in str(measured)


def test_limits_grow_with_what_else_runs() -> None:
    def stretch() -> float:
        return patience.calibration().stretch

    with ExitStack() as others:
        count = 3 * (os.cpu_count() or 1)
        for _ in range(count):
            others.enter_context(running("while True: pass"))
        while stretch() < 1.0 + count / (os.cpu_count() or 1) / 2:
            time.sleep(0.01)  # until they are there
