"""The pictures of physical memory as the HTML template draws them: positions, texts, and the numbers for its script."""

from collections import Counter
from collections.abc import Sequence

from offmap.audit.report.hosts import HostReport
from offmap.audit.report.physmap import Look, Picture, Row, Shown, draw, shown_cells
from offmap.audit.report.text import KIND_NAMES
from offmap.audit.report.vm_view import View
from offmap.audit.result import AuditResult
from offmap.audit.verdict import Verdict
from offmap.units import format_size

LEFT = 130  # room for addresses; page.js has the same figures
PITCH = 24
_GAP = 16  # height of what was left out
_TAG_WIDTH = 64.0  # a cell this wide has its word in it
_MARKED = 6.0  # what is grave and narrower has a mark above it; page.js too
_MARKS = 48  # more of them would point at everything
_CLOSE_UP = 4  # times closer: as much is worth a second picture

NAMES = {
    Look.HIDDEN: "hidden",
    Look.UNKNOWN: "unknown",
    Look.ALIAS_OTHER: "alias, other region",
    Look.ALIAS_VMALLOC: "alias, vmalloc space",
    Look.ALIAS_IMAGE: "alias, kernel image",
    Look.DIRECT: "direct map",
    Look.BOTH: "direct map and alias",
}


def drawings(report: HostReport) -> list[View]:
    """The host's memory and, where its guests are small in it, a close-up; none without physical addresses."""
    ram = next((vm.physical.ram for vm in report.vms if vm.physical.ram), ())
    shown = shown_cells(report)
    if not shown:
        return []
    vms = {vm.pid: vm for vm in report.vms}
    whole = draw(shown, ram)
    found = []
    if whole is not None:
        text = "All of the host's physical memory. " if ram else "Where guest memory is. "
        found.append(_view(whole, vms, text + _scale(whole)))
    close = draw(shown, ()) if len(shown) > 1 else None  # one cell has nothing to see in it
    if whole is not None and close is not None and close.row_bytes * _CLOSE_UP <= whole.row_bytes:
        found.append(_view(close, vms, "The same, closer: only where guest memory is. " + _scale(close)))
    return found


def _scale(picture: Picture) -> str:
    return (
        f"Each row is {format_size(picture.row_bytes)}. A range is never drawn too small to be seen, and what is "
        "graver is drawn over what is less so; a small mark points at narrow ranges that are not hidden."
    )


def _view(picture: Picture, vms: dict[int, AuditResult], caption: str) -> View:
    rows: list[View] = []
    y = 0
    words = [_words(each, vms[each.pid]) for each in picture.shown]
    looks = [_look(each, vms[each.pid]) for each in picture.shown]
    tagged: set[int] = set()
    marks = {row.start: _marks(row, picture.shown) for row in picture.rows if not row.gap}
    if sum(map(len, marks.values())) > _MARKS:
        marks = {}
    for row in picture.rows:
        if row.gap:
            text = f"{format_size(row.end - row.start)} without guest memory" if not picture.ram else "no RAM"
            rows.append({"gap": True, "y": y, "text": f"{text} up to {row.end:#x}"})
            y += _GAP
            continue
        rows.append(
            {
                "gap": False,
                "y": y,
                "text": f"{row.start:#x}",
                "ram": [(LEFT + x, width) for x, width in row.ram],
                "pieces": [
                    {
                        "x": round(LEFT + piece.x, 2),
                        "width": piece.width,
                        "look": looks[piece.shown],
                        "at": piece.shown,
                        "title": words[piece.shown],
                    }
                    for piece in row.pieces
                ],
                "tags": _tags(row, picture.shown, vms, tagged),
                "marks": marks.get(row.start, []),
            }
        )
        y += PITCH
    drawn = [row for row in picture.rows if not row.gap]
    return {
        "caption": caption,
        "rows": rows,
        "height": y,
        "label": _label(picture, vms),
        "legend": _legend(picture, vms),
        "data": {
            "start": drawn[0].start,
            "end": drawn[-1].end,
            "ram": [list(span) for span in picture.ram],
            "cells": [
                [each.cell.pa, each.cell.bytes, look, each.look.gravity, text]
                for each, look, text in zip(picture.shown, looks, words, strict=True)
            ],
        },
    }


def _look(shown: Shown, vm: AuditResult) -> str:
    """The class in the style sheet. A cell without a mapping is drawn as hidden only if the whole VM is hidden."""
    if shown.look is Look.HIDDEN and vm.verdict is not Verdict.HIDDEN:
        return "unmapped"
    return shown.look.value


def _name(shown: Shown, vm: AuditResult) -> str:
    return "no mapping found" if _look(shown, vm) == "unmapped" else NAMES[shown.look]


def _words(shown: Shown, vm: AuditResult) -> str:
    """All about one cell in a line."""
    cell = shown.cell
    parts = [
        f"{cell.pa:#x} to {cell.pa + cell.bytes - 1:#x}, {format_size(cell.bytes)}",
        f"{_name(shown, vm)}",
        f"{vm.process} ({vm.pid}), {cell.guest_pages:,} of its pages",
    ]
    for name, pages in (
        ("in the direct map", cell.direct_map_pages),
        ("aliased", cell.alias_pages),
        ("unknown", cell.unknown_pages),
        ("without a mapping", cell.unmapped_pages),
    ):
        if pages and pages != cell.guest_pages:
            parts.append(f"{pages:,} {name}")
    if kinds := [KIND_NAMES.get(kind, kind) for kind in cell.kinds]:
        parts.append("mapped by " + ", ".join(kinds))
    return "; ".join(parts)


def _tags(row: Row, shown: Sequence[Shown], vms: dict[int, AuditResult], tagged: set[int]) -> list[View]:
    """Words inside cells that have room for them and that nothing graver is drawn over; one for each cell."""
    tags: list[View] = []
    taken: list[tuple[float, float]] = []
    for piece in reversed(row.pieces):
        each = shown[piece.shown]
        free = all(piece.x + piece.width <= a or piece.x >= b for a, b in taken)
        taken.append((piece.x, piece.x + piece.width))
        if piece.shown not in tagged and piece.width >= _TAG_WIDTH + 16 * (each.look is Look.BOTH) and free:
            tagged.add(piece.shown)
            if _look(each, vms[each.pid]) == "unmapped":
                word = "not mapped"
            else:
                word = "direct+alias" if each.look is Look.BOTH else NAMES[each.look].partition(",")[0]
            tags.append({"x": round(LEFT + piece.x + piece.width / 2, 1), "text": word})
    return tags


def _marks(row: Row, shown: Sequence[Shown]) -> list[float]:
    """Where small marks point at what is grave and narrow; not so many that they hide one another."""
    marks: list[float] = []
    grave = (piece for piece in row.pieces if shown[piece.shown].look is not Look.HIDDEN)
    for x in sorted(piece.x + piece.width / 2 for piece in grave if piece.width < _MARKED):
        if not marks or x - marks[-1] >= _MARKED:
            marks.append(x)
    return [round(LEFT + x, 2) for x in marks]


def _legend(picture: Picture, vms: dict[int, AuditResult]) -> list[View]:
    """What is in the picture, the gravest first."""
    counts = Counter(
        (-each.look.gravity, _look(each, vms[each.pid]), _name(each, vms[each.pid])) for each in picture.shown
    )
    legend: list[View] = [
        {"look": look, "name": name, "count": f"{count:,} range{'' if count == 1 else 's'}"}
        for (_, look, name), count in sorted(counts.items())
    ]
    if picture.ram:
        legend.append({"look": "ram", "name": "other RAM, not of an audited guest", "count": ""})
    return legend


def _label(picture: Picture, vms: dict[int, AuditResult]) -> str:
    counts = Counter(_name(each, vms[each.pid]) for each in picture.shown)
    return "Physical memory: " + ", ".join(f"{count} ranges {name}" for name, count in counts.items())
