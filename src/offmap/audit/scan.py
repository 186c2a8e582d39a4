"""The scan: read every page of RAM that the kernel maps, through each of its mappings, and say where bytes stand.

It looks either for canaries (any valid one of a key) or for one secret. Reads go through /proc/kcore: ``readable`` says
what that can show, and what it cannot is counted. ``search`` reads; ``placed`` says what the pages are that something
was found in.

A scanner finds itself. So it keeps what it looks for, and what it reads, in locked memory of its own, and leaves out
hits in its own frames. Canaries are looked for by their prefix alone. The kernel's bounce buffer of an open kcore may
show a second time what was just read. So every hit is looked at again, and one that has gone by then is called gone.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from offmap.audit.beside_ram import beside_ram, firmware_map
from offmap.audit.bpf import KernelReader
from offmap.audit.canary import CANARY_LENGTH, PREFIX, Canary, CanaryKey, make_canary, new_key, parse_canary
from offmap.audit.guest_pages import GuestPages
from offmap.audit.kcore import Kcore
from offmap.audit.mappings import KernelMappings
from offmap.audit.own_memory import LockedBuffer, OwnPage, check_control, frames_at, own_frames
from offmap.audit.placed import Placer
from offmap.audit.readable import (
    Piece,
    Read,
    by_address,
    clip,
    frames_of,
    image_tail,
    ioremap_areas,
    read_plan,
    union,
    zero_filled_intervals,
)
from offmap.audit.regions import Layout
from offmap.audit.scan_result import FoundCanary, Owner, Place, Scan, Sort
from offmap.audit.search import Found, Lane, Pattern, Seams, buffer_size, search
from offmap.audit.secret import Secret
from offmap.errors import KernelError, Undetermined
from offmap.log import Logger
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SIZE

_log = Logger("offmap.audit")
_THREADS = 2  # one reader rarely fills a memory channel; a host in use has better things to do than more of them
_MOST_PLACES = 1 << 14  # of a secret; nobody reads a longer list

T = TypeVar("T")

# What to scan for: canaries of a key, or a secret.
Wanted = CanaryKey | Secret


def default_threads() -> int:
    """How many threads read, if nobody says otherwise."""
    return min(_THREADS, len(os.sched_getaffinity(0)))


def canary_pattern(prefix: LockedBuffer, keys: Sequence[CanaryKey]) -> Pattern[tuple[CanaryKey, Canary]]:
    """Valid canaries of any of these keys; ``prefix`` is written to, and must outlive the pattern."""
    prefix.view[: len(PREFIX)] = PREFIX

    def match(data: memoryview) -> tuple[CanaryKey, Canary] | None:
        return next(((key, canary) for key in keys if (canary := parse_canary(data, key)) is not None), None)

    return Pattern(prefix.va, len(PREFIX), CANARY_LENGTH, match)


def secret_pattern(secret: Secret) -> Pattern[bool]:
    """The bytes of a secret, which must outlive the pattern."""

    return Pattern(secret.va, secret.length, secret.length, lambda data: data == secret.view or None, _MOST_PLACES)


@dataclass
class _Scan:
    """One scan: what is read, and by what."""

    kcore: Kcore
    mappings: KernelMappings
    layout: Layout
    readable: Sequence[Piece]
    reads: Sequence[Read]
    guest: GuestPages
    progress: Callable[[float], None] | None
    placer: Placer

    def canaries(self, key: CanaryKey) -> dict[Canary, list[Place]]:
        control_key = new_key()
        with OwnPage() as control, LockedBuffer(PAGE_SIZE) as prefix:
            control.write(make_canary(control_key, 0))
            pattern = canary_pattern(prefix, (key, control_key))
            hits, own = self._search(pattern)
            frame = control.pfn()
            _check_control(any(what[0] == control_key and hit.pa // PAGE_SIZE == frame for hit, what in hits))
            kept = [(hit, canary) for hit, (of, canary) in hits if of == key and self._counts(hit, own)]
            places = self._places([hit for hit, _ in kept], pattern)
        found: dict[Canary, list[Place]] = {}
        for (_, canary), place in zip(kept, places, strict=True):
            found.setdefault(canary, []).append(place)
        return found

    def _counts(self, hit: Found, own: Collection[int]) -> bool:
        """Whether it is not of our own pages. Where a VMM audits itself, the guest's pages are its own, and count."""
        return hit.pa // PAGE_SIZE in self.guest or hit.pa // PAGE_SIZE not in own

    def secret(self, secret: Secret) -> list[Place]:
        pattern = secret_pattern(secret)
        self.placer.prepare()
        hits, own = self._search(pattern, Seams(*self.guest.seams(), secret.view))
        # The page that holds the secret for us is the positive control: its bytes stand nowhere but there.
        control = frames_at(secret.va, 1)
        _check_control(any(hit.pa // PAGE_SIZE in control for hit, _ in hits))
        return self._places([hit for hit, _ in hits if self._counts(hit, own)], pattern, secret)

    def _search(self, pattern: Pattern[T], seams: Seams | None = None) -> tuple[list[tuple[Found, T]], set[int]]:
        """What was found, and the frames that were ours meanwhile."""
        with ExitStack() as stack:
            size = buffer_size(pattern.span)
            lanes = [Lane(read, stack.enter_context(LockedBuffer(size))) for read in self.reads]
            before = own_frames()
            hits = search(self.readable, lanes, pattern, self.progress, seams)
            return hits, before | own_frames()

    def _places(self, hits: Sequence[Found], pattern: Pattern[T], secret: Secret | None = None) -> list[Place]:
        """What the pages are that these were found in."""
        # First of all: what comes after takes memory, and free pages among these would go for it.
        looks = self.placer.look({hit.pa // PAGE_SIZE for hit in hits})
        gone = self._gone(hits, pattern)
        owners = self.placer.owners(looks)
        source = secret.file_frames() if secret is not None else set()
        return [
            Place(
                va=Address(hit.va),
                pa=Address(hit.pa),
                pa2=None if hit.pa2 is None else Address(hit.pa2),
                region=self.layout.name(hit.va),
                in_guest=hit.pa // PAGE_SIZE in self.guest,
                source=hit.pa // PAGE_SIZE in source,
                owner=Owner(Sort.GONE) if hit in gone else owners[hit.pa // PAGE_SIZE].at(hit.pa % PAGE_SIZE),
            )
            for hit in hits
        ]

    def _gone(self, hits: Iterable[Found], pattern: Pattern[T]) -> set[Found]:
        """Look again. The guest's own pages may change at any time: what was read there was read."""
        gone = set()
        with LockedBuffer(pattern.span + PAGE_SIZE) as buffer:
            data = buffer.view[: pattern.span]
            for hit in hits:
                if hit.pa2 is not None or hit.pa // PAGE_SIZE in self.guest:
                    continue
                # Something else into the kernel's bounce buffer first, lest it be this buffer that is looked at.
                self.reads[0](self.mappings.direct_map_base + self.kcore.ram[0][0], buffer.view[:PAGE_SIZE])
                self.reads[0](hit.va, data)
                if pattern.match(data) is None:
                    gone.add(hit)
        return gone


def _tail_reader(mappings: KernelMappings, tail: Iterable[Piece]) -> KernelReader | None:
    """What reads these pieces, if this kernel has that, it shows a page of our own, and all of them can be read."""
    try:
        reader = KernelReader()
        try:
            with OwnPage() as control:
                check_control(control, reader.read, mappings, "BPF")
                for piece in tail:
                    for va in range(piece.va, piece.va + piece.bytes, PAGE_SIZE):
                        reader.read(va, control.view)
        except BaseException:
            reader.close()
            raise
    except (KernelError, Undetermined) as error:
        _log.debug("what is mapped behind the kernel's image is not read: %s", error)
        return None
    return reader


def _check_control(found: bool) -> None:
    if not found:
        raise Undetermined("the scan did not find what it planted in its own memory", "run it again")


def scan_memory(
    kcore: Kcore,
    mappings: KernelMappings,
    layout: Layout,
    wanted: Wanted,
    guest: GuestPages,
    device_ranges: Iterable[tuple[int, int]] = (),
    progress: Callable[[float], None] | None = None,
    threads: int | None = None,
) -> Scan:
    """Scan all RAM that the kernel maps.

    Args:
        wanted: canaries of a key, or a secret.
        guest: the guest's pages, to tell its own RAM from copies.
        device_ranges: physical ranges of guest RAM that Linux does not count as RAM.
        threads: how many read at once.

    Raises:
        Undetermined: the scan did not find what it planted in a page of its own.
        OffmapError: the bytes stand in too many places to list.
    """
    started = time.monotonic()
    ram = union([*kcore.ram, *device_ranges])
    beside = beside_ram(mappings, ram, firmware_map())
    zero_filled = union([*zero_filled_intervals(kcore.page_flags, ram), *beside.memory])
    ram = union([*ram, *beside.memory])
    readable, unread = read_plan(mappings, ram, kcore.segments, layout.vmemmap, zero_filled, ioremap_areas())
    tail, others = image_tail(unread, readable, layout, zero_filled)
    threads = threads or default_threads()
    found: dict[Canary, list[Place]] = {}
    places: list[Place] = []
    secret = wanted if isinstance(wanted, Secret) else None
    with ExitStack() as stack:
        reads: list[Read] = [stack.enter_context(kcore.reader()) for _ in range(threads)]
        if tail and (kernel := _tail_reader(mappings, tail)) is not None:
            stack.enter_context(kernel)
            readable, unread = sorted([*readable, *tail]), others
            reads = [by_address(read, kernel.read, tail) for read in reads]
        placer = Placer(kcore, layout, mappings, guest, leave_out=(os.getpid(),))
        scan = _Scan(kcore, mappings, layout, readable, reads, guest, progress, placer)
        if isinstance(wanted, Secret):
            places = scan.secret(wanted)
        else:
            found = scan.canaries(wanted)
    _, never = clip([Piece(0, start, end - start) for start, end in frames_of(unread)], frames_of(readable))
    return Scan(
        for_="canaries" if secret is None else "secret",
        secret_bytes=None if secret is None else secret.length,
        canaries_found=len(found) if secret is None else None,
        bytes_scanned=sum(piece.bytes for piece in readable),
        bytes_unread=sum(piece.bytes for piece in unread),
        frames_unread=sum(piece.bytes for piece in never) // PAGE_SIZE,
        device_pages=beside.device_pages,
        threads=threads,
        seconds=round(time.monotonic() - started, 3),
        found=tuple(
            FoundCanary(canary.number, tuple(at))
            for canary, at in sorted(found.items(), key=lambda item: item[0].number)
        ),
        places=tuple(places),
    )
