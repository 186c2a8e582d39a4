"""A cell of the comparison: one way of hiding, on one host, with one guest, and what came of it."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Self

from offmap.audit.verdict import Verdict

__all__ = ["Cell", "Outcome", "guest_name", "parse_guest_name"]


class Outcome(Enum):
    """How far the guest got."""

    BOOTED = "booted"
    REFUSED = "refused"  # the backend, before the guest's first instruction
    FAILED = "failed"
    OOPS = "oops"  # of the host kernel


def guest_name(backend: str, kvm_clock: str) -> str:
    """What tells a guest from others on the same host: its RAM and, where that was chosen, its clock."""
    return backend if kvm_clock == "auto" else f"{backend}:kvm-clock={kvm_clock}"


def parse_guest_name(name: str) -> tuple[str, str]:
    """The backend and the kvm_clock of a `guest_name`.

    Raises:
        ValueError: it is no such name.
    """
    backend, _, clock = name.partition(":kvm-clock=")
    if guest_name(backend, clock or "auto") != name or clock not in {"", "on", "off"}:
        raise ValueError(f"{name!r} names no guest")
    return backend, clock or "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One result, in the words of docs/design.md. None means "was not measured", never 0.

    Attributes:
        kvm_clock: whether the guest was offered kvm-clock, as ``offmap run`` takes it: on, off, or auto.
        clocksource: what the guest keeps time by, in its own words. It was told to prefer kvm-clock unless `kvm_clock`
            is auto.
        reason: why it was refused or failed, or the host's oops; empty otherwise.
        verdict: the audit's, while the guest ran.
        canaries_planted: what the guest says it planted in its RAM.
        canaries_found: distinct ones that were read through the host kernel's mappings.
        scanned_bytes: how much was read to look for them.
        walk_seconds, scan_seconds: how long the audit took for either.
        populate_seconds: to get the guest's RAM, zeroed where it must be.
        boot_seconds: from the VMM's process start until the guest's init had done its work.
        direct_map_4k_delta_kib: how much more of the direct map is in 4 KiB pages afterwards.
    """

    backend: str
    host_kernel: str
    guest_kernel: str
    outcome: Outcome
    kvm_clock: str = "auto"
    clocksource: str | None = None
    reason: str = ""
    verdict: Verdict | None = None
    ram_pages: int | None = None
    pages_populated: int | None = None
    direct_map_pages: int | None = None
    alias_pages: int | None = None
    unknown_pages: int | None = None
    excluded_pages: int | None = None
    canaries_planted: int | None = None
    canaries_found: int | None = None
    scanned_bytes: int | None = None
    walk_seconds: float | None = None
    scan_seconds: float | None = None
    populate_seconds: float | None = None
    boot_seconds: float | None = None
    direct_map_4k_delta_kib: int | None = None

    @property
    def name(self) -> str:
        """Its `guest_name`."""
        return guest_name(self.backend, self.kvm_clock)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        verdict = None if data["verdict"] is None else Verdict(data["verdict"])
        return cls(**{**data, "outcome": Outcome(data["outcome"]), "verdict": verdict})
