"""The comparison's three reports: a page, the same in text for a repository, and JSON for programs."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from offmap.compare.cell_result import CellResult
from offmap.compare.report.document import compare_document
from offmap.compare.report.markdown import render_compare_markdown
from offmap.compare.report.page import page_of
from offmap.report.files import PUBLIC, replace_file
from offmap.report.html import render_page


def write_reports(out: Path, results: Sequence[CellResult]) -> list[Path]:
    """Write report.html, report.md and report.json into `out`, each whole or not at all; returns their paths.

    Raises:
        OffmapError: there is something else than a file of that name.
        KernelError: one cannot be written.
    """
    texts = {
        "report.html": render_compare_html(results),
        "report.md": render_compare_markdown(results),
        "report.json": msgspec.json.format(msgspec.json.encode(compare_document(results)), indent=1).decode() + "\n",
    }
    for name, text in texts.items():
        replace_file(out / name, text, PUBLIC)
    return [out / name for name in texts]


def render_compare_html(results: Sequence[CellResult]) -> str:
    """The page, with the look and the security policy of the audit's. It fetches nothing and reads without scripts."""
    return render_page("compare.html.j2", page_of(results), ["style.css", "compare.css"], "compare.js")
