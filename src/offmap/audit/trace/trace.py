"""A trace beside a watch: from before its first walk to its end."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from offmap.audit.btf import Unknown
from offmap.audit.guest_pages import GuestPages
from offmap.audit.host import utc_now
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import symbol
from offmap.audit.trace import control
from offmap.audit.trace.events import EventReader
from offmap.audit.trace.instance import Instance
from offmap.audit.trace.judge import Judge
from offmap.audit.trace.probes import IOREMAP, NEVER_TRACED
from offmap.audit.trace.result import Traced, TracedMapping
from offmap.audit.verdict import Verdict
from offmap.errors import KernelError, Undetermined
from offmap.owned import Owned
from offmap.patience import scaled
from offmap.uapi.page import PAGE_SHIFT

if TYPE_CHECKING:
    from offmap.audit.audit import Snapshot

_CONTROL_SECONDS = 5  # the end of the control's mapping comes from a worker of the kernel


class Trace(Owned):
    """Records what maps memory on this host, and finds the mappings of one process's guest.

    Args:
        pid: of the process.

    Raises:
        Undetermined: this kernel cannot be traced, or the positive control was not seen.
        KernelError: tracefs refuses.
    """

    def __init__(self, pid: int) -> None:
        self._reader = EventReader()
        self._judge = _judge_of(pid)
        self._judge.has_memory = lambda: _has_memory(pid)
        self._instance = Instance()
        try:
            self._strange = self._missed = 0
            self._untested = self._try_out()
        except BaseException:
            self._instance.close()
            raise
        self._since = time.monotonic()
        self._counted = self._judge.count

    def close(self) -> None:
        self._instance.close()

    @property
    def ended(self) -> bool:
        """Whether the process's memory has gone."""
        return self._judge.ended_us is not None

    @property
    def not_traced(self) -> tuple[str, ...]:
        """What is not seen, on this kernel and on any."""
        here = [f"{name}: {reason}" for name, reason in sorted(self._instance.not_traced.items())]
        return (*here, *self._untested, *NEVER_TRACED)

    def walked(self, snapshot: "Snapshot") -> Traced:
        """What was traced until this walk, which tells the guest's frames."""
        self._drain()
        self._judge.vms = frozenset(vm.address for vm in snapshot.ram.vms)
        return self._result(self._judge.walked(_guest_of(snapshot)))

    def finish(self, snapshot: "Snapshot") -> Traced:
        """What was traced until now, where no walk follows the one of this snapshot."""
        self._drain(last=True)
        if snapshot.audit.pages.not_populated_pages and (made := self._judge.unmatched()):
            self._judge.doubt(
                f"mappings were made after the last audit ({made}), and pages may have been populated since"
            )
        found = self._judge.walked(_guest_of(snapshot))
        return self._result([*found, *self._judge.hits(final=True)], last=True)

    def doubt(self, reason: str) -> None:
        """Say why the present stretch of time is undetermined."""
        self._judge.doubt(reason)

    def look(self) -> Traced:
        """What was traced since, without what has not ended yet."""
        self._drain(whole=False)
        return self._result(self._judge.hits(final=False))

    def _drain(self, last: bool = False, whole: bool = True) -> None:
        """Take what was recorded.

        Args:
            last: nothing follows.
            whole: also see whether something was lost where nothing was recorded; that takes most of the time.
        """
        text = self._instance.take()
        events = self._reader.feed(text)
        if last:
            events += self._reader.flush()
        self._judge.feed(events)
        if not text and not whole:
            return
        if (missed := self._instance.missed()) is None:
            self._judge.doubt("whether events were lost could not be read")
            missed = self._missed
        elif (missed := missed + self._reader.lost) > self._missed:
            self._judge.doubt(f"{missed - self._missed} events were lost")
        if self._reader.strange > self._strange:
            self._judge.doubt(f"{self._reader.strange - self._strange} lines of the trace were not understood")
        if self._instance.lost_here:
            self._instance.lost_here = False
            self._judge.doubt("more was recorded than could be looked at")
        self._missed, self._strange = missed, self._reader.strange

    def _result(self, found: list[TracedMapping], last: bool = False) -> Traced:
        """The stretch of time since something was found last. It goes on if nothing was."""
        now = time.monotonic()
        doubts = self._judge.take_doubts()
        result = Traced(
            time=utc_now(),
            pid=self._judge.pid,
            verdict=Verdict.EXPOSED if found else Verdict.UNKNOWN if doubts else Verdict.HIDDEN,
            seconds=round(now - self._since, 3),
            events=self._judge.count - self._counted,
            mappings=tuple(found),
            undetermined=doubts,
            not_traced=self.not_traced,
        )
        if found or doubts or last:
            self._since, self._counted = now, self._judge.count
        return result

    def _try_out(self) -> tuple[str, ...]:
        """See that mappings of known frames are seen. Return what could not be tried.

        Raises:
            Undetermined: they are not.
        """
        untested = []
        frames = {}
        try:
            frames["vmap"] = control.vmapped_frame()
        except KernelError as error:
            raise Undetermined(
                f"that vmap is traced cannot be tried: {error.reason}", "use a kernel with CONFIG_BPF_SYSCALL"
            ) from None
        try:
            frames[IOREMAP] = control.ioremapped_address() >> PAGE_SHIFT
        except KernelError as error:
            untested.append(f"{IOREMAP}: traced, but not tried out ({error.reason})")
        deadline = time.monotonic() + scaled(_CONTROL_SECONDS)
        while True:
            self._drain()
            missing = [name for name, frame in frames.items() if not self._judge.mapped(frame)]
            ended = self._judge.ended_mappings() >= len(frames)
            if not missing and ended:
                break
            if time.monotonic() > deadline:
                what = ", ".join(missing) or "the end of a mapping"
                raise Undetermined(f"a mapping that was made to try the trace out was not seen: {what}")
            time.sleep(0.02)
        self._judge.clear()
        self._judge.take_doubts()
        return tuple(untested)


def _guest_of(snapshot: "Snapshot") -> GuestPages:
    judged = snapshot.judged
    known = judged.known
    return GuestPages.of(judged.page[known], judged.pfn[known], judged.pages[known], snapshot.ram.ranges)


def _has_memory(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0] != "0"
    except (OSError, IndexError):
        return False


def _judge_of(pid: int) -> Judge:
    """The judge, with the kernel's own addresses. Raises Undetermined: they cannot be read."""
    pointer = bytearray(8)
    try:
        with Kcore() as kcore:
            kcore.read_virtual(symbol("vmemmap_base"), memoryview(pointer))
            return Judge(pid, int.from_bytes(pointer, "little"), kcore.page_offset_base, init_mm=symbol("init_mm"))
    except Unknown as error:
        raise Undetermined(f"frames of traced mappings cannot be told: {error}") from None
