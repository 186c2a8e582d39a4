"""Run a target: on the inputs of its corpus, and on random ones."""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from offmap.owned import Owned

from .broker import BrokerTarget
from .devices import BalloonTarget, BlkTarget, BouncedBlkTarget, ReadonlyBlkTarget, RngTarget
from .pc import PortsTarget, RegistersTarget
from .queue import QueueTarget, RacingQueueTarget
from .sockets import ConsoleTarget, NetTarget, StreamTarget, VsockTarget
from .target import Once, Target

TARGETS: dict[str, type[Target]] = {
    "queue": QueueTarget,
    "queue-raced": RacingQueueTarget,
    "registers": RegistersTarget,
    "ports": PortsTarget,
    "drive": BlkTarget,
    "drive-readonly": ReadonlyBlkTarget,
    "drive-bounced": BouncedBlkTarget,
    "rng": RngTarget,
    "balloon": BalloonTarget,
    "console": ConsoleTarget,
    "net": NetTarget,
    "net-stream": StreamTarget,
    "vsock": VsockTarget,
    "broker": BrokerTarget,
}
CORPUS = Path(__file__).with_name("corpus")
"""NAME.txt: the stored inputs of a target, a line of hexadecimal digits each."""

_CASES_OF_ONE = 2000  # before the device is made anew
_WARM = 4000  # cases until memory that Python keeps has its size
_LENGTHS = (24, 48, 96, 96, 192, 384)
_LONGEST = 512  # bytes of a changed input


@dataclass(frozen=True)
class Score:
    """How a run went.

    Attributes:
        cases: how many inputs.
        refused: those that were refused at the first check.
        seconds: how long it took.
        grown: bytes by which the process grew after it had warmed up; None: the run was too short to tell.
    """

    cases: int
    refused: int
    seconds: float
    grown: int | None

    def __str__(self) -> str:
        grown = "not measured" if self.grown is None else f"{self.grown >> 10} KiB"
        share = 100 * self.refused / max(self.cases, 1)
        rate = self.cases / max(self.seconds, 1e-9)
        return f"{self.cases} cases, {rate:.0f} a second, {share:.1f} % refused at once, RSS grew by {grown}"


def inputs(seed: int) -> Iterator[bytes]:
    """Random inputs for ever, the same for the same seed."""
    dice = random.Random(seed)
    while True:
        yield dice.randbytes(dice.choice(_LENGTHS))


def varied(name: str, seed: int) -> Iterator[bytes]:
    """Random inputs and changed ones of a target's corpus by turns, for ever, the same for the same seed."""
    dice = random.Random(seed)
    stored = corpus(name) or [b""]
    for fresh in inputs(seed):
        yield fresh
        data = bytearray(dice.choice(stored))
        for _ in range(1 + dice.randrange(4)):
            at = dice.randrange(len(data) + 1)
            match dice.randrange(4):
                case 0:
                    data[at : at + 1] = dice.randbytes(1)
                case 1:
                    data[at:at] = dice.randbytes(1 + dice.randrange(8))
                case 2:
                    other = dice.choice(stored)
                    data[at:] = other[min(at, len(other)) :]
                case _:
                    data[at : at + 1 + dice.randrange(8)] = b""
        yield bytes(data[:_LONGEST]) + fresh[: max(0, 64 - len(data))]


def corpus(name: str) -> list[bytes]:
    """The stored inputs of a target."""
    path = CORPUS / f"{name}.txt"
    return [bytes.fromhex(line) for line in path.read_text().split()] if path.exists() else []


class Failed(Exception):
    """A case that failed; `data` is its input."""

    def __init__(self, target: str, number: int, data: bytes) -> None:
        self.data = data
        super().__init__(f"{target}: case {number} failed; its input is {data.hex()}")


class Runner(Owned):
    """Runs a target on one input after another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._once = Once(TARGETS[name], _CASES_OF_ONE)
        self._cases = self._refused = self._warm = 0
        self._began = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """Run one case. Raises Failed: a bug."""
        try:
            self._refused += not self._once(data)
        except Exception as error:
            raise Failed(self._name, self._cases, data) from error
        self._cases += 1
        if self._cases == _WARM:
            self._warm = _resident()

    @property
    def score(self) -> Score:
        """How it went so far."""
        grown = _resident() - self._warm if self._warm else None
        return Score(self._cases, self._refused, time.monotonic() - self._began, grown)

    def close(self) -> None:
        self._once.close()


def run_cases(name: str, cases: int, seed: int) -> Score:
    """Run a target on so many inputs. Raises Failed: a bug."""
    with Runner(name) as runner:
        for data in islice(chain(corpus(name), varied(name, seed)), cases):
            runner(data)
        return runner.score


def run_for(name: str, seconds: float, seed: int) -> Score:
    """Run a target on its corpus, and then on random inputs. Raises Failed: a bug."""
    with Runner(name) as runner:
        for data in corpus(name):
            runner(data)
        end = time.monotonic() + seconds
        for data in inputs(seed):
            if time.monotonic() >= end:
                return runner.score
            runner(data)
    raise AssertionError("inputs have no end")


def _resident() -> int:
    """Bytes of this process's own memory; its guest's is shared memory."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
