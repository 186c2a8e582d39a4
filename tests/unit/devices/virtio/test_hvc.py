"""hvc0 at a terminal (offmap.vmm.hvc): here, as its other side is the driver of the virtio console."""

import os
import pty
import signal
import struct
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from fcntl import ioctl

import pytest

from offmap.devices.virtio.device import Surroundings
from offmap.kvm import Vm
from offmap.memory.anon import Anon
from offmap.uapi.virtio import console as uapi
from offmap.vmm.hvc import Hvc

from .driver import guest_memory
from .test_console import MULTIPORT, Guest


def set_size(terminal: int, rows: int, columns: int) -> None:
    """As a terminal's window does when it is drawn larger."""
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Session:
    """A terminal (both ends), hvc0 at it, and a guest's driver."""

    def __init__(self, stack: ExitStack, features: int = MULTIPORT) -> None:
        self.master, self.slave = pty.openpty()
        for fd in (self.master, self.slave):
            stack.callback(os.close, fd)
        os.set_blocking(self.slave, False)
        set_size(self.slave, 33, 101)
        self.events: list[str] = []
        self.failed: list[OSError] = []
        self.hvc = stack.enter_context(
            Hvc(
                self.slave,
                self.slave,
                on_open=lambda: self.events.append("open"),
                on_close=lambda: self.events.append("close"),
                on_error=self.failed.append,
            )
        )
        # What it is made in makes no difference to it.
        device = self.hvc.build(Surroundings(guest_memory(), Anon, Vm.__new__(Vm)))
        self.guest = stack.enter_context(Guest(device=device, features=features))

    def sizes(self) -> list[bytes]:
        """What the driver was told of the size since it was asked last."""
        return [more for _, event, _, more in self.guest.told() if event == uapi.VIRTIO_CONSOLE_RESIZE]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def session(stack: ExitStack) -> Session:
    return Session(stack)


def test_the_size_is_told_at_first_and_with_each_change(session: Session) -> None:
    before = signal.getsignal(signal.SIGWINCH)
    assert session.guest.device.config()[:4] == struct.pack("<HH", 101, 33)
    session.guest.open(0)
    assert session.sizes() == [struct.pack("<HH", 101, 33)]
    with session.hvc.following_the_size():
        session.guest.worker.call(lambda: None)
        session.sizes()
        set_size(session.master, 50, 132)
        signal.raise_signal(signal.SIGWINCH)
        session.guest.worker.call(lambda: None)
        assert session.sizes() == [struct.pack("<HH", 132, 50)]
    assert signal.getsignal(signal.SIGWINCH) == before


def test_a_window_that_is_dragged_about_leaves_one_message(session: Session) -> None:
    """A driver that is busy finds the last size, and is not blamed for those that it has not taken."""
    session.guest.open(0)
    with session.hvc.following_the_size():
        for rows in range(1, 2001):
            set_size(session.master, rows, 132)
            signal.raise_signal(signal.SIGWINCH)
    session.guest.worker.call(lambda: None)
    assert session.sizes() == [struct.pack("<HH", 132, 2000)]
    assert session.guest.errors == []


def test_a_driver_without_multiple_ports_finds_the_size_in_the_configuration(stack: ExitStack) -> None:
    session = Session(stack, features=1 << uapi.VIRTIO_CONSOLE_F_SIZE)
    assert session.events == ["open"]
    with session.hvc.following_the_size():
        set_size(session.master, 50, 132)
        signal.raise_signal(signal.SIGWINCH)
        session.guest.worker.call(lambda: None)
    assert session.guest.changes == 2, "one as it began, one for the signal"
    assert session.guest.device.config()[:4] == struct.pack("<HH", 132, 50)


def test_without_a_terminal_no_size_is_told(stack: ExitStack) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    stack.callback(os.close, null)
    hvc = stack.enter_context(Hvc(null, null, on_open=lambda: None, on_close=lambda: None, on_error=lambda _: None))
    guest = stack.enter_context(Guest(device=hvc.build(Surroundings(guest_memory(), Anon, Vm.__new__(Vm)))))
    stack.enter_context(hvc.following_the_size())
    guest.open(0)
    assert guest.told() == []


def test_bytes_go_both_ways_and_what_was_typed_early_waits(session: Session) -> None:
    assert session.hvc.feed(b"root\r") == 5
    session.guest.open(0)
    session.guest.write(0, b"hello, ", b"user")
    assert os.read(session.master, 64) == b"hello, user"
    assert session.guest.read(0) == b"root\r"
    assert session.failed == []


def test_it_is_in_use_from_its_first_word_to_its_drivers_end(session: Session) -> None:
    """A kernel may print its log before it opens its console, and may take the driver away and put it back."""
    assert session.events == []
    session.guest.write(0, b"[    0.000000] Linux version")
    assert session.events == ["open"]
    session.guest.open(0)
    assert session.events == ["open"]
    session.guest.tell(0, uapi.VIRTIO_CONSOLE_PORT_OPEN, 0)
    assert session.events == ["open", "close"]
    session.guest.open(0)
    session.guest.worker.call(session.guest.device.reset)
    assert session.events == ["open", "close"] * 2
    session.guest.worker.call(session.guest.device.reset)
    assert session.events == ["open", "close"] * 2


def test_a_guest_that_does_not_read_stops_the_input_and_nothing_else(session: Session) -> None:
    fed = 0
    while taken := session.hvc.feed(b"x" * 4096):
        fed += taken
    session.guest.open(0)
    session.guest.write(0, b"still here")
    assert os.read(session.master, 64) == b"still here"
    got = 0
    while got < fed:
        got += len(session.guest.read(0, 4096))
    assert session.hvc.feed(b"more") == 4
    assert session.guest.read(0) == b"more"


def test_a_terminal_that_does_not_read_stops_the_guest(session: Session) -> None:
    size = 1 << 18
    session.guest.write(0, *[b"y" * (size // 8)] * 8)
    got = 0
    while got < size:
        got += len(os.read(session.master, 65536).replace(b"\r", b""))
    assert got == size
    assert session.failed == []


def test_another_users_terminal_that_does_not_read_does_not_hold_the_machine(session: Session) -> None:
    """It cannot be opened anew, so that writing to it would block; the worker must end all the same."""
    os.set_blocking(session.slave, True)
    device = Hvc(
        session.slave, session.slave, on_open=lambda: None, on_close=lambda: None, on_error=session.failed.append
    )
    with device, Guest(device=device.build(Surroundings(guest_memory(), Anon, Vm.__new__(Vm)))) as guest:
        guest.write(0, *[b"y" * (1 << 15)] * 8)
    assert session.failed == []


def test_what_is_left_to_write_does_not_open_a_port_that_was_closed(session: Session) -> None:
    session.guest.write(0, *[b"y" * (1 << 15)] * 8)
    session.guest.tell(0, uapi.VIRTIO_CONSOLE_PORT_OPEN, 0)
    assert session.events == ["open", "close"]
    got = 0
    while got < 1 << 18:
        got += len(os.read(session.master, 65536).replace(b"\r", b""))
    session.guest.worker.call(lambda: None)
    assert session.events == ["open", "close"]


def test_a_driver_that_broke_the_rules_has_no_console_any_more(session: Session) -> None:
    session.guest.open(0)
    session.guest.worker.call(session.guest.device.failed)
    assert session.events == ["open", "close"]
