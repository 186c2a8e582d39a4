"""How the comparison's answers are written: words and symbols for people, the same in HTML and in Markdown."""

from dataclasses import dataclass
from statistics import median

from offmap.compare.cell_result import CellResult
from offmap.compare.questions import Answer, Better, Kind, Question, Ratio

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as it is shown.

    Attributes:
        look: yes, no, unknown or number: for colours, which never stand alone.
        symbol, word: of a yes, a no or "not determined"; a number has no symbol.
        more: the ratio to plain RAM, where there is one.
    """

    look: str
    symbol: str
    word: str
    more: str = ""


def said(asked: Question, answer: Answer) -> Said:
    """For a table."""
    if answer.value is None:
        word = "not measured" if answer.reason.startswith("not measured") else "not determined"
        return Said("unknown", "?", word)
    if asked.kind is Kind.TRI_STATE:
        plain = asked.better is Better.NEITHER
        if answer.value:
            return Said("either" if plain else "yes", "✓", "yes")
        return Said("either" if plain else "no", "✗", "no")
    more = ""
    if answer.ratio is not None:
        more = against(answer.ratio)
    elif answer.baseline:  # too few for a ratio
        count = min(len(answer.samples), len(answer.baseline))
        often = f"{count} pairs only" if count > 1 else "once each"
        more = f"plain {number(median(answer.baseline))}, {often}"
    return Said("number", "", number(float(answer.value)), more)


def against(ratio: Ratio) -> str:
    """``x0.15 (0.14 to 0.16)``: the median, and the quartiles."""
    return f"{TIMES}{number(ratio.median)} ({number(ratio.low)} to {number(ratio.high)})"


def number(value: float) -> str:
    """Three significant digits; whole numbers whole, with their thousands apart."""
    if value == int(value) or abs(value) >= 100:
        return f"{round(value):,}"
    digits = f"{value:.3g}"
    return f"{float(digits):.2f}" if 1 <= abs(value) < 10 else digits


def short_kernel(name: str) -> str:
    """A kernel as a heading: a path by its last part."""
    return name.rpartition("/")[2] or name


def release_of(cell: CellResult) -> str:
    """What uname says on its host; empty if that never came up and was not known before."""
    return cell.host.kernel or cell.inputs.get("host_release", "")
