"""The result of one cell of the comparison, as it is kept in OUT/cells/KEY.json."""

import hashlib
import json
from enum import Enum
from functools import cached_property

import msgspec
from msgspec import Struct

from offmap import __version__
from offmap.compare.facts import Guest, Host, Machine
from offmap.compare.questions import CATALOGUE, Answer
from offmap.compare.spec import CellSpec

SCHEMA = "offmap-compare-cell/1"


class CellOutcome(Enum):
    """How a cell ended."""

    BOOTED = "booted"  # the guest booted and all questions were put
    REFUSED = "refused"  # by the backend, before the guest's first instruction
    FAILED = "failed"
    OOPS = "oops"  # of the host kernel
    DEADLINE = "deadline"


class CellResult(Struct, frozen=True, kw_only=True, dict=True, tag_field="schema", tag=SCHEMA):
    """The result of one cell.

    A cell that ended early keeps the answers that it had by then. Every other question was not measured, for the cell's
    `reason`.

    Attributes:
        offmap: the version that measured it.
        time: when it ended (UTC, ISO 8601).
        spec: which cell.
        outcome: how it ended.
        reason: why it was refused or failed, or the oops's first line; empty only if it booted.
        oops: the host kernel's own report, from its first line to the end of the console; empty without one.
        asked: the question that was being asked when it ended early; empty if unknown or not early.
        answers: in the order in which they came.
        host: the host that it ran on.
        guest: the guest that it is about.
        machine: what the host ran on.
        inputs: what it depends on: ``code``, ``host_kernel``, ``host_release``, ``guest_kernel``, ``guest_release``
            (digests, and what uname says). A cell with other inputs is another measurement.
        seconds: from its beginning to its end, its host's boot included.
        console: where the cell ended early, the last lines of the host's console; else what the host's kernel
            complained of meanwhile (warnings, stalls), mostly nothing.
    """

    offmap: str = __version__
    time: str = ""
    spec: CellSpec
    outcome: CellOutcome
    reason: str = ""
    oops: str = ""
    asked: str = ""
    answers: tuple[Answer, ...] = ()
    host: Host = Host()
    guest: Guest = Guest()
    machine: Machine = Machine()
    inputs: dict[str, str] = {}
    seconds: float = 0.0
    console: str = ""

    @cached_property
    def answered(self) -> dict[str, Answer]:
        """The answers by question."""
        return {answer.question: answer for answer in self.answers}

    def answer(self, question: str) -> Answer:
        """The answer to a question; where there is none, one without a value, and with the reason.

        Raises:
            KeyError: there is no such question.
        """
        asked = CATALOGUE[question]
        if found := self.answered.get(question):
            return found
        if self.outcome is CellOutcome.BOOTED:
            return Answer(asked.id, None, "not asked")
        return Answer(asked.id, None, f"{self.outcome.value}: {self.reason or 'no reason was given'}")

    @property
    def emulated(self) -> bool:
        """Whether an emulated CPU ran it: its times are only good for ratios. True where that is not known."""
        return self.machine.accel not in {"kvm", "native"}

    def dumps(self) -> bytes:
        """As a file, which carries a digest of itself."""
        data = msgspec.to_builtins(self)
        return json.dumps({**data, "digest": _digest(data)}, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def loads(cls, text: bytes) -> "CellResult":
        """What `dumps` gave. Raises ValueError: it is no such thing, one of another version, or was changed since."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA}")
        result = msgspec.convert(data, CellResult)
        if data.pop("digest", "") != _digest(data):
            raise ValueError("its content was changed since it was written")
        return result


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
