"""What a kernel's own test said, and what two kernels' runs of it say together."""

from pathlib import Path
from typing import Any

import pytest

from offmap.lab.command import Completed
from offmap.lab.errors import LabError, LabPanic, LabTimeout
from offmap.lab.selftests_run import Outcome, Result, Runner, cases_of, compare, judge

OK, FAIL, SKIP = Outcome.OK, Outcome.FAIL, Outcome.SKIP
KTAP = """TAP version 13
1..6
# Starting 6 tests
ok 1 - populate
not ok 2 fixed.buffer: no
  not ok 1 nested
ok 3 vmsplice # SKIP no pages
ok 4
ok 5 populate
not ok 6 later # TODO known
# Totals: pass:3 fail:1
okay 7 no result
"""


def test_cases_are_what_ktap_says() -> None:
    assert cases_of(KTAP) == {
        "populate": OK,
        "fixed.buffer: no": FAIL,
        "vmsplice": SKIP,
        "case 4": OK,
        "populate (2)": OK,
        "later": SKIP,
    }


@pytest.mark.parametrize(
    ("status", "output", "log", "outcome", "why"),
    [
        (0, "", "", OK, ""),
        (0, "ok 1 a\n", "[ 1.0] PCI: report a bug\n", OK, ""),
        (4, "1..0 # SKIP no SEV\n", "", SKIP, "1..0 # SKIP no SEV"),
        (1, "ok 1 a\nnot ok 2 b\n", "", FAIL, "not ok 2 b"),
        (254, "==== Test Assertion Failure ====\n  x.c:1: r\n", "", FAIL, "==== Test Assertion Failure ===="),
        (3, "", "", FAIL, "status 3"),
        (0, "", "[    7.123456] WARNING: mm/gup.c:1 at x\n", FAIL, "WARNING: mm/gup.c:1 at x"),
        (0, "", "[    7.1] BUG: KASAN: slab-use-after-free in x\n", FAIL, "BUG: KASAN: slab-use-after-free in x"),
        (
            0,
            "",
            "[    7.1] INFO: task a blocked for more than 120 s\n",
            FAIL,
            "INFO: task a blocked for more than 120 s",
        ),
    ],
)
def test_how_a_test_ended(status: int, output: str, log: str, outcome: Outcome, why: str) -> None:
    run = judge(status, output, log)
    assert (run.outcome, run.why) == (outcome, why)
    assert run.cases == cases_of(output)


@pytest.mark.parametrize(
    ("stock", "kernel", "worse"),
    [
        (Result(OK), Result(OK), []),
        (Result(OK), Result(FAIL, "status 3"), ["status 3"]),
        (Result(OK), Result(SKIP, "no pages"), []),
        (Result(FAIL, "a"), Result(FAIL, "b"), []),
        (Result(FAIL, "a"), Result(OK), []),
        (None, Result(FAIL, "b"), []),
        # A test that fails on both can still have got worse.
        (Result(FAIL, "", {"a": OK, "b": FAIL}), Result(FAIL, "", {"a": FAIL, "b": OK}), ["a"]),
        (Result(OK, "", {"a": OK, "b": OK}), Result(FAIL, "", {"a": OK, "b": FAIL}), ["b"]),
        (Result(OK, "", {"a": OK}), Result(OK, "", {"a": SKIP}), []),
        (Result(OK, "", {"a": OK}), Result(OK, "", {"new": FAIL}), []),
        # One that ends its host, or has the kernel complain, though a case fails on both.
        (Result(FAIL, "b", {"b": FAIL}), Result(FAIL, "panic", {"b": FAIL}, broken=True), ["panic"]),
        (Result(FAIL, "x", {"b": FAIL}, broken=True), Result(FAIL, "y", {"b": FAIL}, broken=True), []),
    ],
)
def test_what_got_worse(stock: Result | None, kernel: Result, worse: list[str]) -> None:
    assert compare("mm/x", stock, kernel).worse == worse


class Host:
    """A host in which one test ends as it is told to."""

    release = "7.3.4"

    def __init__(self, ends: dict[str, Any]) -> None:
        self.ends = ends
        self.closed = False

    def output(self, _argv: list[str]) -> Completed:
        return Completed(0, b"", b"")

    def run(self, argv: list[str], *, stdout: Any, **_: Any) -> int:
        stdout(b"ok 1 begun\n")
        end = self.ends[" ".join(argv)]
        if isinstance(end, LabError):
            raise end
        assert isinstance(end, int)
        return end

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (LabPanic("Oops: 0000\n"), "the lab host's kernel panicked: Oops: 0000"),
        (LabTimeout("too long"), "did not end in 9 s"),
    ],
)
def test_a_test_that_ends_its_host_spoils_no_other(error: LabError, why: str) -> None:
    hosts: list[Host] = []

    def start() -> Any:
        hosts.append(Host({"./a -s x": 0, "./b": error, "./c": 4}))
        return hosts[-1]

    runner = Runner(start, Path("/tests"), 9)
    found = runner.run(["mm/a -s x", "mm/b", "mm/c"])
    assert {name: run.outcome for name, run in found.items()} == {"mm/a -s x": OK, "mm/b": FAIL, "mm/c": SKIP}
    assert found["mm/b"] == Result(FAIL, why, {"begun": OK}, broken=True)
    assert [host.closed for host in hosts] == [True, True]
    assert runner.release == "7.3.4"
