"""Running the kernel's own tests in disposable hosts, and comparing what two kernels make of them."""

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from offmap import __version__
from offmap.lab.errors import LabEnded, LabError, LabPanic, LabTimeout
from offmap.lab.host import LabHost
from offmap.patience import scaled

SCHEMA = "offmap-selftests/1"
SECONDS = 120.0  # that a test may take; the slowest of the default set takes 10
KSFT_SKIP = 4  # tools/testing/selftests/kselftest.h
# Documentation/dev-tools/ktap.rst; "ok 3 - name # SKIP why". Nested results are indented: their sum is not.
_CASE = re.compile(r"^(not )?ok (\d+)(?: -)?\s*([^#]*?)\s*(?:# *(SKIP|TODO|XFAIL)\b.*)?$")
# The kernel's own complaints: a test that provokes one has failed, whatever it says itself.
_SPLAT = re.compile(r"\b(WARNING: |BUG: |Oops: |INFO: .* (?:blocked|detected|stall)|possible .* detected|UBSAN: )")

Start = Callable[[], LabHost]
Say = Callable[[str], None]


class Outcome(StrEnum):
    """How a test, or one of its cases, ended."""

    OK = "ok"
    FAIL = "fail"
    SKIP = "skip"


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one test said on one kernel.

    Attributes:
        outcome: of all of it.
        why: it failed or was skipped, in a few words.
        broken: it did not come to an end, or the kernel complained; whatever its cases said.
        cases: the outcome of each case that it names.
    """

    outcome: Outcome
    why: str = ""
    cases: dict[str, Outcome] = {}
    broken: bool = False

    def count(self, outcome: Outcome) -> int:
        """How many cases ended so."""
        return sum(each is outcome for each in self.cases.values())


class Compared(msgspec.Struct, frozen=True):
    """One test on the stock kernel and on the other.

    Attributes:
        name: ``mm/memfd_secret``.
        stock: None if there is nothing to compare with.
        kernel: the run on the kernel that was asked for.
        worse: what passes on the stock kernel and fails on the other: cases, or the test itself.
    """

    name: str
    stock: Result | None
    kernel: Result
    worse: list[str]


class Comparison(msgspec.Struct, frozen=True):
    """The whole table.

    Attributes:
        kernel: the release of the kernel that was asked for.
        stock: that of the stock kernel; empty if there is none.
    """

    kernel: str
    stock: str
    tests: list[Compared]
    schema: str = SCHEMA
    offmap: str = __version__

    @property
    def worse(self) -> list[str]:
        """What passes on the stock kernel and fails on the other."""
        return [f"{test.name}: {case}" for test in self.tests for case in test.worse]


def cases_of(output: str) -> dict[str, Outcome]:
    """Return the outcome of each case that a test has reported (KTAP); a name that comes again gets a number."""
    cases: dict[str, Outcome] = {}
    for line in output.splitlines():
        if match := _CASE.match(line.rstrip()):
            failed, number, name, directive = match.groups()
            key, again = name or f"case {number}", 1
            while key in cases:
                again += 1
                key = f"{name or f'case {number}'} ({again})"
            cases[key] = Outcome.SKIP if directive else Outcome.FAIL if failed else Outcome.OK
    return cases


def judge(status: int, output: str, log: str) -> Result:
    """Say how a test ended.

    Args:
        status: its exit status.
        output: what it wrote.
        log: what its kernel logged meanwhile.
    """
    cases = cases_of(output)
    if splat := next((line for line in log.splitlines() if _SPLAT.search(line)), ""):
        return Result(Outcome.FAIL, re.sub(r"^\[ *[\d.]+\] *", "", splat).strip(), cases, broken=True)
    if status == 0:
        return Result(Outcome.OK, "", cases)
    if status == KSFT_SKIP:
        return Result(Outcome.SKIP, _last_words(output, "SKIP"), cases)
    return Result(Outcome.FAIL, _last_words(output, "not ok", "Assert", "fail") or f"status {status}", cases)


def _last_words(output: str, *marks: str) -> str:
    """The first line that holds the first of the `marks` that is there at all."""
    lines = [line.strip(" #\t") for line in output.splitlines()]
    for mark in marks:
        if found := next((line for line in lines if mark.lower() in line.lower()), ""):
            return found
    return ""


def compare(name: str, stock: Result | None, kernel: Result) -> Compared:
    """Compare one test's runs. A case that one of them does not name, or skips, is no regression."""
    worse = []
    if stock is not None:
        worse = [
            case for case, end in stock.cases.items() if end is Outcome.OK and kernel.cases.get(case) is Outcome.FAIL
        ]
        failed = stock.outcome is Outcome.OK and kernel.outcome is Outcome.FAIL
        if not worse and (failed or (kernel.broken and not stock.broken)):
            worse = [kernel.why or "the test"]
    return Compared(name, stock, kernel, worse)


class Runner:
    """Runs tests in one host after the other: one that a test has ended is followed by a new one.

    Args:
        start: starts a host.
        folder: holds the collections.
        seconds: that a test may take; None: what is usual, by this machine's speed.
    """

    def __init__(self, start: Start, folder: Path, seconds: float | None = None) -> None:
        self._start = start
        self._folder = folder
        self._seconds = seconds
        self._host: LabHost | None = None
        self.release = ""

    def run(self, names: Sequence[str], say: Say = lambda _: None) -> dict[str, Result]:
        """Run the tests `names`, which have been built. Raises LabError: there is no host to run them in."""
        found = {}
        try:
            for name in names:
                say(f"{name} on {self.release or 'the host'}")
                found[name] = self._one(*name.split())
        finally:
            if self._host is not None:
                self._host.close()
                self._host = None
        return found

    def _one(self, name: str, *options: str) -> Result:
        if self._host is None:
            self._host = self._start()
            self.release = self._host.release
        limit = self._seconds or scaled(SECONDS)
        program = self._folder / name
        command = [f"./{program.name}", *options]
        said = bytearray()
        try:
            self._host.output(["dmesg", "--clear"])
            status = self._host.run(command, stdout=said.extend, stderr=said.extend, timeout=limit, cwd=program.parent)
            log = self._host.output(["dmesg"]).stdout.decode(errors="replace")
            return judge(status, said.decode(errors="replace"), log)
        except (LabPanic, LabEnded, LabTimeout) as error:
            # What the test left behind must not spoil the next.
            self._host.close()
            self._host = None
            why = f"did not end in {limit:.0f} s" if isinstance(error, LabTimeout) else error.what
            return Result(Outcome.FAIL, why, cases_of(said.decode(errors="replace")), broken=True)
        except LabError as error:
            return Result(Outcome.FAIL, error.what)
