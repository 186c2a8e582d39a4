"""A comparison as one page of HTML: nothing is fetched, it reads without scripts, prints, and can be kept for years."""

from collections.abc import Sequence

from offmap.compare.cell_result import CellResult
from offmap.compare.report.views import compare_view
from offmap.report.html import render_page

__all__ = ["render_compare_html"]


def render_compare_html(results: Sequence[CellResult]) -> str:
    """The page, with the look and the security policy of the audit's."""
    return render_page("compare.html.j2", compare_view(results), ["style.css", "compare.css"], "compare.js")
