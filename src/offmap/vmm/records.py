"""What a VM's process and the program that started it say to each other: records of a socket pair.

The program takes what it hears as hostile: the process may be its guest's by then. So each record is decoded strictly,
and has one size at most. An error comes as its parts, each a printable text of bounded length.
"""

import msgspec

from offmap.errors import BackendRefused, KernelError, OffmapError, Undetermined
from offmap.units import printable
from offmap.vmm.outcome import Outcome

MOST = 64 << 10  # bytes of a record
MOST_OUTPUT = MOST - 64  # of which it is console output
MOST_TYPED = 16 << 10  # bytes of input that may be under way to a guest
_MOST_TEXT = 2048  # characters of a part of an error
_KINDS = ("OffmapError", "BackendRefused", "Undetermined", "KernelError")


class _Record(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A record, known by its class's name."""


class RamFacts(msgspec.Struct, frozen=True):
    """What is known of a guest's RAM.

    Attributes:
        size: bytes.
        vetting: "vetted", "placed, not audited", or None for a kind that does not promise to hide.
        not_audited_because: the reason, where it is not audited.
        excluded_pages: pages of 4 KiB that are kept from the guest, as the host kernel maps them.
        populate_seconds: how long the kind took to give it.
    """

    size: int
    vetting: str | None
    not_audited_because: str | None
    excluded_pages: int
    populate_seconds: float


class Failure(msgspec.Struct, frozen=True):
    """An OffmapError in its parts."""

    kind: str
    what: str
    why: str
    remedy: str
    operation: str = ""
    errno: int = 0

    @classmethod
    def of(cls, error: OffmapError) -> "Failure":
        """Take an error apart."""
        if isinstance(error, KernelError):
            return cls("KernelError", error.what, error.why, error.remedy, error.operation, error.errno)
        kind = type(error).__name__
        return cls(kind if kind in _KINDS else "OffmapError", error.what, error.why, error.remedy)

    def error(self) -> OffmapError:
        """Put it together again, of texts that can be shown."""
        what, why, remedy, operation = (
            printable(text[:_MOST_TEXT]) for text in (self.what, self.why, self.remedy, self.operation)
        )
        if self.kind == "KernelError":
            return KernelError(operation, self.errno & 0xFFF, remedy)
        if self.kind == "BackendRefused":
            return BackendRefused(what, why, remedy)
        return (Undetermined if self.kind == "Undetermined" else OffmapError)(what, remedy, why=why)


class Built(_Record, frozen=True):
    """The machine is made."""

    ram: RamFacts


class Output(_Record, frozen=True):
    """The guest has written this to its console."""

    data: bytes


class Opened(_Record, frozen=True):
    """The guest has opened its console for input."""


class Said(_Record, frozen=True):
    """A line for the user."""

    line: str


class Taken(_Record, frozen=True):
    """The guest has taken so many bytes of input."""

    count: int


class Answered(_Record, frozen=True):
    """What a request came to: an error, or whether the machine still runs."""

    running: bool
    failure: Failure | None = None


class Stopped(_Record, frozen=True):
    """The machine has stopped; its RAM is still there."""

    outcome: Outcome
    failure: Failure | None = None


class Ending(_Record, frozen=True):
    """The job's command has ended; its guest's RAM is there until it is told to go on."""


class Done(_Record, frozen=True):
    """The job has ended with this status, or failed."""

    status: int
    failure: Failure | None = None


class Start(_Record, frozen=True):
    """Confine the process, and let the guest run."""


class Pause(_Record, frozen=True):
    """Have the guest stand still."""


class Resume(_Record, frozen=True):
    """Let it go on; for a job whose command has ended: let it end."""


class Halt(_Record, frozen=True):
    """Stop the machine, and keep its RAM."""


class Typed(_Record, frozen=True):
    """Input for the guest's console."""

    data: bytes


FromVm = Built | Output | Opened | Said | Taken | Answered | Stopped | Ending | Done
ToVm = Start | Pause | Resume | Halt | Typed

encode = msgspec.msgpack.Encoder().encode
decode_from_vm = msgspec.msgpack.Decoder(FromVm).decode
decode_to_vm = msgspec.msgpack.Decoder(ToVm).decode
