"""``offmap audit --watch``: audit again and again until the process ends, and say what changes."""

import json
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from offmap.cli.audit_output import Output
from offmap.errors import Undetermined

if TYPE_CHECKING:
    from offmap.audit.audit import Snapshot
    from offmap.audit.process import Process


class _Stopped(Exception):
    """SIGTERM."""


def watch(pid: int, seconds: float, once: "Callable[[], Snapshot]", output: Output) -> int:
    """Audit until the process ends; the exit status is that of the worst verdict.

    SIGTERM ends it too: with the worst that was seen, as its parent asked. As JSON, the first line is the whole result,
    and each later one what has changed since the one before (``offmap-audit-change/1``).

    Args:
        once: audits it.
    """
    from offmap.audit.process import NoSuchProcess
    from offmap.audit.verdict import Verdict

    worst, seen = Verdict.HIDDEN, None

    def stop(_number: int, _frame: object) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    watched = _held(pid)
    try:
        try:
            while seen is None or watched is None or watched.running():  # its PID may be another's afterwards
                with output.recording_failure():
                    snapshot = once()
                result = snapshot.audit
                if result.partial and seen is not None and not _runs(pid):
                    break  # the end of what is watched, and not a finding
                worst = max(worst, result.verdict, key=lambda verdict: verdict.gravity)
                _tell(snapshot, seen, output)
                seen = snapshot
                time.sleep(seconds)
        except (NoSuchProcess, Undetermined):
            if seen is None or _runs(pid):
                raise
    except (_Stopped, KeyboardInterrupt):
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway, and what it still says is said whole
        if watched is not None:
            watched.close()
    if seen is None:
        raise Undetermined("the watch ended before its first audit did", "let it run longer")
    return int(worst.exit_status)


def _tell(snapshot: "Snapshot", before: "Snapshot | None", output: Output) -> None:
    """Print the first result whole, and of a later one what is different."""
    from offmap.audit.changes import compare
    from offmap.audit.report.changes import render_changes
    from offmap.audit.report.hosts import parse_report
    from offmap.audit.report.text import render_vm, verdict_line

    document = snapshot.audit.to_json()
    report = parse_report(document)
    output.write_files([report])
    if before is None:
        print(json.dumps(document) if output.json else render_vm(report.vms[0], output.color), flush=True)
        return
    changes = compare(before, snapshot)
    if not changes.pages and snapshot.audit.verdict is before.audit.verdict:
        return
    if output.json:
        print(json.dumps(changes.to_json()), flush=True)
    else:
        lines = [f"{time.strftime('%H:%M:%S')} changed: {verdict_line(report.vms[0])}", *render_changes(changes)]
        print("\n".join(lines), flush=True)


def _held(pid: int) -> "Process | None":
    from offmap.audit.process import NoSuchProcess, Process

    try:
        return Process(pid)
    except NoSuchProcess:
        return None  # the audit says so


def _runs(pid: int) -> bool:
    process = _held(pid)
    if process is None:
        return False
    with process:
        return process.running()
