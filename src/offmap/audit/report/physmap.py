"""The picture of a host's physical memory: rows of equal spans, a cell for each range, coloured by what reaches it.

Pure geometry: numbers in, numbers out; ``html`` draws them, and its script draws the same when somebody zooms.
Nothing grave may drown in the scale. So a cell is never drawn narrower than NARROWEST, what is graver is drawn over
what is less so, and where cells must be put together the graver one gives the colour.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import msgspec

from offmap.audit.reach import Kind, PhysicalCell
from offmap.audit.readable import union
from offmap.audit.report.hosts import HostReport

WIDTH = 1000.0
"""Of a row, in the units of the drawing."""

NARROWEST = 2.5
_MOST_ROWS = 24
_LEAST_ROW = 1 << 16
CELLS = 3000
"""Cells of one picture; more are put together."""


class Look(Enum):
    """How a cell looks, in order of gravity. The value is its class in the page's style sheet."""

    HIDDEN = "hidden"
    UNKNOWN = "unknown"
    ALIAS_OTHER = "alias-other"  # modules, fixmap, cpu_entry_area, EFI, …
    ALIAS_VMALLOC = "alias-vmalloc"  # vmalloc, vmap, memremap
    ALIAS_IMAGE = "alias-image"
    DIRECT = "direct"
    BOTH = "both"  # the direct map and an alias

    @property
    def gravity(self) -> int:
        return list(Look).index(self)


_VMALLOC_KINDS = {"vmalloc", "vmap", "memremap", "ioremap", "vmalloc_space"}


@dataclass(frozen=True)
class Shown:
    """A cell of the picture: of which VM, and how it looks."""

    cell: PhysicalCell
    pid: int
    look: Look


@dataclass(frozen=True)
class Piece:
    """The part of a cell that lies in one row. ``shown`` is its place in Picture.shown."""

    x: float
    width: float
    shown: int


@dataclass(frozen=True)
class Row:
    """A span of physical addresses, or a gap without RAM that was left out.

    Attributes:
        start, end: physical addresses.
        gap: nothing is there; drawn as a thin line.
        ram: (x, width) of what the host calls RAM.
        pieces: the least grave first, to be drawn in this order.
    """

    start: int
    end: int
    gap: bool
    ram: tuple[tuple[float, float], ...] = ()
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Rows from the lowest address to the highest."""

    rows: tuple[Row, ...]
    row_bytes: int
    shown: tuple[Shown, ...]
    ram: tuple[tuple[int, int], ...]


def look_of_kind(kind: str) -> Look:
    """How a mapping of this kind looks."""
    if kind == Kind.DIRECT_MAP:
        return Look.DIRECT
    if kind == "kernel_image":
        return Look.ALIAS_IMAGE
    return Look.ALIAS_VMALLOC if kind in _VMALLOC_KINDS else Look.ALIAS_OTHER


def look_of(cell: PhysicalCell, contradicted: bool = False) -> Look:
    """How a cell looks: as the gravest that is in it."""
    if cell.mapped_pages:
        if cell.direct_map_pages:
            return Look.BOTH if cell.alias_pages else Look.DIRECT
        kinds = [kind for kind in cell.kinds if kind != Kind.DIRECT_MAP]
        return max(map(look_of_kind, kinds), key=lambda look: look.gravity, default=Look.ALIAS_OTHER)
    return Look.UNKNOWN if cell.unknown_pages or contradicted else Look.HIDDEN


def shown_cells(report: HostReport, most: int = CELLS) -> tuple[Shown, ...]:
    """The cells of all VMs in order of address; neighbours are put together until there are at most `most`."""
    cells = [Shown(cell, vm.pid, look_of(cell, vm.contradicted)) for vm in report.vms for cell in vm.physical.cells]
    cells.sort(key=lambda shown: (shown.cell.pa, shown.pid))
    grain = _LEAST_ROW
    while len(cells) > most:
        cells = _together(cells, grain)
        grain *= 2
    return tuple(cells)


def _together(cells: Iterable[Shown], grain: int) -> list[Shown]:
    """Cells of one VM that begin in the same `grain` bytes, made one that has the graver look."""
    found: list[Shown] = []
    open_cells: dict[int, int] = {}  # by PID: the one that may still grow
    for each in cells:
        at = open_cells.get(each.pid)
        if at is not None and found[at].cell.pa // grain == each.cell.pa // grain:
            found[at] = _joined(found[at], each)
        else:
            open_cells[each.pid] = len(found)
            found.append(each)
    return found


def _joined(one: Shown, other: Shown) -> Shown:
    a, b = one.cell, other.cell
    end = max(a.pa + a.bytes, b.pa + b.bytes)
    cell = msgspec.structs.replace(
        a,
        bytes=end - a.pa,
        guest_pages=a.guest_pages + b.guest_pages,
        direct_map_pages=a.direct_map_pages + b.direct_map_pages,
        alias_pages=a.alias_pages + b.alias_pages,
        mapped_pages=a.mapped_pages + b.mapped_pages,
        unknown_pages=a.unknown_pages + b.unknown_pages,
        unmapped_pages=a.unmapped_pages + b.unmapped_pages,
        kinds=tuple(dict.fromkeys(a.kinds + b.kinds)),
    )
    return Shown(cell, one.pid, max(one.look, other.look, key=lambda look: look.gravity))


def draw(shown: Sequence[Shown], ram: Sequence[tuple[int, int]]) -> Picture | None:
    """Lay cells out, with the host's RAM behind them; None if there is nothing to draw.

    Args:
        shown: in order of address.
        ram: (start, end) of what the host calls RAM; empty for a close-up of the guests' memory alone.
    """
    every = [*ram, *((each.cell.pa, each.cell.pa + each.cell.bytes) for each in shown)]
    spans = union(span for span in every if span[0] < span[1])
    if not spans:
        return None
    row_bytes = _LEAST_ROW
    while len(_rows_in_use(spans, row_bytes)) > _MOST_ROWS:
        row_bytes *= 2
    rows: list[Row] = []
    last = _rows_in_use(spans, row_bytes)[0]
    for number in _rows_in_use(spans, row_bytes):
        if number > last + 1:
            rows.append(Row((last + 1) * row_bytes, number * row_bytes, gap=True))
        last = number
        start, end = number * row_bytes, (number + 1) * row_bytes
        behind = tuple(_place(max(a, start), min(b, end), start, row_bytes) for a, b in ram if a < end and b > start)
        pieces = [
            Piece(*_place(max(each.cell.pa, start), min(each.cell.pa + each.cell.bytes, end), start, row_bytes), at)
            for at, each in enumerate(shown)
            if each.cell.pa < end and each.cell.pa + each.cell.bytes > start
        ]
        pieces.sort(key=lambda piece: (shown[piece.shown].look.gravity, piece.x))
        rows.append(Row(start, end, False, behind, tuple(_seen(piece) for piece in pieces)))
    return Picture(tuple(rows), row_bytes, tuple(shown), tuple(ram))


def _place(start: int, end: int, row: int, row_bytes: int) -> tuple[float, float]:
    return round((start - row) / row_bytes * WIDTH, 2), round((end - start) / row_bytes * WIDTH, 2)


def _seen(piece: Piece) -> Piece:
    """Wide enough to be seen, and not over the end of the row."""
    width = max(piece.width, NARROWEST)
    return replace(piece, x=min(piece.x, WIDTH - width), width=width)


def _rows_in_use(spans: Iterable[tuple[int, int]], row_bytes: int) -> list[int]:
    """Numbers of the rows that a span lies in; at most a few more than would be drawn."""
    numbers: dict[int, None] = {}
    for start, end in spans:
        for number in range(start // row_bytes, (end - 1) // row_bytes + 1):
            numbers[number] = None
            if len(numbers) > _MOST_ROWS:
                return list(numbers)
    return list(numbers)
