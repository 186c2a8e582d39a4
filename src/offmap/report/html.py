"""An audit as one page of HTML: nothing is fetched, it reads without scripts, prints, and can be kept for years.

Everything in it that came from a host (process names, paths, the kernel's command line) is escaped by the templates,
which escape whatever they are given. The page's own Content-Security-Policy allows its one style sheet and its one
script, by their hashes, and nothing else: were an escape forgotten, a browser would still not obey what got in.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from offmap import __version__
from offmap.report.hosts import HostReport
from offmap.report.views import page_view

__all__ = ["render_html", "render_page"]


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("offmap.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def _asset(name: str) -> str:
    return files("offmap.report").joinpath("templates", name).read_text(encoding="utf-8")


def _policy_hash(text: str) -> str:
    """As Content-Security-Policy wants it (W3C CSP3, section 2.3.1, hash-source)."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render_page(template: str, page: object, styles: Sequence[str], script: str) -> str:
    """A whole page: its style sheets as one and its script in it, each allowed by its hash.

    Args:
        template, styles, script: by their names in ``templates/``.
        page: what the template shows.
    """
    style, code = "".join(map(_asset, styles)), _asset(script)
    return (
        _environment()
        .get_template(template)
        .render(
            page=page,
            version=__version__,
            style=Markup(style),
            style_hash=_policy_hash(style),
            script=Markup(code),
            script_hash=_policy_hash(code),
        )
    )


def render_html(reports: Sequence[HostReport]) -> str:
    """The page: of one VM, of a host's, or of many hosts'."""
    return render_page("audit.html.j2", page_view(reports), ["style.css"], "page.js")
