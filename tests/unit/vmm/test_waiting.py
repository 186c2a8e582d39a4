"""What ends a wait: a file that is ready, a signal, and the end of the broker; not an answer of the broker's."""

import os
import socket
from types import SimpleNamespace
from typing import Any

from offmap.errors import OffmapError
from offmap.vmm.outcome import Outcome
from offmap.vmm.waiting import Waiting


class Stopping:
    """A machine, as far as it is waited for."""

    def __init__(self) -> None:
        self.stopped_fd = os.eventfd(0)
        self.stops: list[tuple[Outcome, OffmapError]] = []

    def seconds_to_tick(self) -> float | None:
        return 0.0

    def stop(self, outcome: Outcome, error: OffmapError) -> None:
        self.stops.append((outcome, error))


def test_an_answer_of_the_broker_is_for_who_asked_and_its_end_ends_the_machine() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    machine: Any = Stopping()
    confinement: Any = SimpleNamespace(broker=SimpleNamespace(fd=ours.fileno()))
    events, (signals, python) = os.eventfd(0), os.pipe()
    try:
        waiting = Waiting(machine, confinement, signals, events)
        assert waiting.wait() == set()
        os.write(python, b"\x0f")
        assert waiting.wait() == set()
        os.eventfd_write(events, 1)
        theirs.send(b"an answer")
        assert waiting.wait() == {events}
        assert machine.stops == []
        theirs.close()
        assert waiting.wait() == {events, ours.fileno()}
        [(outcome, error)] = machine.stops
        assert outcome is Outcome.FAILED
        assert error.what == "the broker of this VMM has ended"
        assert Waiting(machine, None, -1, events).wait() == {events}
    finally:
        ours.close()
        for fd in (events, signals, python, machine.stopped_fd):
            os.close(fd)
