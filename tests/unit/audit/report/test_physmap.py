"""The geometry of the picture: everything is in it once, the grave can be seen, and the size is bounded."""

from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.reach import PhysicalCell
from offmap.audit.report.hosts import parse_report
from offmap.audit.report.physmap import CELLS, NARROWEST, WIDTH, Look, Shown, draw, look_of, shown_cells
from offmap.report.typed import decode

from .samples import PAGE, cell, every_vm, exposed, vm

TIB = 1 << 40


def shown(pa: int, size: int, look: Look = Look.HIDDEN) -> Shown:
    return Shown(decode(PhysicalCell, cell(pa, size)), 1, look)


def test_looks() -> None:
    def look(kinds: list[str], direct: int = 0, alias: int = 0, unknown: int = 0) -> Look:
        return look_of(
            decode(PhysicalCell, cell(0, 8 * PAGE, direct=direct, alias=alias, unknown=unknown) | {"kinds": kinds})
        )

    assert look([]) is Look.HIDDEN
    assert look([], unknown=1) is Look.UNKNOWN
    assert look(["direct_map"], direct=1, unknown=1) is Look.DIRECT
    assert look(["direct_map", "vmap"], direct=1, alias=1) is Look.BOTH
    assert look(["vmap"], alias=1) is Look.ALIAS_VMALLOC
    assert look(["fixmap", "kernel_image"], alias=1) is Look.ALIAS_IMAGE
    assert look(["something of a later version"], alias=1) is Look.ALIAS_OTHER
    assert look([], alias=1) is Look.ALIAS_OTHER


def test_what_a_secret_speaks_against_is_not_drawn_as_hidden() -> None:
    assert look_of(decode(PhysicalCell, cell(0, PAGE)), contradicted=True) is Look.UNKNOWN


def test_one_page_in_a_terabyte_can_be_seen_and_lies_on_top() -> None:
    cells = (shown(16 << 30, 4 << 30), shown(17 << 30, PAGE, Look.DIRECT))
    picture = draw(cells, [(0, TIB)])
    assert picture is not None and len(picture.rows) == 16
    (row,) = [row for row in picture.rows if any(piece.shown == 1 for piece in row.pieces)]
    assert row.pieces[-1].shown == 1 and row.pieces[-1].width == NARROWEST


def test_gaps_are_left_out() -> None:
    picture = draw((shown(0, 1 << 20), shown(TIB, 1 << 20)), ())
    assert picture is not None
    assert [row.gap for row in picture.rows].count(True) == 1 and len(picture.rows) <= 33
    assert draw((), ()) is None


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 24), st.sampled_from(list(Look))),
        min_size=1,
        max_size=40,
    )
)
def test_every_cell_is_drawn_within_the_rows(parts: list[tuple[int, int, Look]]) -> None:
    cells = [shown(pa * PAGE, pages * PAGE, look) for pa, pages, look in sorted(parts, key=lambda part: part[0])]
    picture = draw(cells, ())
    assert picture is not None
    rows = [row for row in picture.rows if not row.gap]
    assert len(rows) <= 24
    assert {piece.shown for row in rows for piece in row.pieces} == set(range(len(cells)))
    for row in picture.rows:
        assert row.start < row.end
        gravities = [cells[piece.shown].look.gravity for piece in row.pieces]
        assert gravities == sorted(gravities)
        for piece in row.pieces:
            assert piece.x >= -0.01 and piece.x + piece.width <= WIDTH + 0.01 and piece.width >= NARROWEST
    assert [row.start for row in picture.rows] == sorted(row.start for row in picture.rows)


def test_too_many_cells_are_put_together_and_none_is_lost() -> None:
    many = [cell(number * 3 * PAGE, PAGE, direct=int(number == 7777)) for number in range(10_000)]
    document = exposed(1)
    document["physical"] = {"ram": [], "cell_bytes": None, "cells": many}
    report = parse_report(every_vm(document, vm(2)))
    cells = shown_cells(report)
    assert len(cells) <= CELLS
    mine = [each for each in cells if each.pid == 1]
    assert sum(each.cell.guest_pages for each in mine) == 10_000
    (grave,) = [each for each in mine if each.look is Look.DIRECT]
    assert grave.cell.pa <= 7777 * 3 * PAGE < grave.cell.pa + grave.cell.bytes
    assert [each.cell.bytes for each in cells if each.pid == 2] == [65536 * PAGE]
