"""One page of HTML: it fetches nothing, reads without scripts, prints, and can be kept for years.

The templates escape whatever they are given: process names, paths and command lines come from hosts. The page's own
Content-Security-Policy allows its one style sheet and its one script, by their hashes, and nothing else. Were an escape
forgotten, a browser would still not obey what got in.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from offmap import __version__

_SHARED = "offmap.report"


@cache
def _templates(package: str) -> tuple[Environment, ChoiceLoader]:
    """Finds templates, style sheets and scripts. The package's own files come before the shared ones."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader(_SHARED)])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True), loader


def _policy_hash(text: str) -> str:
    """A hash in the form of Content-Security-Policy (W3C CSP3, section 2.3.1, hash-source)."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render_page(template: str, page: object, styles: Sequence[str], script: str, package: str = _SHARED) -> str:
    """A page with its style sheets (as one) and its script inside. The policy allows each by its hash.

    Args:
        template, styles, script: by their names in ``templates/`` of the package, or in the one that all reports share.
        page: what the template shows.
    """
    environment, loader = _templates(package)
    style = "".join(loader.get_source(environment, name)[0] for name in styles)
    code = loader.get_source(environment, script)[0]
    return environment.get_template(template).render(
        page=page,
        version=__version__,
        style=Markup(style),
        style_hash=_policy_hash(style),
        script=Markup(code),
        script_hash=_policy_hash(code),
    )
