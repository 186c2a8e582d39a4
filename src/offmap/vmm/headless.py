"""Run one machine to its end without a terminal: the event loop of a guest that does one job."""

import os
import re
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from offmap.errors import OffmapError
from offmap.units import printable
from offmap.vmm.config import MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.stop_signals import stopped_by_signals
from offmap.vmm.waiting import Waiting

if TYPE_CHECKING:
    from offmap.vmm.confinement import Confinement

_KEPT = 1024  # pieces of console output, each a line or less: an oops has a hundred lines
_LONGEST_LINE = 300  # characters of what the guest has said that a user is told
# Lines that explain a guest's end come from its init or its kernel. Of an oops before a panic (arch/x86/mm/fault.c,
# kernel/traps.c, kernel/dumpstack.c), the first line and the place are kept.
_END = re.compile("offmap-guest:|Kernel panic|Out of memory")
_OOPS = re.compile("BUG: |Oops: |general protection|double fault|stack segment|invalid opcode|kernel BUG at")
_PLACE = re.compile(r"RIP: 0010:")  # in the kernel: __KERNEL_CS


class Headless:
    """A machine whose console nobody sees. Its last lines are kept: they say why a guest failed.

    Args:
        finished: an fd that becomes readable when the job is done: the machine is then ended.
        say: takes a line for the user, on any thread.
        on_up, on_end, confinement: as of `Session`.
    """

    def __init__(
        self,
        config: MachineConfig,
        finished: int,
        *,
        say: Callable[[str], None],
        on_up: Callable[[Machine], None] = lambda _: None,
        on_end: Callable[[Machine], None] = lambda _: None,
        confinement: "Confinement | None" = None,
    ) -> None:
        self._confinement = confinement
        self._config = config
        self._finished = finished
        self._say = say
        self._on_up = on_up
        self._on_end = on_end
        self._up = False
        self._machine: Machine | None = None
        self._console: deque[bytes] = deque(maxlen=_KEPT)

    def run(self) -> Stop:
        """Build the machine, run it to its end, take it apart. On the process's main thread it handles signals, too.

        Returns:
            How it ended: POWERED_OFF when `finished` became readable.

        Raises:
            OffmapError: it could not be built, or a signal came before it was.
        """
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with (
                stopped_by_signals(self.fail) as signals,
                Machine(
                    self._config, self._console.append, on_open=self._opened, on_event=self._wake, say=self._say
                ) as machine,
            ):
                self._machine = machine
                machine.start(self._confinement)
                self._loop(machine, signals)
                self._on_end(machine)
            return machine.stopped or Stop(Outcome.QUIT)
        finally:
            os.close(self._events)

    def fail(self, reason: OffmapError) -> bool:
        """End the machine for this reason; False where there is none yet. Any thread may call it."""
        if self._machine is None:
            return False
        self._machine.stop(Outcome.FAILED, reason)
        return True

    @property
    def last_words(self) -> str:
        """The console lines that explain the end: init's own, a panic with its oops, or else the last line."""
        lines = [line.strip() for line in b"".join(self._console).decode(errors="replace").splitlines()]
        end = next((number for number in reversed(range(len(lines))) if _END.search(lines[number])), None)
        if end is None:
            said = [next((line for line in reversed(lines) if line), "")]
        else:
            said = [*(_oops(lines[:end]) if "Kernel panic" in lines[end] else []), lines[end]]
        # A guest can write anything to its console.
        return printable("; ".join(line[:_LONGEST_LINE] for line in said if line))

    def _wake(self) -> None:
        os.eventfd_write(self._events, 1)

    def _opened(self) -> None:
        self._up = True
        self._wake()

    def _loop(self, machine: Machine, signals: int) -> None:
        announced = False
        waiting = Waiting(machine, self._confinement, signals, self._events, self._finished)
        while machine.stopped is None:
            ready = waiting.wait()
            if self._events in ready:
                os.eventfd_read(self._events)
                machine.console.flush(wait=False)
            if self._finished in ready:
                machine.stop(Outcome.POWERED_OFF)
            machine.tick()
            if self._up and not announced:
                announced = True
                self._on_up(machine)


def _oops(before: list[str]) -> list[str]:
    """The headline of the last oops before a panic, and where it was."""
    first = next((number for number in reversed(range(len(before))) if _OOPS.search(before[number])), None)
    if first is None:
        return []
    # "BUG: " and "Oops: " are two lines of one report.
    while first and _OOPS.search(" ".join(before[max(first - 3, 0) : first])):
        first -= 1
    headline = next(line for line in before[first:] if _OOPS.search(line))
    return [headline, *[line for line in before[first:] if _PLACE.search(line)][:1]]
