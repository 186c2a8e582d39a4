"""The sweep: all memory that the host kernel maps is read, and any 16 bytes of a secret are looked for in it.

The chain goes where pointers lead. The sweep asks whether a copy stands where none leads to: a freed page, a stack, a
buffer, another process. It is no part of the attack: it is told the secret, in pieces of eight bytes. It keeps them
apart, so that it does not find itself. Whichever 16 bytes of the secret stand somewhere, a whole piece is among them.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from offmap.attack.linux import Lost
from offmap.attack.primitive import Primitive, Unreadable
from offmap.attack.result import SHORTEST_RUN, Part, Run, Sweep
from offmap.attack.sweep_parts import parts_of
from offmap.audit.beside_ram import beside_ram, firmware_map
from offmap.audit.kcore import Kcore
from offmap.audit.mappings import KernelMappings
from offmap.audit.own_memory import LockedBuffer, OwnPage, frames_at
from offmap.audit.readable import Piece, clip, frames_of, ioremap_areas, read_plan, union, zero_filled_intervals
from offmap.audit.regions import Layout
from offmap.audit.search import chunks, find_bytes, pieces_within
from offmap.errors import OffmapError, Undetermined
from offmap.report.typed import Address
from offmap.uapi.page import PAGE_SIZE

PIECE = 8
_CHUNK = 2 << 20
_LINE = 64  # pieces are this far from each other in our own memory
_LONGEST = 1 << 12  # bytes of a secret
_MOST_RUNS = 1000
_ATTEMPTS = 3
_HOW = "write them as hexadecimal digits, 16 for each piece, with commas between, in order"


@dataclass(frozen=True)
class Pieces:
    """A secret in pieces of eight bytes, in order; never put together."""

    each: tuple[bytes, ...]

    @property
    def bytes(self) -> int:
        return PIECE * len(self.each)

    def __post_init__(self) -> None:
        if not SHORTEST_RUN <= self.bytes <= _LONGEST or len(set(self.each)) != len(self.each):
            what = f"a secret to sweep for has {SHORTEST_RUN} to {_LONGEST} bytes, and no piece of eight twice"
            raise OffmapError(what, _HOW)

    def digest(self) -> str:
        """The SHA-256 of the whole, which is put together nowhere but in OpenSSL's own state; that is cleared."""
        sha256 = hashlib.sha256()
        for piece in self.each:
            sha256.update(piece)
        return sha256.hexdigest()

    def around(self, data: memoryview, at: int, number: int) -> tuple[int, int]:
        """The run of the secret in ``data`` that the piece of this number, at this place, is of: start and end."""
        place, start, end = PIECE * number, at, at + PIECE
        while start > 0 and place + start - at > 0 and data[start - 1] == self._byte(place + start - at - 1):
            start -= 1
        while end < len(data) and place + end - at < self.bytes and data[end] == self._byte(place + end - at):
            end += 1
        return start, end

    def _byte(self, at: int) -> int:
        return self.each[at // PIECE][at % PIECE]


def parse_pieces(text: str) -> Pieces:
    """Pieces as the command line has them. Raises OffmapError: they are none."""
    try:
        parts = tuple(bytes.fromhex(part) for part in text.strip(",").split(","))
    except ValueError:
        raise OffmapError("the pieces to sweep for are no hexadecimal digits", _HOW) from None
    if any(len(part) != PIECE for part in parts):
        raise OffmapError(f"a piece to sweep for does not have {PIECE} bytes", _HOW)
    return Pieces(parts)


@dataclass(frozen=True)
class SweepPlan:
    """What of all that is mapped is read.

    Attributes:
        readable: memory that the primitive can read, by address.
        unread: memory that it cannot read by these mappings.
        device_pages: mapped registers of devices and tables of firmware: reading them has effects, so they are not.
        layout: names regions of kernel addresses.
        parts: what it is that is read, each with its bytes.
    """

    readable: Sequence[Piece]
    unread: Sequence[Piece]
    device_pages: int
    layout: Layout
    parts: Sequence[Part] = ()


Planner = Callable[[KernelMappings, Primitive], SweepPlan]


def plan_sweep(mappings: KernelMappings, primitive: Primitive) -> SweepPlan:
    """Sort what is mapped: by what /proc/kcore and the firmware call memory, and by what the primitive can read.

    Raises:
        Lost: this host does not say what is memory.
    """
    try:
        with Kcore() as kcore:
            layout = Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments)
            beside = beside_ram(mappings, kcore.ram, firmware_map())
            memory = union([*kcore.ram, *beside.memory])
            if primitive.by_kcore:
                zeroes = union([*zero_filled_intervals(kcore.page_flags, memory), *beside.memory])
                areas = ioremap_areas()
                readable, unread = read_plan(mappings, memory, kcore.segments, layout.vmemmap, zeroes, areas)
            else:
                columns = (mappings.runs[name].tolist() for name in ("va", "pa", "bytes"))
                readable, _ = clip([Piece(*row) for row in zip(*columns, strict=True)], memory)
                unread = []
            parts = parts_of(readable, kcore.page_flags, layout)
    except Undetermined as error:
        raise Lost(f"what is to be swept is not known: {error}") from None
    return SweepPlan(sorted(readable), unread, beside.device_pages, layout, parts)


def sweep(primitive: Primitive, plan: SweepPlan, pieces: Pieces) -> Sweep:
    """Read all that the plan has, and say where 16 bytes or more of the secret stand.

    Raises:
        Lost: it did not find a secret of our own that was planted for it.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        # Before the end of a chunk that many bytes are read again: no run is cut in two.
        buffer = stack.enter_context(LockedBuffer(_CHUNK + pieces.bytes + PAGE_SIZE))
        needles = stack.enter_context(LockedBuffer(_LINE * len(pieces.each)))
        for number, piece in enumerate(pieces.each):
            needles.view[_LINE * number : _LINE * number + PIECE] = piece
        seen = _Seen(primitive, plan, buffer, needles, pieces)
        seen.control()
        seen.read()
        ours = frames_at(buffer.va, buffer.size // PAGE_SIZE)
    _, never = clip([Piece(0, start, end - start) for start, end in frames_of(seen.unread)], frames_of(seen.done))
    runs = [run for run in _merged(seen.found) if run.pa // PAGE_SIZE not in ours]
    return Sweep(
        secret_bytes=pieces.bytes,
        bytes_read=seen.bytes,
        pages_unread=sum(-(-piece.bytes // PAGE_SIZE) for piece in never),
        device_pages=plan.device_pages,
        seconds=round(time.monotonic() - began, 3),
        longest=max((run.bytes for run in runs), default=0),
        runs=tuple(
            Run(va=Address(run.va), pa=Address(run.pa), bytes=run.bytes, region=plan.layout.name(run.va))
            for run in runs[:_MOST_RUNS]
        ),
        parts=tuple(plan.parts),
    )


class _Seen:
    """One sweep: what it read, and what it found."""

    def __init__(
        self, primitive: Primitive, plan: SweepPlan, buffer: LockedBuffer, needles: LockedBuffer, pieces: Pieces
    ) -> None:
        self._primitive, self._plan, self._buffer, self._needles = primitive, plan, buffer, needles
        self._pieces = pieces
        self.done: list[Piece] = []
        self.unread = list(plan.unread)
        self.found: list[Piece] = []
        self.bytes = 0

    def control(self) -> None:
        """Find the pieces in a page of our own, by the mapping that the plan has of it: each by itself."""
        with OwnPage() as page:
            for _ in range(_ATTEMPTS):
                frame = page.pfn()
                at = next((p for p in self._plan.readable if p.pa <= frame * PAGE_SIZE < p.pa + p.bytes), None)
                if at is None:
                    continue
                for number, piece in enumerate(self._pieces.each):
                    page.write(bytes(_LINE) + piece)
                    self._primitive.fill(at.va + frame * PAGE_SIZE - at.pa, self._buffer.view[:PAGE_SIZE])
                    if [found for found, _ in self._hits(PAGE_SIZE)] != [_LINE] or page.pfn() != frame:
                        break
                    if number == len(self._pieces.each) - 1:
                        return
        raise Lost("the sweep does not find what it planted in a page of its own")

    def read(self) -> None:
        """Read it all."""
        pieces = list(self._plan.readable)
        starts = [piece.va for piece in pieces]
        for va, size, again in chunks(pieces, self._pieces.bytes):
            if self._chunk(va, size, list(pieces_within(pieces, starts, va, size))):
                self.bytes += size - again

    def _chunk(self, va: int, size: int, parts: Sequence[Piece]) -> bool:
        """Search one stretch of addresses; False if it could not be read."""
        data = self._buffer.view[:size]
        try:
            self._primitive.fill(va, data)
        except Unreadable:
            self.unread += parts
            return False
        self.done += parts
        if not np.frombuffer(data, dtype=np.uint8).max():  # ``any`` takes ten times as long
            return True  # most of a host that was just booted
        for at, number in self._hits(size):
            start, end = self._pieces.around(data, at, number)
            if end - start >= SHORTEST_RUN:
                part = next(p for p in reversed(parts) if p.va <= va + start)
                self.found.append(Piece(va + start, part.pa + va + start - part.va, end - start))
        return True

    def _hits(self, size: int) -> Iterator[tuple[int, int]]:
        """Where a piece stands in the buffer's first bytes, and its number."""
        base = self._buffer.va
        for number in range(len(self._pieces.each)):
            at = base
            while (hit := find_bytes(at, base + size - at, self._needles.va + _LINE * number, PIECE)) is not None:
                yield hit - base, number
                at = hit + 1


def _merged(found: Sequence[Piece]) -> list[Piece]:
    """Runs by address, each once, and whole where a chunk had only a part."""
    runs: list[Piece] = []
    for run in sorted(found, key=lambda each: (each.va, -each.bytes)):
        if not runs or run.va >= runs[-1].va + runs[-1].bytes:
            runs.append(run)
    return runs
