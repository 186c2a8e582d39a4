"""The kinds of guest RAM that this host can give: try each backend, and audit its memory."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from offmap.audit.audit import audit_process
from offmap.audit.guest_ram import RamRange
from offmap.audit.result import AuditResult, Source
from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus, OffmapError, Undetermined
from offmap.kvm import Kvm
from offmap.memory.backend import BACKENDS, Backend, parse_backend
from offmap.memory.probe import try_out

_AMD_NESTED = Path("/sys/module/kvm_amd/parameters/nested")
_SIZE = 4 << 20  # bytes of RAM to try with: whole huge pages, and little enough for any host


class Health(Enum):
    """The state of a backend on this host. It hides only if the audit says so."""

    HIDING = "usable, and hides"
    MOSTLY = "usable, and hides what is left when aliased pages are kept from the guest"
    PLAIN = "usable, and does not hide"
    UNVERIFIED = "usable; whether it hides cannot be verified here"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One backend on this host.

    Attributes:
        promises: whether it is meant to hide.
        reason: why it was refused or not verified, or what the audit found mapped; may be empty.
        remedy: what to do about it, as a command or a boot parameter; may be empty.
    """

    backend: str
    promises: bool
    health: Health
    reason: str = ""
    remedy: str = ""


def examine(backends: Iterable[str] = BACKENDS) -> Iterator[Diagnosis]:
    """Try each backend: get RAM from it, run a guest of one instruction there, audit it, give it back."""
    for name in backends:
        yield _examine(name)


def _examine(name: str) -> Diagnosis:
    backend = parse_backend(name)
    try:
        with Kvm() as kvm, kvm.create_vm() as vm, backend.guest_memory(vm, _SIZE) as memory:
            for backing in memory.backings:
                backing.zero()
            try_out(vm, memory)
            ranges = [RamRange(r.userspace_addr, r.size, Source.REQUESTED) for r in memory.regions]
            try:
                result = audit_process(os.getpid(), ranges=ranges, seconds=0)
            except Undetermined as error:
                health = Health.UNVERIFIED if backend.hides else Health.PLAIN
                return Diagnosis(name, backend.hides, health, f"not audited: {error.reason}", error.remedy)
    except OffmapError as error:
        return Diagnosis(name, backend.hides, Health.REFUSED, error.reason, error.remedy)
    return Diagnosis(name, backend.hides, _health(result), _what_was_seen(result), _danger(backend))


def _danger(backend: Backend) -> str:
    """What another VMM must not do on such memory, on this kernel; empty if there is nothing.

    KVM maps the control block of a nested guest. Before Linux 6.13 that panics on memory without ``struct page``.
    """
    if backend.may_be_aliased or not backend.hides or not _nesting_panics(os.uname().release, _AMD_NESTED):
        return ""
    return (
        "on this kernel (before 6.13), VMRUN in a guest of another VMM on such memory panics the host: keep svm out of "
        "its CPUID, or load kvm_amd with nested=0 (offmap's own guests have none)"
    )


def _nesting_panics(release: str, nested: Path) -> bool:
    """Whether KVM lets guests of this processor run guests, on a kernel which that can panic."""
    numbers = [int(part) for part in re.findall(r"\d+", release)[:2]]
    try:
        return numbers < [6, 13] and nested.read_text(encoding="ascii").strip() in {"1", "Y"}
    except OSError:
        return False


def _health(result: AuditResult) -> Health:
    if result.verdict is Verdict.HIDDEN:
        return Health.HIDING
    if result.pages.direct_map_pages:
        return Health.PLAIN
    # One alias makes the verdict "exposed", even if other pages could not be judged. Those are not hidden.
    unseen = result.pages.unknown_pages or not result.pages.alias_pages or not result.pages.pages_populated
    return Health.UNVERIFIED if unseen else Health.MOSTLY


def _what_was_seen(result: AuditResult) -> str:
    pages = result.pages
    return (
        f"of {pages.pages_populated} pages, {pages.direct_map_pages} are in the direct map, "
        f"{pages.alias_pages} aliased, {pages.unknown_pages} unknown"
    )


def exit_status(diagnoses: Iterable[Diagnosis]) -> ExitStatus:
    """0 if any kind hides here, 3 if that could not be verified, 1 if none does."""
    seen = {d.health for d in diagnoses if d.promises}
    if seen & {Health.HIDING, Health.MOSTLY}:
        return ExitStatus.DONE
    return ExitStatus.UNDETERMINED if Health.UNVERIFIED in seen else ExitStatus.EXPOSED
