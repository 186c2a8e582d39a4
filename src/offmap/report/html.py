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

__all__ = ["asset", "environment", "policy_hash", "render_html"]


@cache
def environment() -> Environment:
    return Environment(
        loader=PackageLoader("offmap.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def asset(name: str) -> str:
    return files("offmap.report").joinpath("templates", name).read_text(encoding="utf-8")


def policy_hash(text: str) -> str:
    """As Content-Security-Policy wants it (W3C CSP3, section 2.3.1, hash-source)."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render_html(reports: Sequence[HostReport]) -> str:
    """The page: of one VM, of a host's, or of many hosts'."""
    style, script = asset("style.css"), asset("page.js")
    return (
        environment()
        .get_template("audit.html.j2")
        .render(
            page=page_view(reports),
            version=__version__,
            style=Markup(style),
            style_hash=policy_hash(style),
            script=Markup(script),
            script_hash=policy_hash(script),
        )
    )
