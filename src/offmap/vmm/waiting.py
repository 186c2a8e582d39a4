"""What the loop of a machine waits for, with a terminal or without one: files, the next tick, the end of its broker."""

import math
import os
import select

from offmap.errors import OffmapError
from offmap.typed import TYPE_CHECKING
from offmap.vmm.outcome import Outcome

if TYPE_CHECKING:
    from offmap.vmm.confinement import Confinement
    from offmap.vmm.machine import Machine


class Waiting:
    """Waits for a machine's end and for files.

    Args:
        signals: of `stopped_by_signals`.
        files: that are waited for until they can be read.

    Attributes:
        poll: where other files may be registered. (epoll refuses regular files, and a guest's input may come from one.)
    """

    def __init__(self, machine: "Machine", confinement: "Confinement | None", signals: int, *files: int) -> None:
        self._machine = machine
        self._signals = signals
        self.poll = select.poll()
        for fd in (machine.stopped_fd, *files):
            self.poll.register(fd, select.POLLIN)
        self._broker = -1 if confinement is None else confinement.broker.fd
        if signals >= 0:
            self.poll.register(signals, select.POLLIN)
        if self._broker >= 0:
            self.poll.register(self._broker, 0)  # for its hang-up: its answers are for the threads that asked

    def wait(self) -> set[int]:
        """Return the files that are ready, none when a tick is due. A machine whose broker has ended is ended."""
        seconds = self._machine.seconds_to_tick()
        ready = {fd for fd, _ in self.poll.poll(None if seconds is None else math.ceil(seconds * 1000))}
        if self._signals in ready:
            os.read(self._signals, select.PIPE_BUF)
            ready.remove(self._signals)
        if self._broker in ready:
            why = OffmapError("the broker of this VMM has ended", "run it again: somebody has killed it")
            self._machine.stop(Outcome.FAILED, why)
        return ready
