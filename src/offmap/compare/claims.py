"""What the demonstration claims of each kind of RAM, and how what was measured is held against it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from offmap.audit.verdict import Verdict
from offmap.compare.cell import Cell, Outcome, guest_name
from offmap.compare.vm_process import QEMU
from offmap.errors import ExitStatus

__all__ = ["CANARIES", "PATCHED", "STOCK", "Claim", "Row", "Surprise", "check", "without_control"]

CANARIES = 64
KVM_CLOCK = "kvm-clock"
"""The guest kernel's own name of that clocksource (arch/x86/kernel/kvmclock.c)."""


class Claim(Enum):
    """What is to come out."""

    EXPOSED = "exposed"  # the positive control: all canaries found
    HIDDEN = "hidden"
    REFUSED = "refused"  # by the kernel's GUP


@dataclass(frozen=True, slots=True)
class Row:
    """A guest of the demonstration.

    Attributes:
        kvm_clock: on, off, or auto, as ``offmap run`` takes it. If not auto, the guest must really run by kvm-clock, or
            really not.
    """

    backend: str
    claim: Claim
    kvm_clock: str = "auto"

    @property
    def name(self) -> str:
        """Its `guest_name`: what the trial is asked for."""
        return guest_name(self.backend, self.kvm_clock)


STOCK = (
    Row("anon", Claim.EXPOSED),
    Row("memfd", Claim.EXPOSED),
    Row("reserved", Claim.HIDDEN),
    Row("unplugged", Claim.HIDDEN),
    Row("secretmem-bridge", Claim.HIDDEN),
    Row(QEMU, Claim.HIDDEN),
    Row("secretmem", Claim.REFUSED),
)
"""On any kernel."""

PATCHED = (
    Row("anon", Claim.EXPOSED),
    Row("memfd", Claim.EXPOSED),
    Row("guest_memfd", Claim.EXPOSED),
    Row("secretmem", Claim.HIDDEN, "off"),
    Row("secretmem", Claim.HIDDEN, "on"),
    Row("guest_memfd-unmapped", Claim.HIDDEN, "off"),
    Row("guest_memfd-unmapped", Claim.HIDDEN, "on"),
)
"""On a kernel with the patches of kernel/patches/."""


@dataclass(frozen=True, slots=True)
class Surprise:
    """Something that did not come out as the demonstration claims; `backend` is the name of the row."""

    backend: str
    what: str
    exit_status: ExitStatus


def check(cells: Iterable[Cell], rows: Sequence[Row] = STOCK) -> Iterator[Surprise]:
    """Hold what was measured against what is claimed.

    The plain kinds are the positive control: where their canaries are not found, nothing that was not found counts.
    """
    measured = {cell.name: cell for cell in cells}
    for row in rows:
        cell = measured.get(row.name)
        if cell is None:
            yield Surprise(row.name, "was not tried", ExitStatus.FAILED)
        elif row.claim is Claim.REFUSED:
            if cell.outcome is not Outcome.REFUSED or "GUP" not in cell.reason:
                text = f"was to be refused by GUP, but {cell.outcome.value}: {_first_line(cell.reason)}"
                yield Surprise(row.name, text, ExitStatus.FAILED)
        elif row.claim is Claim.HIDDEN and (cell.verdict is Verdict.EXPOSED or cell.canaries_found):
            yield from _check_hidden(row, cell)  # graver than whatever else went wrong
        elif cell.outcome is not Outcome.BOOTED:
            yield Surprise(row.name, f"{cell.outcome.value}: {_first_line(cell.reason)}", ExitStatus.FAILED)
        elif cell.canaries_planted != CANARIES:
            yield Surprise(row.name, f"planted {cell.canaries_planted} canaries, not {CANARIES}", ExitStatus.FAILED)
        elif row.kvm_clock != "auto" and (wrong := _wrong_clock(row, cell)):
            yield Surprise(row.name, wrong, ExitStatus.FAILED)
        elif row.claim is Claim.HIDDEN:
            yield from _check_hidden(row, cell)
        elif cell.verdict is not Verdict.EXPOSED or cell.canaries_found != CANARIES:
            text = f"the positive control failed: {cell.verdict and cell.verdict.value}, {cell.canaries_found} canaries"
            yield Surprise(row.name, text, ExitStatus.UNDETERMINED)


def _wrong_clock(row: Row, cell: Cell) -> str:
    if cell.clocksource is None:
        return "did not say which clocksource it uses"
    if (cell.clocksource == KVM_CLOCK) != (row.kvm_clock == "on"):
        return f"was to run with kvm-clock {row.kvm_clock}, and its clocksource is {cell.clocksource}"
    return ""


def _check_hidden(row: Row, cell: Cell) -> Iterator[Surprise]:
    if cell.verdict is Verdict.EXPOSED or cell.canaries_found:
        text = f"is exposed: {cell.direct_map_pages} pages in the direct map, {cell.alias_pages} aliased, "
        yield Surprise(row.name, text + f"{cell.canaries_found} canaries found", ExitStatus.EXPOSED)
    elif cell.verdict is not Verdict.HIDDEN or cell.canaries_found is None:
        text = f"cannot be said to be hidden: {_first_line(cell.reason)}"
        yield Surprise(row.name, text, ExitStatus.UNDETERMINED)


def without_control(cells: Iterable[Cell], rows: Sequence[Row] = STOCK) -> list[Cell]:
    """`cells`, where nothing is called hidden unless the same means found all of a plain guest's canaries."""
    cells = list(cells)
    plain = {row.backend for row in rows if row.claim is Claim.EXPOSED}
    controls = [cell for cell in cells if cell.backend in plain and cell.outcome is Outcome.BOOTED]
    if controls and all(c.verdict is Verdict.EXPOSED and c.canaries_found == c.canaries_planted for c in controls):
        return cells
    reason = "the positive control failed, so what was not found proves nothing"
    return [
        replace(cell, verdict=Verdict.UNKNOWN, reason=reason) if cell.verdict is Verdict.HIDDEN else cell
        for cell in cells
    ]


def _first_line(reason: str) -> str:
    return next(iter(reason.splitlines()), "no reason given")
