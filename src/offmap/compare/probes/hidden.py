"""What the host kernel can reach of the guest: while it runs, after it has worked, and once it is gone.

The control runs beside it: a guest on plain RAM plants secrets with the same key, so that each scan looks for those of
both at once, and one that does not find the plain guest's proves nothing.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from offmap.audit.audit import AuditResult, audit_process
from offmap.audit.canary import CANARY_LENGTH, PREFIX, CanaryKey, new_key, parse_canary
from offmap.audit.intervals import Intervals
from offmap.audit.mappings import KernelMappings
from offmap.audit.reach import Kind
from offmap.audit.verdict import Verdict
from offmap.compare.guest import canary_parameters
from offmap.compare.probes.asker import measured, no, undetermined, yes
from offmap.compare.probes.host_kernel import host_memory_kib
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.questions import Answer
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

__all__ = ["AFTER_BOOT", "AFTER_IO", "CANARIES", "GONE", "Secrets", "Sighting", "after_the_end", "look", "sightings"]

CANARIES = 32
"""How many secrets each guest plants."""

_CONTROL_FIRST = 0x1000  # the number of the control's first

AFTER_BOOT = (
    "hidden.before_io",
    "hidden.ram_pages",
    "hidden.direct_map_pages",
    "hidden.alias_pages",
    "hidden.unknown_pages",
    "hidden.excluded_pages",
    "hidden.canaries_planted",
    "hidden.canaries_found",
    "hidden.control",
)
AFTER_IO = (
    "hidden.after_io",
    "hidden.direct_map_pages_after_io",
    "hidden.alias_pages_after_io",
    "hidden.canaries_found_after_io",
)
GONE = ("hidden.zeroed", "hidden.restored")


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the guests plant."""

    key: CanaryKey = field(default_factory=new_key)

    @property
    def of_candidate(self) -> str:
        """For the kernel's command line of the guest that the cell is about."""
        return canary_parameters(self.key, CANARIES)

    @property
    def of_control(self) -> str:
        """For that of the plain guest."""
        return canary_parameters(self.key, CANARIES, _CONTROL_FIRST)


@dataclass(frozen=True, slots=True)
class Sighting:
    """One look: the audit, and whose secrets the scan has read."""

    audit: AuditResult
    found: int
    control_found: int

    @property
    def controlled(self) -> bool:
        """Whether the means found all that was there to be found."""
        return self.control_found == CANARIES

    @property
    def control_said(self) -> str:
        return f"the same scan found {self.control_found} of the {CANARIES} secrets of a plain guest beside it"


def look(guest: LiveGuest, control: LiveGuest, secrets: Secrets) -> Sighting:
    """Audit a guest, and scan all that the kernel has mapped for both guests' secrets.

    The scan belongs to the control's audit: an audit that has read a secret calls its guest exposed, and some of these
    are the control's.

    Raises:
        Undetermined: this host does not let itself be looked at.
    """
    audit = audit_process(guest.pid, ranges=guest.ranges())
    return replace(_look_once(control, secrets), audit=audit)


def _look_once(control: LiveGuest, secrets: Secrets) -> Sighting:
    """The same of the control alone, which has planted secrets of its own.

    Raises:
        Undetermined: this host does not let itself be looked at.
    """
    audit = audit_process(control.pid, scan=secrets.key, ranges=control.ranges())
    numbers = {canary.number for canary in audit.scan.found} if audit.scan is not None else set()
    control_found = sum(number >= _CONTROL_FIRST for number in numbers)
    return Sighting(audit, len(numbers) - control_found, control_found)


def verdict_answer(id: str, sighting: Sighting) -> Answer:
    """The audit's verdict as yes, no, or not determined."""
    audit, pages = sighting.audit, sighting.audit.pages
    detail = (
        f"of {pages.pages_populated} pages, {pages.direct_map_pages} are in the direct map, {pages.alias_pages} "
        f"aliased and {pages.unknown_pages} unknown; {sighting.found} secrets found; {sighting.control_said}"
    )
    notes = "; ".join(audit.notes)
    if audit.verdict is Verdict.EXPOSED or sighting.found:
        return no(id, "the host kernel maps guest RAM", detail)
    if audit.verdict is Verdict.UNKNOWN:
        return undetermined(id, notes or "some pages could not be judged", detail)
    if not sighting.controlled:
        return undetermined(id, sighting.control_said, detail)
    return yes(id, detail, notes)


def sightings(sighting: Sighting, *, after_io: bool) -> list[Answer]:
    """What one look answers: AFTER_IO, or AFTER_BOOT, but for the secrets planted."""
    audit, pages = sighting.audit, sighting.audit.pages
    regions = "; ".join(f"{name}: {count} pages" for name, count in audit.alias_pages_by_region.items())
    found = Answer("hidden.canaries_found_after_io" if after_io else "hidden.canaries_found", float(sighting.found))
    if not sighting.found and not sighting.controlled:
        found = undetermined(found.question, sighting.control_said)
    if after_io:
        return [
            verdict_answer("hidden.after_io", sighting),
            measured("hidden.direct_map_pages_after_io", pages.direct_map_pages),
            measured("hidden.alias_pages_after_io", pages.alias_pages, detail=regions),
            found,
        ]
    control = yes if sighting.controlled else no
    return [
        verdict_answer("hidden.before_io", sighting),
        measured("hidden.ram_pages", pages.ram_pages, detail=f"{pages.pages_populated} of them have a frame"),
        measured("hidden.direct_map_pages", pages.direct_map_pages),
        measured("hidden.alias_pages", pages.alias_pages, detail=regions),
        measured("hidden.unknown_pages", pages.unknown_pages, detail=str(pages.reasons or "")),
        measured("hidden.excluded_pages", pages.excluded_pages, detail=_excluded_text(audit)),
        found,
        control("hidden.control", sighting.control_said),
    ]


def _excluded_text(audit: AuditResult) -> str:
    """What maps the pages that are kept from the guest."""
    if audit.judged is None or not audit.pages.excluded_pages:
        return ""
    judged = audit.judged
    reached = {
        kind.value: int(judged.pages[judged.excluded & (judged.reached >> np.uint32(code) & np.uint32(1) != 0)].sum())
        for code, kind in enumerate(Kind)
    }
    return "mapped by: " + ", ".join(f"{name}: {count} pages" for name, count in reached.items() if count)


def secrets_in_frames(frames: Intervals, secrets: Secrets) -> int:
    """How many of the guest's secrets stand in these frames, read through /dev/mem: for what Linux never owned.

    Raises:
        OSError: the kernel does not let them be read.
    """
    numbers: set[int] = set()
    fd = os.open("/dev/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in zip(frames.start.tolist(), frames.end.tolist(), strict=True):
            size = (end - start) * PAGE_SIZE
            with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=start * PAGE_SIZE) as view:
                at = view.find(PREFIX)
                while at >= 0:
                    if canary := parse_canary(view[at : at + CANARY_LENGTH], secrets.key):
                        numbers.add(canary.number)
                    at = view.find(PREFIX, at + 1)
    finally:
        os.close(fd)
    return len({number for number in numbers if number < _CONTROL_FIRST})


def zeroed_frames(frames: Intervals, secrets: Secrets, seen_before: int | None) -> Answer:
    """Whether the secrets are gone from frames that the host kernel does not map.

    Args:
        seen_before: how many of them were read in the same way while the guest ran.
    """
    id = "hidden.zeroed"
    if seen_before != CANARIES:
        return undetermined(id, f"{seen_before or 0} of {CANARIES} secrets could be read in its frames while it ran")
    control = f"read through /dev/mem, which showed all {CANARIES} while the guest ran"
    if left := secrets_in_frames(frames, secrets):
        return no(id, f"{left} of its {CANARIES} secrets still stand in the frames that it had", control)
    return yes(id, f"none of its secrets is left in its frames; {control}")


def after_the_end(
    control: LiveGuest, secrets: Secrets, frames: Intervals, memory_kib: int, owned_by_linux: bool
) -> list[Answer]:
    """Once the guest is gone: are its secrets still there, and has the host its memory back?

    Args:
        control: the plain guest, which still runs.
        frames: of the guest's RAM, as they were.
        memory_kib: what memory the host had before it.
        owned_by_linux: whether the memory was the host kernel's before, so that it must be so again.
    """
    sighting = _look_once(control, secrets)
    if sighting.found:
        zeroed = no("hidden.zeroed", f"{sighting.found} of its {CANARIES} secrets are still in the host's memory")
    elif not sighting.controlled:
        zeroed = undetermined("hidden.zeroed", sighting.control_said)
    elif not owned_by_linux:
        zeroed = undetermined(
            "hidden.zeroed",
            "the host kernel maps none of this memory, so a scan of what it maps says nothing of it",
            sighting.control_said,
        )
    else:
        zeroed = yes("hidden.zeroed", sighting.control_said)
    return [zeroed, _restored(sighting.audit.mappings, frames, memory_kib, owned_by_linux)]


def _restored(mappings: KernelMappings, frames: Intervals, memory_kib: int, owned_by_linux: bool) -> Answer:
    id = "hidden.restored"
    lost = memory_kib - host_memory_kib()
    if lost > 0:
        return no(id, f"the host has {lost} KiB less memory than before the guest (MemTotal)")
    if not frames.size:
        return undetermined(id, "which frames the guest had is not known")
    back = frames_in(frames, direct_frames(mappings))
    detail = f"{back} of the guest's {frames.size} frames are in the direct map; MemTotal is what it was"
    if not owned_by_linux:
        return yes(id, f"{detail}: the memory is not Linux's, and was not before")
    if back < frames.size:
        return no(
            id, f"{frames.size - back} of the guest's {frames.size} frames are not in the direct map again", detail
        )
    return yes(id, detail)


def direct_frames(mappings: KernelMappings) -> Intervals:
    """The page frames that the direct map maps."""
    direct = mappings.direct
    start: NDArray[np.int64] = (direct["pa"] >> PAGE_SHIFT).astype(np.int64)
    return Intervals.union(start, start + (direct["bytes"] >> PAGE_SHIFT).astype(np.int64))


def frames_in(frames: Intervals, others: Intervals) -> int:
    """How many of `frames` are among `others`."""
    both = 0
    for start, end in zip(frames.start.tolist(), frames.end.tolist(), strict=True):
        low, high = np.maximum(others.start, start), np.minimum(others.end, end)
        both += int(np.maximum(high - low, 0).sum())
    return both


def guest_frames(sighting: Sighting | None) -> Intervals:
    """The frames of the guest's RAM; none where it was not looked at."""
    nothing: Sequence[int] = ()
    empty = np.array(nothing, dtype=np.int64)
    if sighting is None or sighting.audit.judged is None:
        return Intervals.union(empty, empty)
    return sighting.audit.judged.frames
