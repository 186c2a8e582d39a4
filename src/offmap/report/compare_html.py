"""A comparison as one page of HTML: nothing is fetched, it reads without scripts, prints, and can be kept for years."""

from collections.abc import Sequence

from markupsafe import Markup

from offmap import __version__
from offmap.compare.cell_result import CellResult
from offmap.report.compare_views import compare_view
from offmap.report.html import asset, environment, policy_hash

__all__ = ["render_compare_html"]


def render_compare_html(results: Sequence[CellResult]) -> str:
    """The page, with the look and the security policy of the audit's."""
    style = asset("style.css") + asset("compare.css")
    script = asset("compare.js")
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            page=compare_view(results),
            version=__version__,
            style=Markup(style),
            style_hash=policy_hash(style),
            script=Markup(script),
            script_hash=policy_hash(script),
        )
    )
