"""A program that drives a machine by the library's public names alone, on a thread of its own."""

import os
import selectors
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import offmap

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kvm")]


def run_to_its_end(machine: offmap.Machine, events: int) -> None:
    """The loop: what is due is done when something happens, until the machine has stopped.

    Args:
        events: an eventfd that `on_event` writes to.
    """
    machine.start()
    with selectors.DefaultSelector() as selector:
        for fd in (machine.stopped_fd, events):
            selector.register(fd, selectors.EVENT_READ)
        while machine.stopped is None:
            if any(key.fd == events for key, _ in selector.select(machine.seconds_to_tick())):
                os.eventfd_read(events)
            machine.tick()
            machine.console.flush()


def test_a_guest_on_another_thread(payload: Callable[[str], Path]) -> None:
    events = os.eventfd(0, os.EFD_CLOEXEC)
    said = bytearray()
    source = offmap.BootSource(payload("monitor"), None, "")
    config = offmap.MachineConfig(source, offmap.parse_backend("memfd"), 32 << 20, 1, vetting=offmap.Vet())
    ends: list[offmap.Stop | None] = []

    def live() -> None:
        with offmap.Machine(config, said.extend, on_event=lambda: os.eventfd_write(events, 1)) as machine:
            machine.console.feed(b"abq")
            run_to_its_end(machine, events)
            ends.append(machine.stopped)

    thread = threading.Thread(target=live)
    thread.start()
    thread.join(60)
    os.close(events)
    assert [end.outcome for end in ends if end] == [offmap.Outcome.POWERED_OFF]
    assert bytes(said) == b"Uab"
