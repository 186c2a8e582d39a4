"""Audits as one page of HTML."""

from collections.abc import Sequence

from offmap.audit.report.hosts import HostReport
from offmap.audit.report.views import page_view
from offmap.report.html import render_page


def render_html(reports: Sequence[HostReport]) -> str:
    """The page: of one VM, of a host's, or of many hosts'."""
    return render_page("audit.html.j2", page_view(reports), ["style.css"], "page.js", "offmap.audit.report")
