"""A comparison as Markdown, for a repository: the answers of the page, without its plots."""

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from offmap.compare.cell_result import CellResult
from offmap.compare.report.page import page_of
from offmap.report.typed import plain

_SPECIAL = str.maketrans({**{mark: f"\\{mark}" for mark in "\\`*_[]|"}, "<": "&lt;", ">": "&gt;"})


def render_compare_markdown(results: Sequence[CellResult]) -> str:
    """The text; ends with a newline."""
    environment = Environment(
        loader=PackageLoader("offmap.report"),
        autoescape=True,  # makes Markup of what macros return, which is not escaped twice
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("compare.md.j2").render(page=page_of(results))


def _escaped(value: object) -> Markup:
    """One line, of which nothing is taken for Markdown or HTML."""
    if isinstance(value, Markup):
        return value
    return Markup(plain(" ".join(str(value).split())).translate(_SPECIAL))
