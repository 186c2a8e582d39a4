"""What came of one cell of the comparison, as it is kept in OUT/cells/KEY.json."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from offmap import __version__
from offmap.compare.matrix import CellSpec
from offmap.compare.questions import CATALOGUE, Answer

__all__ = ["SCHEMA", "CellOutcome", "CellResult"]

SCHEMA = "offmap-compare-cell/1"


class CellOutcome(Enum):
    """How a cell ended."""

    BOOTED = "booted"  # the guest booted and all questions were put
    REFUSED = "refused"  # by the backend, before the guest's first instruction
    FAILED = "failed"
    OOPS = "oops"  # of the host kernel
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One cell.

    A cell that did not get to its end keeps the answers that it had by then; what it has no answer for was not
    measured, for the cell's `reason`.

    Attributes:
        spec: which cell.
        outcome: how it ended.
        reason: why it was refused or failed, or the oops's first line; empty only if it booted.
        oops: the host kernel's own report, from its first line to the end of the console; empty without one.
        asked: the question that was being asked when it ended early; empty if unknown or not early.
        answers: by question id, in the order in which they came.
        host: facts of the host that it ran on (offmap.audit.host.HostFacts); empty if that never came up.
        machine: facts of the machine that the disposable host ran on (offmap.compare.machine), of which ``accel`` (tcg,
            kvm or native) says what its times are worth.
        inputs: what it depends on: ``code``, ``host_kernel``, ``host_release``, ``guest_kernel``, ``guest_release``
            (digests, and what uname says). A cell with other inputs is another measurement.
        seconds: from its beginning to its end, its host's boot included.
        time: when it ended (UTC, ISO 8601).
        offmap: the version that measured it.
        console: where the cell did not come to its end, the last lines of the host's console; else what the host's
            kernel complained of meanwhile (warnings, stalls), which is mostly nothing.
    """

    spec: CellSpec
    outcome: CellOutcome
    reason: str = ""
    oops: str = ""
    asked: str = ""
    answers: Mapping[str, Answer] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    time: str = ""
    offmap: str = __version__
    console: str = ""

    def answer(self, question: str) -> Answer:
        """The answer to a question; one without a value, and with the reason, where there is none.

        Raises:
            KeyError: there is no such question.
        """
        asked = CATALOGUE[question]
        if found := self.answers.get(question):
            return found
        if self.outcome is CellOutcome.BOOTED:
            return Answer(asked.id, None, "not asked")
        return Answer(asked.id, None, f"{self.outcome.value}: {self.reason or 'no reason was given'}")

    @property
    def emulated(self) -> bool:
        """Whether an emulated CPU ran it: its times are only good for ratios. True where that is not known."""
        return self.machine.get("accel") not in {"kvm", "native"}

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "schema": SCHEMA,
            "offmap": self.offmap,
            "time": self.time,
            "spec": self.spec.to_json(),
            "outcome": self.outcome.value,
            "reason": self.reason,
            "oops": self.oops,
            "asked": self.asked,
            "answers": [answer.to_json() for answer in self.answers.values()],
            "host": dict(self.host),
            "machine": dict(self.machine),
            "inputs": dict(self.inputs),
            "seconds": self.seconds,
            "console": self.console,
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What `to_json` gave.

        Raises:
            ValueError: it is no such thing, or one of another version.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA}")
        try:
            answers = [Answer.from_json(answer) for answer in data["answers"]]
            return cls(
                spec=CellSpec.from_json(data["spec"]),
                outcome=CellOutcome(data["outcome"]),
                reason=str(data["reason"]),
                oops=str(data["oops"]),
                asked=str(data["asked"]),
                answers={answer.question: answer for answer in answers},
                host=dict(data["host"]),
                machine=dict(data["machine"]),
                inputs={str(name): str(value) for name, value in data["inputs"].items()},
                seconds=float(data["seconds"]),
                time=str(data["time"]),
                offmap=str(data["offmap"]),
                console=str(data["console"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not of schema {SCHEMA}: {error!r}") from None

    def dumps(self) -> bytes:
        """As a file, which carries a digest of itself."""
        data = self.to_json()
        return json.dumps({**data, "digest": _digest(data)}, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def loads(cls, text: bytes) -> Self:
        """What `dumps` gave.

        Raises:
            ValueError: it is no such thing, or was changed since.
        """
        data = json.loads(text)
        result = cls.from_json(data)
        if data.pop("digest", "") != _digest(data):
            raise ValueError("its content was changed since it was written")
        return result


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
