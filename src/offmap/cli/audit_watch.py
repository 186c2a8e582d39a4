"""``offmap audit --watch``: audit again and again until the process ends, and say what changes."""

import contextlib
import json
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from offmap.cli.audit_output import Output
from offmap.errors import Undetermined
from offmap.vmm.stop_signals import wakeup_file

if TYPE_CHECKING:
    from offmap.audit.audit import Snapshot
    from offmap.audit.process import Process
    from offmap.audit.trace.result import Traced
    from offmap.audit.trace.trace import Trace as _Trace
    from offmap.audit.verdict import Verdict

_LOOK_SECONDS = 1.0  # how soon a traced mapping is reported; each look costs the host some time


class _Stopped(Exception):
    """SIGTERM."""


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """A signal that comes meanwhile ends the watch afterwards: else what was just read of the trace would be lost."""
    came: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise _Stopped


def watch(pid: int, seconds: float, once: "Callable[[], Snapshot]", output: Output, traced: bool = False) -> int:
    """Audit until the process ends; the exit status is that of the worst verdict.

    SIGTERM ends it too: with the worst that was seen, as its parent asked. As JSON, the first line is the whole result,
    and each later one what has changed since the one before (``offmap-audit-change/1``).

    Args:
        once: audits it.
        traced: also trace what maps memory, from before the first audit on; what is found is printed as it is found
            (``offmap-audit-trace/1``), and once more at the end for the time since.
    """
    from offmap.audit.process import NoSuchProcess

    def stop(_number: int, _frame: object) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    watched, stopped = _held(pid), False
    one = _Watch(pid, once, output)
    try:
        if traced and watched is not None:
            from offmap.audit.trace.trace import Trace

            with output.recording_failure():
                one.trace = Trace(pid)
        with wakeup_file() as signals:  # numpy has threads, on which a signal may come
            try:
                # Its PID may be another's afterwards.
                while one.seen is None or watched is None or watched.running():
                    if not one.audit():
                        break
                    one.wait(seconds, signals)
            except (NoSuchProcess, Undetermined):
                if one.seen is None or _runs(pid):
                    raise
    except (_Stopped, KeyboardInterrupt):
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway, and what it still says is said whole
        one.end(stopped)
        if watched is not None:
            watched.close()
    if one.seen is None:
        raise Undetermined("the watch ended before its first audit did", "let it run longer")
    return int(one.worst.exit_status)


class _Watch:
    """The audits of one process, and the trace beside them.

    Attributes:
        worst: the gravest verdict so far.
        seen: the last audit that came to an end.
    """

    def __init__(self, pid: int, once: "Callable[[], Snapshot]", output: Output) -> None:
        from offmap.audit.verdict import Verdict

        self._pid, self._once, self._output = pid, once, output
        self.trace: _Trace | None = None
        self.worst = Verdict.HIDDEN
        self.seen: Snapshot | None = None

    def audit(self) -> bool:
        """Audit it, and say what has changed. False: it ended in the middle of that, which is no finding."""
        with self._output.recording_failure():
            snapshot = self._once()
        if snapshot.audit.partial and self.seen is not None and not _runs(self._pid):
            return False
        self._count(snapshot.audit.verdict)
        before, self.seen = self.seen, snapshot  # first of all: who reads the result may end the watch at once
        _tell(snapshot, before, self._output)
        if self.trace is not None:
            with _whole():
                self._note(self.trace.walked(snapshot))
        return True

    def wait(self, seconds: float, signals: int) -> None:
        """Wait for the next audit, or a signal, and look at the trace meanwhile.

        Args:
            signals: the file that wakes it (``wakeup_file``).
        """
        if self.trace is None:
            select.select([signals], [], [], seconds)
            return
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self.trace.ended:
            select.select([signals], [], [], min(left, _LOOK_SECONDS))
            with _whole():
                self._note(self.trace.look())

    def end(self, stopped: bool) -> None:
        """Say what was traced since the last audit.

        Args:
            stopped: the watch was asked to end: the process may go on.
        """
        if self.trace is None:
            return
        with self.trace:
            if self.seen is None:
                return
            if stopped and not self.trace.ended and _runs(self._pid):
                self._look_again(self.trace)
            self._note(self.trace.finish(self.seen), always=True)

    def _look_again(self, trace: "_Trace") -> None:
        """Audit it once more: no probe sees what its VMM has put under its slots since the last audit."""
        from offmap.audit.process import NoSuchProcess

        try:
            with contextlib.suppress(_Stopped):  # a second signal: it ends anyway
                self.audit()
        except (NoSuchProcess, Undetermined) as error:
            if _runs(self._pid):
                trace.doubt(f"at the end its memory could not be looked at again: {error.reason}")

    def _note(self, found: "Traced", always: bool = False) -> None:
        from offmap.audit.verdict import Verdict

        self._count(found.verdict)
        if always or found.verdict is not Verdict.HIDDEN:
            _tell_trace(found, self._output)

    def _count(self, verdict: "Verdict") -> None:
        self.worst = max(self.worst, verdict, key=lambda verdict: verdict.gravity)


def _tell(snapshot: "Snapshot", before: "Snapshot | None", output: Output) -> None:
    """Print the first result in full, and the differences of each later one."""
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


def _tell_trace(traced: "Traced", output: Output) -> None:
    """Print what a trace has found since the last time."""
    from offmap.audit.trace.text import render_trace, trace_line

    if output.json:
        print(json.dumps(traced.to_json()), flush=True)
    else:
        print("\n".join([f"{time.strftime('%H:%M:%S')} {trace_line(traced)}", *render_trace(traced)]), flush=True)


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
