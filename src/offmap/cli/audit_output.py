"""Where ``offmap audit`` puts what it found: standard output as text or JSON, an HTML page, Prometheus's metrics.

An audit that fails says so in the files too: what an earlier one had called hidden must not stand there as if it still
were so.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offmap import __version__
from offmap.errors import ExitStatus, OffmapError
from offmap.log import Logger

if TYPE_CHECKING:
    from offmap.audit.report.hosts import HostReport

_log = Logger("offmap.cli.audit")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how results are shown."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON (of the schema that --json-schema prints)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page for people, complete in one file")
    parser.add_argument(
        "--prometheus",
        type=Path,
        metavar="FILE",
        help="also write metrics for node_exporter's textfile collector (a failed audit writes that it failed)",
    )
    parser.add_argument("--no-color", action="store_true", help="no colours, even on a terminal")


def add_without_audit(which: "argparse._MutuallyExclusiveGroup") -> None:
    """Add what can be asked for in the place of an audit."""
    which.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="make one report of the JSON results of many hosts; the exit status is the worst",
    )
    which.add_argument("--json-schema", action="store_true", help="print the JSON Schema of what --json prints")


class Output:
    """What the options ask for.

    Args:
        args: of add_output_options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.json: bool = args.json
        self._html: Path | None = args.html
        self._prometheus: Path | None = args.prometheus
        # https://no-color.org: any value that is not empty.
        self.color = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")

    def show(self, document: dict[str, object], also: "Callable[[HostReport], None] | None" = None) -> None:
        """Print one result, of one VM or of all of this host, and write the files.

        Args:
            also: writes one more of it.

        Raises:
            OffmapError: a file cannot be written; the result was printed all the same.
        """
        from offmap.audit.report.hosts import AUDIT, parse_report
        from offmap.audit.report.text import render_fleet, render_vm
        from offmap.report.typed import Malformed

        with self.recording_failure():
            try:
                report = parse_report(document)
            except Malformed as error:
                raise OffmapError(f"the audit's result contradicts itself: {error}", "report this as a bug") from None
            if self.json:
                print(json.dumps(document, indent=2), flush=True)
            elif report.schema == AUDIT:
                print(render_vm(report.vms[0], self.color), flush=True)
            else:
                print(render_fleet([report], self.color), flush=True)
        self.write_files([report])
        if also is not None:
            also(report)

    def write_files(self, reports: Sequence["HostReport"], merged: bool = False) -> None:
        """Write the metrics and the page, where they were asked for. Raises OffmapError: a file cannot be written."""
        from offmap.report.files import PRIVATE, PUBLIC, replace_file

        if self._prometheus is not None:
            from offmap.audit.report.prometheus import render_prometheus

            replace_file(self._prometheus, render_prometheus(reports, merged), PUBLIC)
        if self._html is not None:
            from offmap.audit.report.html import render_html

            replace_file(self._html, render_html(reports), PRIVATE)

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Whatever ends the audit inside without a result, SIGTERM too, the files say that there is none."""
        if self._html is self._prometheus is None:
            yield
            return
        with _sigterm_raises():
            # First of all: one that is killed leaves this, and not what an earlier audit said.
            try:
                self._write_no_result("an audit is in progress: there is no verdict yet")
            except OffmapError:
                self._remove_files()  # that the result cannot be written either is an error then
            try:
                yield
            except BaseException as error:
                try:
                    self._write_no_result(f"the audit failed: {str(error) or type(error).__name__}")
                except OffmapError as another:  # the first error is the one to end with
                    _log.warning("%s", another)
                raise

    def _remove_files(self) -> None:
        """Remove what cannot be replaced, on a full disk for one: no file is better than an old verdict."""
        for path in (self._prometheus, self._html):
            if path is not None and path.is_file():
                with contextlib.suppress(OSError):
                    # Of a symbolic link, what it leads to: that is what others read, and what is replaced.
                    Path(os.path.realpath(path)).unlink()

    def _write_no_result(self, reason: str) -> None:
        from offmap.audit.host import HostFacts, host_facts, utc_now
        from offmap.audit.report.hosts import failed_report
        from offmap.report.typed import decode, plain

        host = decode(HostFacts, host_facts().to_json())
        self.write_files([failed_report(__version__, utc_now(), host, plain(reason))])


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM (of systemd, when an audit takes too long) ends what is inside as an exception, unless that is set up."""

    def stop(_number: int, _frame: object) -> None:
        raise SystemExit(ExitStatus.FAILED)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def print_schema() -> int:
    """What ``--json-schema`` asks for."""
    from offmap.audit.evidence.verify import DOCUMENTS
    from offmap.audit.result_sets import audit_schema
    from offmap.audit.trace.result import Traced

    print(json.dumps(audit_schema((*DOCUMENTS, Traced)), indent=2), flush=True)
    return ExitStatus.DONE


def merge(paths: Sequence[Path], output: Output) -> int:
    """Make one report of the results in these files; the exit status is the worst's.

    Raises:
        OffmapError: a file cannot be used; standard error says why, in a line for each.
    """
    from offmap.audit.host import utc_now
    from offmap.audit.report.merge import Damaged, merged_json, read_reports
    from offmap.audit.report.text import render_fleet
    from offmap.audit.verdict import exit_status_of, worst

    with output.recording_failure():
        try:
            reports = read_reports(paths)
        except Damaged as error:
            for reason in error.reasons:
                _log.warning("%s", reason)
            raise
        if output.json:
            print(json.dumps(merged_json(reports, utc_now()), indent=2), flush=True)
        else:
            print(render_fleet(reports, output.color), flush=True)
    output.write_files(reports, merged=True)
    return int(exit_status_of(worst(report.verdict for report in reports)))
