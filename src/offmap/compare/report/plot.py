"""The plots of costs: each pair's ratio to plain RAM as a dot, the median and quartiles marked, and a line at 1.

Worked out here as plain numbers in the picture's own units; the template only writes them down.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offmap.compare.cell_result import CellResult
from offmap.compare.questions import Answer, Better, Question
from offmap.compare.report.status import Status, status_of
from offmap.compare.report.words import TIMES, against, number

LEFT, WIDTH, RIGHT = 160, 290, 190
ROW, TOP = 22, 8
_MARGIN = 1.06  # beyond the farthest dot, as a factor
_NARROWEST = 1.25  # a scale that shows less than ±25 % would make noise look like news
_TICKS = (1, 2, 5)
_FEW = 1.6  # spans of less than this factor have ticks in steps of a tenth


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float

    def x(self, ratio: float) -> float:
        """A ratio's place: logarithmic, so that half and twice are as far from 1."""
        share = math.log(ratio / self.low) / math.log(self.high / self.low)
        return round(LEFT + WIDTH * share, 1)


@dataclass(frozen=True, slots=True)
class PlotRow:
    """One kind: each pair as a dot (its place and its text), the median and the quartiles."""

    y: float
    name: str
    hides: bool
    text: str
    dots: list[tuple[float, str]]
    median: float | None = None
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture: `one` is the place of ratio 1, `ticks` are the places on the scale and their texts."""

    title: str
    way: str
    height: int
    bottom: int
    one: float
    ticks: list[tuple[float, str]]
    rows: list[PlotRow]
    width: int = LEFT + WIDTH + RIGHT
    left: int = LEFT
    right: int = LEFT + WIDTH


def ratio_plot(asked: Question, cells: Sequence[CellResult]) -> Plot | None:
    """For the template; None where not one pair was measured.

    Args:
        cells: of one setting, in the order of the rows.
    """
    answers = [(cell, cell.answer(asked.id)) for cell in cells]
    if not any(answer.ratio is not None for _, answer in answers):
        return None
    scale = _scale(ratio for _, answer in answers for ratio in _ratios(answer))
    height = TOP + ROW * len(answers)
    return Plot(
        asked.title,
        _way(asked),
        height + 20,
        height,
        scale.x(1.0),
        [(scale.x(tick), f"{TIMES}{tick:g}") for tick in _ticks(scale)],
        [_row(at, cell, answer, scale) for at, (cell, answer) in enumerate(answers)],
    )


def _way(asked: Question) -> str:
    return {
        Better.LOWER: "less is better: left of the line",
        Better.HIGHER: "more is better: right of the line",
        Better.NEITHER: "",
    }[asked.better]


def _ratios(answer: Answer) -> list[float]:
    """Of each pair; without a spread (`Answer.ratio`) none is drawn."""
    if answer.ratio is None:
        return []
    pairs = zip(answer.samples, answer.baseline, strict=False)
    return [mine / plain for mine, plain in pairs if plain > 0 and mine > 0]


def _scale(ratios: Iterable[float]) -> _Scale:
    drawn = [*ratios, 1.0]
    return _Scale(min(*drawn, 1 / _NARROWEST) / _MARGIN, max(*drawn, _NARROWEST) * _MARGIN)


def _ticks(scale: _Scale) -> list[float]:
    if scale.high / scale.low < _FEW**2:
        steps = [round(tenth / 10, 1) for tenth in range(1, 31) if tenth % 2 == 0]
    else:
        steps = [step * 10.0**power for power in range(-4, 5) for step in _TICKS]
    inside = [step for step in steps if scale.low <= step <= scale.high]
    while len(inside) > 6:
        inside = [step for step in inside if step == 1 or inside.index(step) % 2 == inside.index(1) % 2]
    return inside


def _row(at: int, cell: CellResult, answer: Answer, scale: _Scale) -> PlotRow:
    y = TOP + ROW * at + ROW / 2
    name, hides, ratio = cell.spec.backend, status_of(cell) is Status.HIDES, answer.ratio
    if ratio is None:
        text = "not measured" if answer.value is None else f"{number(float(answer.value))}; no spread"
        return PlotRow(y, name, hides, text, [])
    return PlotRow(
        y,
        name,
        hides,
        against(ratio),
        [(scale.x(one), f"{TIMES}{number(one)}") for one in _ratios(answer)],
        scale.x(ratio.median) if ratio.median > 0 else None,
        scale.x(max(ratio.low, scale.low)),
        scale.x(max(ratio.high, scale.low)),
    )
