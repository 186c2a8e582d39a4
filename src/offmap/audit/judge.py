"""The verdict on one VM, and the notes that must stand beside it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from offmap.audit.classify import claimed_excluded, excluded_ranges
from offmap.audit.guest_ram import GuestRam
from offmap.audit.result import Pages, Source
from offmap.audit.scan_result import Scan
from offmap.audit.verdict import Verdict
from offmap.units import format_size

_ROM = 16  # a guest has this many times as much RAM as ROM, at least


def judge(
    pages: Pages,
    ram: GuestRam,
    scan: Scan | None,
    partial: str = "",
    plain: Mapping[str, int] = MappingProxyType({}),
    mapped_read_only: int = 0,
    changed: Sequence[str] = (),
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and what must be said beside it.

    Args:
        changed: what may have been exchanged for hidden memory (``looks.what_changed``).
    """
    verdict = pages.verdict(ram.guessed)
    # Where no slot was ever changed, the guest could never write to what it can only read now. And ROM is small.
    once_writable = mapped_read_only if not ram.intact or mapped_read_only * _ROM > pages.pages_populated else 0
    against = partial or changed or ram.unlisted or ram.doubts or once_writable
    if verdict is Verdict.HIDDEN and against:
        verdict = Verdict.UNKNOWN
    why = f": {ram.unlisted}" if ram.unlisted else ""
    unchecked = f": {ram.why_unchecked}" if ram.why_unchecked else ""
    in_slots = claimed_excluded(ram).size - excluded_ranges(ram).size
    read_only = format_size(sum(part.bytes for part in ram.read_only))
    candidates = {
        **{
            f"{count} pages are not populated, and the kernel maps them when they are: {memory}": (
                verdict is not Verdict.EXPOSED
            )
            for memory, count in plain.items()
        },
        "the ranges are guesses (large mappings of a process with a KVM VM)"
        f"{why}; --range names them for sure": ram.guessed,
        f"KVM's own list of VMs could not be read, so that memory may be missing{why}": why and not ram.guessed,
        f"that the VMM's list leaves no memory out was not checked with KVM's{unchecked}": unchecked,
        **dict.fromkeys(ram.doubts, True),
        "only what --range names was judged; whether the guest has more RAM was not looked at": any(
            part.source is Source.REQUESTED for part in ram.ranges
        ),
        f"{format_size(ram.omitted_bytes)} that the VMM's list leaves out, and KVM has, are judged too": (
            ram.omitted_bytes
        ),
        f"{read_only} that the guest cannot write to (firmware, registers) is not judged: it never could, as no memory "
        "slot of its VM was ever changed": ram.read_only and ram.intact and not once_writable,
        f"{read_only} that the guest cannot write to (firmware, registers) is not judged": (
            ram.read_only and not ram.intact and not once_writable
        ),
        f"{once_writable} pages that the guest cannot write to are mapped or cannot be found, and they may be its RAM: "
        "memory slots of its VM were changed, or they are too many for firmware; --range names RAM for sure": (
            once_writable
        ),
        **dict.fromkeys(changed, verdict is not Verdict.EXPOSED),
        "no page of the guest's RAM was found populated": (
            verdict is Verdict.UNKNOWN and not pages.pages_populated and not partial
        ),
        f"{pages.not_populated_pages} pages are not populated: whether they will be hidden is known once they are": (
            verdict is Verdict.HIDDEN and pages.not_populated_pages
        ),
        f"{pages.excluded_direct_pages} pages that are said to be kept from the guest are in the direct map": (
            pages.excluded_direct_pages
        ),
        f"{in_slots} pages that the VMM says it keeps from its guest count all the same: KVM has them in a slot, or "
        "could not be asked": in_slots,
        f"{pages.excluded_mapped_pages} mapped pages are kept from the guest and do not count": (
            pages.excluded_mapped_pages
        ),
    }
    notes = tuple(note for note, applies in candidates.items() if applies)
    if scan is None:
        return verdict, notes
    if verdict is Verdict.HIDDEN and scan.frames_unread:
        verdict = Verdict.UNKNOWN  # it may stand there
    # A planted secret was read: whatever the page tables say, it is not hidden.
    return Verdict.EXPOSED if scan.found or scan.findings else verdict, notes + _scan_notes(scan)


def _scan_notes(scan: Scan) -> tuple[str, ...]:
    elsewhere = sum(not any(place.in_guest for place in hit.places) for hit in scan.found)
    copies = sum(not place.in_guest for place in scan.findings)
    candidates = {
        f"{elsewhere} canaries were read outside the guest's own pages only: copies": elsewhere,
        f"the secret was read in {copies} places outside the guest's own pages: copies": copies,
        "the file that the secret was read from stands in the page cache, which is not counted": any(
            place.source for place in scan.places
        ),
        f"{scan.frames_unread} mapped pages of memory were not scanned, as /proc/kcore does not show them: what was "
        "looked for may stand there": scan.frames_unread,
    }
    return tuple(note for note, applies in candidates.items() if applies)
