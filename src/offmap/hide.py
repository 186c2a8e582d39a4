"""The only way from a backend to RAM that a guest may have.

A caller that builds a guest must say how RAM of a hiding kind is checked: `Vet`, or `NotAudited` with a reason. There
is no default. The RAM keeps the outcome: `Vetted`, which only an audit by this module makes, or `NotAudited`.

The audit runs in a process of its own (``python -m offmap.hide``): the audited memory is then not the auditor's, and a
VMM need not import what only the audit uses.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from offmap.boot.memory_map import BOOT_AREAS
from offmap.errors import BackendRefused, OffmapError
from offmap.kvm import Vm
from offmap.log import Logger
from offmap.memory.backend import Backend
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange, intersect
from offmap.memory.memslots import publish_memslots
from offmap.owned import Owned
from offmap.typed import Final, TypedDict, final
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

_MIB = 1 << 20

_log = Logger("offmap.hide")


@final
class Vet:
    """Audit the RAM before its guest gets it: keep aliased pages from the guest, refuse RAM that is mapped otherwise.

    RAM that nothing can alias (it has no struct pages) is placed and not audited; that takes no rights, and no time.
    """


@final
class NotAudited:
    """RAM of a hiding kind that no audit has checked.

    Attributes:
        reason: why not.
    """

    def __init__(self, reason: str) -> None:
        if not reason or not reason.strip():
            raise ValueError("RAM that is not audited needs a reason")
        self.reason: Final = reason


@final
class Vetted:
    """RAM of which an audit has seen every page. Made by `vet` and by nothing else.

    Attributes:
        pages: how many the audit saw, of 4 KiB.
        excluded: guest-physical pages that the host kernel maps. They are in no memory slot of the guest's.
    """

    __slots__ = ("excluded", "pages")
    pages: int
    excluded: tuple[PhysicalRange, ...]

    def __init__(self) -> None:
        raise TypeError("only an audit makes RAM vetted: offmap.hide.vet")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("what an audit said cannot be changed")

    def __reduce__(self) -> str:
        raise TypeError("what an audit said of this process's RAM cannot be copied")


def check_vetting(vetting: object) -> None:
    """Accept `Vet` and `NotAudited`. Raises TypeError: it is anything else, such as None or a class of its own."""
    if type(vetting) not in (Vet, NotAudited):
        raise TypeError(f"hidden RAM needs a word on its audit: Vet() or NotAudited(reason), not {vetting!r}")


@final
class Ram(Owned):
    """The RAM of one guest, in its VM's memory slots, published to auditors. Gives the memory back when it is closed.

    Args:
        vm: has no RAM yet.
        size: bytes, whole pages.
        vetting: what to do about RAM that promises to be hidden.
        say: shows a line to the user.

    Attributes:
        memory: its bytes.
        vetting: what is known of it; None for a kind that does not promise to be hidden.
        populate_seconds: how long the backend took.

    Raises:
        BackendRefused: this host cannot give it, or what it gave is not hidden.
    """

    def __init__(
        self, backend: Backend, vm: Vm, size: int, vetting: Vet | NotAudited, say: Callable[[str], None]
    ) -> None:
        check_vetting(vetting)  # a caller may have come by a config that was changed
        with ExitStack() as building:
            started = time.monotonic()
            self.memory = building.enter_context(backend.guest_memory(vm, size))
            self.populate_seconds = time.monotonic() - started
            self.vetting = _vetting(backend, self.memory, vetting, say)
            self.memory.map_into(vm, self.excluded)
            building.callback(os.close, publish_memslots(self.memory, backend.name, self.excluded))
            self._owned = building.pop_all()
            got = format_size(size), backend.name, self.populate_seconds
            _log.debug("%s of %s memory after %.3f s: %s", *got, self.to_json())

    @property
    def excluded(self) -> tuple[PhysicalRange, ...]:
        """Guest-physical pages that are in none of its memory slots, because the host kernel maps them."""
        return self.vetting.excluded if isinstance(self.vetting, Vetted) else ()

    def to_json(self) -> dict[str, object]:
        """What is known of it, for reports: ``vetting`` (null for RAM that does not promise to hide) and the reason."""
        names = {Vetted: "vetted", NotAudited: "placed, not audited"}
        return {
            "vetting": names.get(type(self.vetting)),
            "not_audited_because": self.vetting.reason if isinstance(self.vetting, NotAudited) else None,
            "excluded_pages": sum(r.size for r in self.excluded) // PAGE_SIZE,
        }

    def close(self) -> None:
        self._owned.close()


def _vetting(
    backend: Backend, memory: GuestMemory, vetting: Vet | NotAudited, say: Callable[[str], None]
) -> Vetted | NotAudited | None:
    if not backend.hides:
        return None
    if isinstance(vetting, NotAudited):
        say(f"the guest's RAM is placed, not audited: {vetting.reason}")
        return vetting
    if not backend.may_be_aliased:
        if os.geteuid() != 0:
            say(f"the guest's RAM is placed, not audited: that takes root (offmap audit {os.getpid()})")
        return NotAudited(f"{backend.name} memory has no struct pages, so that nothing can alias it")
    vetted = vet(backend, memory)
    if _gathered(memory, vetted.excluded):
        vetted = vet(backend, memory)
    if vetted.excluded:
        count = sum(r.size for r in vetted.excluded) // PAGE_SIZE
        say(f"{count} pages of the guest's RAM are aliased in the host kernel and kept from the guest")
    return vetted


def _gathered(memory: GuestMemory, excluded: Sequence[PhysicalRange]) -> bool:
    """Put the MiB with excluded pages behind those without, if they are where a guest boots. Whether any moved."""
    region = memory.regions[0]
    if region.backing.guest_memfd is not None or not intersect(BOOT_AREAS, excluded):
        return False
    starts = range(0, region.size - _MIB + 1, _MIB)
    bad = [at for at in starts if intersect([PhysicalRange(at, at + _MIB)], excluded)]
    good = sorted(set(starts).difference(bad), reverse=True)
    pairs = [(one, other) for one, other in zip(bad, good, strict=False) if one < other]
    for one, other in pairs:
        region.backing.exchange(one, other, _MIB)
    return bool(pairs)


def vet(backend: Backend, memory: GuestMemory, pid: int | None = None) -> Vetted:
    """Audit `memory`, which is populated and holds nothing of a guest yet.

    Args:
        pid: the process that has `memory` at these addresses; by default this one.

    Raises:
        BackendRefused: a page is in the direct map, or was not seen.
    """
    what = f"the {backend.name} memory that this host gave cannot be a guest's"
    ranges = [(region.userspace_addr, region.size, region.guest_phys_addr) for region in memory.regions]
    seen = _ask(what, os.getpid() if pid is None else pid, ranges)
    pages = memory.size // PAGE_SIZE
    if seen["direct"]:
        raise BackendRefused(what, f"{seen['direct']} of {pages} pages are in its direct map", "use another backend")
    excluded = tuple(PhysicalRange(start, start + size) for start, size in seen["mapped"])
    # One mapped page makes the verdict "exposed", whatever could not be seen of the others.
    unseen = max(seen["unseen"], pages - seen["pages"])
    if unseen or sum(r.size for r in excluded) // PAGE_SIZE < seen["mapped_pages"]:
        why = f"{unseen} of {pages} pages could not be audited: {seen['why'] or 'they are not populated'}"
        raise BackendRefused(what, why, "try again, or use another backend")
    vetted = object.__new__(Vetted)
    object.__setattr__(vetted, "pages", pages)
    object.__setattr__(vetted, "excluded", excluded)
    return vetted


class _Seen(TypedDict):
    """What the audit saw: numbers of pages, and guest-physical (address, bytes) of those that the kernel maps."""

    pages: int
    direct: int
    mapped_pages: int
    unseen: int
    why: str
    mapped: list[tuple[int, int]]


def _ask(what: str, pid: int, ranges: Sequence[tuple[int, int, int]]) -> _Seen:
    """Have a process of its own audit these ranges: (address, bytes, guest-physical address) of process `pid`."""
    import json  # not every guest's start has to wait for these two
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "offmap.hide"],
        input=json.dumps([pid, ranges]),
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"the audit ended with status {done.returncode}"]
        reason, _, remedy = lines[-1].partition("; ")
        raise BackendRefused(
            what,
            f"its aliases cannot be found and kept from the guest: {reason}",
            remedy or "use a backend without struct pages: reserved or unplugged",
        )
    seen: _Seen = json.loads(done.stdout)
    return seen


def _answer() -> int:
    """Run as that process: read the ranges on standard input, audit, print what was seen. Returns the exit status."""
    import json

    from offmap.audit.audit import audit_process
    from offmap.audit.guest_ram import RamRange
    from offmap.audit.result import Source

    pid, ranges = json.load(sys.stdin)
    try:
        wanted = [RamRange(va, size, Source.REQUESTED, gpa) for va, size, gpa in ranges]
        result = audit_process(pid, ranges=wanted, seconds=0)
    except OffmapError as error:
        print(error, file=sys.stderr)
        return 1
    pages = result.pages
    seen = _Seen(
        pages=pages.ram_pages,
        direct=pages.direct_map_pages,
        mapped_pages=pages.mapped_pages,
        unseen=pages.unknown_pages + pages.not_populated_pages,
        why=next(iter(pages.unknown_reasons), ""),
        mapped=list(result.mapped_guest_ranges),
    )
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(_answer())
