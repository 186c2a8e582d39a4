"""The demonstration: its claims about each kind of RAM, its measurements, and where the two differ."""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

from msgspec import Struct
from msgspec.structs import replace

from offmap.audit.verdict import Verdict
from offmap.compare.cell_result import CellOutcome
from offmap.compare.guest import KVM_CLOCK
from offmap.compare.spec import CellSpec
from offmap.errors import ExitStatus

CANARIES = 64


def row_name(spec: CellSpec) -> str:
    """The name of a guest in the demonstration: its RAM, and its clock if that was chosen."""
    return spec.backend if spec.kvm_clock == "auto" else f"{spec.backend}:kvm-clock={spec.kvm_clock}"


class Claimed(Enum):
    """The result that is claimed."""

    EXPOSED = "exposed"  # the positive control: all canaries found
    HIDDEN = "hidden"
    REFUSED = "refused"  # by the kernel's GUP


class Claim(Struct, frozen=True):
    """A guest of the demonstration, and the result that is claimed of it.

    Attributes:
        kvm_clock: on, off, or auto, as ``offmap run`` takes it. With on, the guest's clocksource must be kvm-clock;
            with off, it must not be.
        attacked: an attack on it is tried, and ends; and the same attack gets through a plain guest beside it.
    """

    backend: str
    verdict: Claimed
    kvm_clock: str = "auto"
    attacked: bool = False

    @property
    def name(self) -> str:
        """The name of its row."""
        return row_name(CellSpec(self.backend, kvm_clock=self.kvm_clock))


STOCK = (
    Claim("anon", Claimed.EXPOSED),
    Claim("memfd", Claimed.EXPOSED),
    Claim("reserved", Claimed.HIDDEN),
    Claim("unplugged", Claimed.HIDDEN, attacked=True),
    Claim("secretmem-bridge", Claimed.HIDDEN),
    Claim("qemu-unplugged", Claimed.HIDDEN),
    Claim("firecracker-anon", Claimed.EXPOSED),
    Claim("firecracker-unplugged", Claimed.HIDDEN),
    Claim("secretmem", Claimed.REFUSED),
)
"""The claims on any kernel."""

PATCHED = (
    Claim("anon", Claimed.EXPOSED),
    Claim("memfd", Claimed.EXPOSED),
    Claim("guest_memfd", Claimed.EXPOSED),
    Claim("secretmem", Claimed.HIDDEN, "off"),
    Claim("secretmem", Claimed.HIDDEN, "on"),
    Claim("guest_memfd-unmapped", Claimed.HIDDEN, "off"),
    Claim("guest_memfd-unmapped", Claimed.HIDDEN, "on"),
)
"""The claims on a kernel with the patches of kernel/patches/."""


class DemoRow(Struct, frozen=True, kw_only=True):
    """One row of the demonstration: what was measured of one guest. None means "not measured", never 0.

    Attributes:
        host_kernel, guest_kernel: what ``uname -r`` says; empty if the kernel did not boot.
        kvm_clock: whether the guest was offered kvm-clock, as ``offmap run`` takes it: on, off, or auto.
        clocksource: the guest's, as it names it.
        reason: why it was refused or failed, why the verdict is unknown, or the host's oops.
        verdict: the audit's, while the guest ran.
        canaries_planted: how many the guest says that it planted in its RAM.
        canaries_found: how many of them were read through the host kernel's mappings.
        scanned_bytes: how much was scanned for them.
        populate_seconds: time to get the guest's RAM, zeroed if it must be.
        boot_seconds: from the start of the VMM's process until the guest's init was ready.
        attack_ends: whether an attack on a secret of it ended before the secret (offmap.attack).
        attack: where and why it ended, or what came of it; empty if none was tried.
        attack_reads: words of eight bytes that it read.
        plain_attack_reads: words until the same attack had the secret of a plain guest beside it.
    """

    backend: str
    host_kernel: str
    guest_kernel: str
    outcome: CellOutcome
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
    populate_seconds: float | None = None
    boot_seconds: float | None = None
    attack_ends: bool | None = None
    attack: str = ""
    attack_reads: int | None = None
    plain_attack_reads: int | None = None

    @property
    def name(self) -> str:
        """The name of the row, which is that of its claim."""
        return row_name(CellSpec(self.backend, kvm_clock=self.kvm_clock))


class Mismatch(Struct, frozen=True):
    """A result that contradicts a claim; `row` is the name of the row."""

    row: str
    what: str
    exit_status: ExitStatus


def check(cells: Iterable[DemoRow], claims: Sequence[Claim]) -> Iterator[Mismatch]:
    """Check what was measured against the claims.

    The plain kinds are the positive control: if their canaries are not found, "not found" proves nothing.
    """
    measured = {cell.name: cell for cell in cells}
    for claim in claims:
        cell = measured.get(claim.name)
        if cell is None:
            yield Mismatch(claim.name, "was not tried", ExitStatus.FAILED)
        elif claim.verdict is Claimed.REFUSED:
            if cell.outcome is not CellOutcome.REFUSED or "GUP" not in cell.reason:
                text = f"was to be refused by GUP, but {cell.outcome.value}: {_first_line(cell.reason)}"
                yield Mismatch(claim.name, text, ExitStatus.FAILED)
        elif claim.verdict is Claimed.HIDDEN and (cell.verdict is Verdict.EXPOSED or cell.canaries_found):
            yield from _check_hidden(claim, cell)  # graver than whatever else went wrong
        elif cell.outcome is not CellOutcome.BOOTED:
            yield Mismatch(claim.name, f"{cell.outcome.value}: {_first_line(cell.reason)}", ExitStatus.FAILED)
        elif cell.canaries_planted != CANARIES:
            yield Mismatch(claim.name, f"planted {cell.canaries_planted} canaries, not {CANARIES}", ExitStatus.FAILED)
        elif claim.kvm_clock != "auto" and (wrong := _wrong_clock(claim, cell)):
            yield Mismatch(claim.name, wrong, ExitStatus.FAILED)
        elif claim.verdict is Claimed.HIDDEN:
            yield from _check_hidden(claim, cell)
            if claim.attacked:
                yield from _check_attack(claim, cell)
        elif cell.verdict is not Verdict.EXPOSED or cell.canaries_found != CANARIES:
            text = f"the positive control failed: {cell.verdict and cell.verdict.value}, {cell.canaries_found} canaries"
            yield Mismatch(claim.name, text, ExitStatus.UNDETERMINED)


def _wrong_clock(claim: Claim, cell: DemoRow) -> str:
    if cell.clocksource is None:
        return "did not say which clocksource it uses"
    if (cell.clocksource == KVM_CLOCK) != (claim.kvm_clock == "on"):
        return f"was to run with kvm-clock {claim.kvm_clock}, and its clocksource is {cell.clocksource}"
    return ""


def _check_hidden(claim: Claim, cell: DemoRow) -> Iterator[Mismatch]:
    if cell.verdict is Verdict.EXPOSED or cell.canaries_found:
        text = f"is exposed: {cell.direct_map_pages} pages in the direct map, {cell.alias_pages} aliased, "
        yield Mismatch(claim.name, text + f"{cell.canaries_found} canaries found", ExitStatus.EXPOSED)
    elif cell.verdict is not Verdict.HIDDEN or cell.canaries_found is None:
        text = f"cannot be said to be hidden: {_first_line(cell.reason)}"
        yield Mismatch(claim.name, text, ExitStatus.UNDETERMINED)


def _check_attack(claim: Claim, cell: DemoRow) -> Iterator[Mismatch]:
    if cell.attack_ends is False:
        yield Mismatch(claim.name, f"gives its secret away: {_first_line(cell.attack)}", ExitStatus.EXPOSED)
    elif not (cell.attack_ends and cell.plain_attack_reads):
        text = f"the attack on it says nothing: {_first_line(cell.attack)}"
        yield Mismatch(claim.name, text, ExitStatus.UNDETERMINED)


def without_control(cells: Iterable[DemoRow], claims: Sequence[Claim]) -> list[DemoRow]:
    """`cells`, where nothing is called hidden unless the same means found all of a plain guest's canaries."""
    cells = list(cells)
    plain = {claim.backend for claim in claims if claim.verdict is Claimed.EXPOSED}
    controls = [cell for cell in cells if cell.backend in plain and cell.outcome is CellOutcome.BOOTED]
    if controls and all(c.verdict is Verdict.EXPOSED and c.canaries_found == c.canaries_planted for c in controls):
        return cells
    reason = "the positive control failed, so what was not found proves nothing"
    return [
        replace(cell, verdict=Verdict.UNKNOWN, reason=reason) if cell.verdict is Verdict.HIDDEN else cell
        for cell in cells
    ]


def _first_line(reason: str) -> str:
    return next(iter(reason.splitlines()), "no reason given")
