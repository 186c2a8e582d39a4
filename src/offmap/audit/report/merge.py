"""Merge the results of many hosts. Each file is checked; one that cannot be trusted is refused with the reason.

Results of different versions of offmap can be merged if they have the same schema.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from offmap import __version__
from offmap.audit.report.hosts import HostReport, parse_report, schema_of
from offmap.audit.result_sets import Merged
from offmap.audit.verdict import exit_status_of, worst
from offmap.errors import OffmapError
from offmap.report.typed import Malformed, parse_json, plain

MERGED = schema_of(Merged)
_MOST = 256 << 20  # bytes of one file; lists in a result are cut long before


class Damaged(OffmapError):
    """Files cannot be merged; ``reasons`` has a line for each."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        count = len(reasons)
        super().__init__(f"nothing was merged: {count} result{'s' * (count > 1)} cannot be used", "audit there again")


def read_reports(paths: Iterable[Path]) -> list[HostReport]:
    """Read results, each of one host, or merged before.

    Raises:
        Damaged: at least one cannot be used. A report that leaves a host out would be taken for one of all hosts.
    """
    reports: list[HostReport] = []
    reasons: list[str] = []
    seen: dict[tuple[str, int], str] = {}
    for path in paths:
        try:
            found = list(_parse(_load(path), plain(str(path))))
        except Malformed as error:
            reasons.append(plain(f"{path}: {error}"))
            continue
        except OSError as error:
            reasons.append(plain(f"{path}: {error.strerror or error}"))
            continue
        for report in found:
            for pid in [vm.pid for vm in report.vms] + [failure.pid for failure in report.not_audited]:
                other = seen.get((report.host.name, pid))
                seen[report.host.name, pid] = report.source
                if other is not None:
                    reasons.append(plain(f"{path}: VM {pid} of host {report.host.name} is in {other} too; keep one"))
        reports += found
    if reasons:
        raise Damaged(reasons)
    return reports


def _load(path: Path) -> object:
    with path.open("rb") as file:
        text = file.read(_MOST + 1)
    if not text.strip():
        raise Malformed("is empty")
    if len(text) > _MOST:
        raise Malformed(f"is larger than {_MOST >> 20} MiB")
    return parse_json(text)


def _parse(document: object, source: str) -> Iterable[HostReport]:
    if isinstance(document, dict) and document.get("schema") == MERGED:
        parts = document.get("reports")
        if not isinstance(parts, list) or not all(isinstance(part, dict) and "result" in part for part in parts):
            raise Malformed("is a merged report without a list of reports")
        for part in parts:
            yield parse_report(part["result"], plain(str(part.get("source") or source)))
    else:
        yield parse_report(document, source)


def merged_json(reports: Sequence[HostReport], time: str) -> dict[str, object]:
    """The merged result, ready for json.dumps; each host's own stands in it word for word."""
    verdict = worst(report.verdict for report in reports)
    merged = Merged(__version__, time, verdict, exit_status_of(verdict), ())
    return merged.to_json() | {"reports": [{"source": report.source, "result": report.document} for report in reports]}
