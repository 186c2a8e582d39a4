"""The comparison's three reports: a page, the same in text for a repository, and JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path

from offmap.compare.cell_result import CellResult
from offmap.compare.report.document import compare_document
from offmap.compare.report.html import render_compare_html
from offmap.compare.report.markdown import render_compare_markdown
from offmap.report.files import PUBLIC, replace_file

__all__ = ["write_reports"]


def write_reports(out: Path, results: Sequence[CellResult]) -> list[Path]:
    """Write report.html, report.md and report.json into `out`, each whole or not at all; returns their paths.

    Raises:
        OffmapError: there is something else than a file of that name.
        KernelError: one cannot be written.
    """
    texts = {
        "report.html": render_compare_html(results),
        "report.md": render_compare_markdown(results),
        "report.json": json.dumps(compare_document(results), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        replace_file(out / name, text, PUBLIC)
    return [out / name for name in texts]
