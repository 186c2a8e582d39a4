"""What the host kernel can reach of the guest: after its boot, after I/O, and once it is gone.

The positive control is a guest on plain RAM beside it. Both plant secrets with the same key, and each scan looks for
the secrets of both. A scan that misses the plain guest's secrets proves nothing. If the guest is alone, the control is
a secret that the scan plants in its own memory (offmap.audit.scan); without it there is no result.
"""

import mmap
import os
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offmap.audit.audit import Progress, Snapshot, snapshot_process
from offmap.audit.canary import CANARY_LENGTH, PREFIX, CanaryKey, new_key, parse_canary
from offmap.audit.intervals import Intervals
from offmap.audit.mappings import KernelMappings
from offmap.audit.reach import Kind
from offmap.audit.result import AuditResult
from offmap.audit.verdict import Verdict
from offmap.compare.guest import canary_parameters
from offmap.compare.probes.host_kernel import host_memory_kib
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import measured, no, undetermined, yes
from offmap.compare.questions import Answer
from offmap.patience import scaled
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_CONTROL_FIRST = 0x1000  # the number of the control's first secret

_RETURNED_BY = 5.0  # seconds in which more of the guest's memory must come back
_LOOK_EVERY = 0.2  # seconds

AFTER_BOOT = (
    "hidden.before_io",
    "hidden.ram_pages",
    "hidden.populated_pages",
    "hidden.direct_map_pages",
    "hidden.alias_pages",
    "hidden.unknown_pages",
    "hidden.excluded_pages",
    "hidden.scanned_bytes",
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
    """The secrets that the guests plant.

    Attributes:
        count: how many each guest plants.
    """

    count: int
    key: CanaryKey = field(default_factory=new_key)

    @property
    def of_candidate(self) -> str:
        """Words for the kernel command line of the cell's guest."""
        return canary_parameters(self.key, self.count)

    @property
    def of_control(self) -> str:
        """Words for the kernel command line of the plain guest."""
        return canary_parameters(self.key, self.count, _CONTROL_FIRST)


@dataclass(frozen=True, slots=True)
class Look:
    """An audit of the guest, and a scan for secrets.

    Attributes:
        found: how many of the guest's secrets were read.
        scanned: bytes that were read to look for them.
        controlled: whether the scan found all secrets of the control.
        control: what the scan found of the control, in words.
    """

    snapshot: Snapshot
    found: int
    scanned: int
    controlled: bool
    control: str

    @property
    def audit(self) -> AuditResult:
        return self.snapshot.audit


def look_beside(guest: LiveGuest, control: LiveGuest, secrets: Secrets) -> Look:
    """Audit a guest. Scan all that the kernel maps for its secrets and for those of the plain guest.

    The scan is part of the control's audit, not the guest's: an audit that reads a secret calls its VM exposed, and the
    scan finds the control's secrets.

    Raises:
        Undetermined: this host does not let itself be looked at.
    """
    snapshot = snapshot_process(guest.pid, ranges=guest.ranges())
    return _look_at_control(control, secrets, snapshot)


def _look_at_control(control: LiveGuest, secrets: Secrets, snapshot: Snapshot | None = None) -> Look:
    """Scan for the secrets of both guests. Without `snapshot`, the look has the plain guest's.

    Raises:
        Undetermined: this host does not let itself be looked at.
    """
    scanning = snapshot_process(control.pid, scan=secrets.key, ranges=control.ranges())
    scan = scanning.audit.scan
    numbers = {hit.canary for hit in scan.found} if scan else set()
    of_control = sum(number >= _CONTROL_FIRST for number in numbers)
    said = f"the same scan found {of_control} of the {secrets.count} secrets of a plain guest beside it"
    scanned = scan.bytes_scanned if scan else 0
    return Look(snapshot or scanning, len(numbers) - of_control, scanned, of_control == secrets.count, said)


def look_alone(guest: LiveGuest, secrets: Secrets, progress: Progress) -> Look:
    """Audit a guest, and scan all that the kernel has mapped for its secrets.

    Raises:
        Undetermined: this host cannot be scanned, or the scan missed its own control.
    """
    snapshot = snapshot_process(guest.pid, scan=secrets.key, ranges=guest.ranges(), progress=progress)
    scan = snapshot.audit.scan
    scanned = scan.bytes_scanned if scan else 0
    said = "the same scan found what it had planted in its own memory"
    return Look(snapshot, (scan.canaries_found if scan else 0) or 0, scanned, scan is not None, said)


def verdict_answer(id: str, look: Look) -> Answer:
    """The audit's verdict as an answer: hidden is yes, exposed is no, unknown is not determined."""
    audit, pages = look.audit, look.audit.pages
    detail = (
        f"of {pages.pages_populated} pages, {pages.direct_map_pages} are in the direct map, {pages.alias_pages} "
        f"aliased and {pages.unknown_pages} unknown; {look.found} secrets found; {look.control}"
    )
    notes = "; ".join(audit.notes)
    if audit.verdict is Verdict.EXPOSED or look.found:
        return no(id, "the host kernel maps guest RAM", detail)
    if audit.verdict is Verdict.UNKNOWN:
        return undetermined(id, notes or "some pages could not be judged", detail)
    if not look.controlled:
        return undetermined(id, look.control, detail)
    return yes(id, detail, notes)


def _found(id: str, look: Look) -> Answer:
    if not look.found and not look.controlled:
        return undetermined(id, look.control)
    return measured(id, look.found)


def _aliased(id: str, look: Look) -> Answer:
    regions = "; ".join(f"{name}: {count} pages" for name, count in look.audit.alias_pages_by_region.items())
    return measured(id, look.audit.pages.alias_pages, detail=regions)


def answers_after_io(look: Look) -> list[Answer]:
    """AFTER_IO, by one look."""
    return [
        verdict_answer("hidden.after_io", look),
        measured("hidden.direct_map_pages_after_io", look.audit.pages.direct_map_pages),
        _aliased("hidden.alias_pages_after_io", look),
        _found("hidden.canaries_found_after_io", look),
    ]


def answers_after_boot(look: Look) -> list[Answer]:
    """AFTER_BOOT, by one look."""
    pages = look.audit.pages
    control = yes if look.controlled else no
    return [
        verdict_answer("hidden.before_io", look),
        measured("hidden.ram_pages", pages.ram_pages, detail=f"{pages.pages_populated} of them have a frame"),
        measured("hidden.populated_pages", pages.pages_populated),
        measured("hidden.direct_map_pages", pages.direct_map_pages),
        _aliased("hidden.alias_pages", look),
        measured("hidden.unknown_pages", pages.unknown_pages, detail=str(pages.unknown_reasons or "")),
        measured("hidden.excluded_pages", pages.excluded_pages, detail=_excluded_text(look.snapshot)),
        measured("hidden.scanned_bytes", look.scanned),
        _found("hidden.canaries_found", look),
        control("hidden.control", look.control),
    ]


def _excluded_text(snapshot: Snapshot) -> str:
    """What maps the pages that are kept from the guest, in words."""
    if not snapshot.audit.pages.excluded_pages:
        return ""
    judged = snapshot.judged
    reached = {
        kind.value: int(judged.pages[judged.excluded & (judged.reached >> np.uint32(code) & np.uint32(1) != 0)].sum())
        for code, kind in enumerate(Kind)
    }
    return "mapped by: " + ", ".join(f"{name}: {count} pages" for name, count in reached.items() if count)


def secrets_in_frames(frames: Intervals, secrets: Secrets) -> int:
    """How many of the guest's secrets are in these frames, which Linux never owned. Reads /dev/mem.

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
        seen_before: how many were read in the same way while the guest ran.
    """
    id = "hidden.zeroed"
    if seen_before != secrets.count:
        return undetermined(
            id, f"{seen_before or 0} of {secrets.count} secrets could be read in its frames while it ran"
        )
    control = f"read through /dev/mem, which showed all {secrets.count} while the guest ran"
    if left := secrets_in_frames(frames, secrets):
        return no(id, f"{left} of its {secrets.count} secrets still stand in the frames that it had", control)
    return yes(id, f"none of its secrets is left in its frames; {control}")


def after_the_end(
    control: LiveGuest, secrets: Secrets, frames: Intervals, memory_kib: int, owned_by_linux: bool
) -> list[Answer]:
    """Ask once the guest is gone: are its secrets still in memory, and does the host have its memory back?

    Args:
        control: the plain guest, which still runs.
        frames: of the guest's RAM, while it ran.
        memory_kib: the host's memory before the guest, in KiB.
        owned_by_linux: whether the host kernel owned the memory before, and must own it again.
    """
    look, back = _look_until_back(control, secrets, frames, expected=owned_by_linux)
    if look.found:
        zeroed = no("hidden.zeroed", f"{look.found} of its {secrets.count} secrets are still in the host's memory")
    elif not look.controlled:
        zeroed = undetermined("hidden.zeroed", look.control)
    elif not owned_by_linux:
        zeroed = undetermined(
            "hidden.zeroed",
            "the host kernel maps none of this memory, so a scan of what it maps says nothing of it",
            look.control,
        )
    elif back < frames.size:
        left = f"{frames.size - back} of its {frames.size} frames are not in the direct map again, and were not scanned"
        zeroed = undetermined("hidden.zeroed", left, look.control)
    else:
        zeroed = yes("hidden.zeroed", look.control)
    return [zeroed, _restored(back, frames, memory_kib, owned_by_linux)]


def _look_until_back(control: LiveGuest, secrets: Secrets, frames: Intervals, *, expected: bool) -> tuple[Look, int]:
    """Look again while frames are missing: the kernel zeroes some before it maps them. Gives up when no more come.

    Args:
        expected: whether they are to be in the direct map again; else one look is enough.

    Returns:
        The last look, and how many of the frames were in the direct map then.
    """
    most, until = -1, 0.0
    while True:
        look = _look_at_control(control, secrets)
        back = frames_in(frames, direct_frames(look.snapshot.mappings))
        if back > most:
            most, until = back, time.monotonic() + scaled(_RETURNED_BY)
        if not expected or back == frames.size or time.monotonic() > until:
            return look, back
        time.sleep(_LOOK_EVERY)


def _restored(back: int, frames: Intervals, memory_kib: int, owned_by_linux: bool) -> Answer:
    id = "hidden.restored"
    lost = memory_kib - host_memory_kib()
    if lost > 0:
        return no(id, f"the host has {lost} KiB less memory than before the guest (MemTotal)")
    if not frames.size:
        return undetermined(id, "which frames the guest had is not known")
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


def guest_frames(look: Look | None) -> Intervals:
    """The frames of the guest's RAM; none if there was no look."""
    if look is None:
        empty = np.zeros(0, dtype=np.int64)
        return Intervals.union(empty, empty)
    return look.snapshot.judged.frames
