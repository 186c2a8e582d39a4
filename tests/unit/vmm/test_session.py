"""The user's end of a machine with a virtio console: at its serial port, then at its hvc0. No KVM."""

import os
import pty
import select
import signal
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path

import pytest

from offmap.boot.linux import BootSource
from offmap.devices.serial import UART_IER, UART_IER_RDI, UART_LSR, UART_LSR_DR, UART_MCR, UART_RX, Serial16550A
from offmap.devices.virtio.console import Console
from offmap.devices.virtio.device import Surroundings
from offmap.errors import OffmapError
from offmap.hide import Vet
from offmap.kvm import Vm
from offmap.memory.anon import Anon
from offmap.owned import Owned
from offmap.uapi.pc import COM1_PORT
from offmap.uapi.virtio import console as uapi
from offmap.vmm import session as under_test
from offmap.vmm.config import MachineConfig
from offmap.vmm.outcome import Outcome, Stop

from ..devices.virtio.driver import guest_memory
from ..devices.virtio.test_console import Guest, until

MCR_RTS_OUT2 = 0x0A


class NoIrq:
    def set(self, level: bool) -> None: ...


class FakeMachine(Owned):
    """A real serial port and a real virtio console, and in place of a guest what a test does with them."""

    made: "FakeMachine"

    def __init__(
        self,
        config: MachineConfig,
        output: Callable[[bytes], None],
        *,
        on_open: Callable[[], None],
        on_event: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.console = Serial16550A(NoIrq(), output, on_open=on_open, on_pending=on_event, on_room=on_event)
        self.stopped: Stop | None = None
        self.stopped_fd = os.eventfd(0)
        ((_, spec),) = config.devices
        device = spec.build(Surroundings(guest_memory(), Anon, Vm.__new__(Vm)))
        assert isinstance(device, Console)
        self.hvc = Guest(device=device)

    def start(self, confinement: object = None) -> None:
        type(self).made = self

    def stop(self, outcome: Outcome, error: OffmapError | None = None) -> None:
        self.stopped = self.stopped or Stop(outcome, error)
        os.eventfd_write(self.stopped_fd, 1)

    def seconds_to_tick(self) -> None: ...

    def tick(self) -> None: ...

    def print(self, text: bytes) -> None:
        """On the serial port."""
        for byte in text:
            self.console.write(COM1_PORT, 1, byte)

    def open_serial(self) -> None:
        """As Linux does when a process opens ttyS0."""
        self.console.write(COM1_PORT + UART_IER, 1, UART_IER_RDI)
        self.console.write(COM1_PORT + UART_MCR, 1, MCR_RTS_OUT2)

    def read_serial(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            until(lambda: self.console.read(COM1_PORT + UART_LSR, 1) & UART_LSR_DR)
            got += bytes([self.console.read(COM1_PORT + UART_RX, 1)])
        return got

    def close(self) -> None:
        self.console.flush()
        self.hvc.close()
        os.close(self.stopped_fd)


class User:
    """At a terminal; the session runs on the main thread, and what the user and the guest do on another."""

    def __init__(self, stack: ExitStack) -> None:
        self.master, self.slave = pty.openpty()
        for fd in (self.master, self.slave):
            stack.callback(os.close, fd)
        self.resize(33, 101)
        self.lines: list[str] = []
        self.ups = 0
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def sees(self, text: bytes) -> None:
        """Wait until the terminal shows exactly this, and nothing for a moment after it."""
        until(lambda: self._look() == text)
        until(lambda: not select.select([self.master], [], [], 0.02)[0])
        assert self.seen == text
        self.seen = b""

    def _look(self) -> bytes:
        if select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 4096).replace(b"\r\n", b"\n")
        return self.seen

    def session(self, script: Callable[[FakeMachine], None], command_line: str = "console=ttyS0 quiet") -> Stop:
        """Run one, with this on the other side."""

        def up(_: object) -> None:
            self.ups += 1

        def run() -> None:
            try:
                until(lambda: hasattr(FakeMachine, "made"))
                script(FakeMachine.made)
            except BaseException as error:
                failures.append(error)
            finally:
                self.type(b"\x01x")

        failures: list[BaseException] = []
        config = MachineConfig(BootSource(Path("k"), None, command_line), Anon(), 1 << 28, vetting=Vet())
        session = under_test.Session(
            config, stdin=self.slave, stdout=self.slave, hvc=True, say=self.lines.append, on_up=up
        )
        other = threading.Thread(target=run)
        other.start()
        try:
            stop = session.run()
        finally:
            other.join()
        if failures:
            raise failures[0]
        return stop


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    monkeypatch.setattr(under_test, "Machine", FakeMachine)
    monkeypatch.delattr(FakeMachine, "made", raising=False)
    with ExitStack() as stack:
        yield User(stack)


def test_the_serial_port_is_shown_until_hvc0_speaks_and_again_without_it(user: User) -> None:
    def guest(machine: FakeMachine) -> None:
        machine.print(b"early\nhalf a li")
        user.sees(b"early\nhalf a li")
        machine.print(b"ne, and more")
        machine.hvc.write(0, b"\nearly again\n")
        user.sees(b"half a line, and more\nearly again\n"[len("half a li") :])
        until(lambda: user.ups == 1)
        machine.print(b"late\n")
        machine.hvc.open(0)
        machine.hvc.write(0, b"late\n")
        user.sees(b"late\n")
        machine.print(b"not shown ")
        machine.hvc.worker.call(machine.hvc.device.reset)
        machine.print(b"reboot: Power down\n")
        user.sees(b"reboot: Power down\n")

    assert user.session(guest).outcome is Outcome.QUIT
    assert FakeMachine.made.config.source.command_line == "console=ttyS0 console=hvc0 quiet"


def test_keys_go_where_the_user_is_and_wait_for_a_guest_that_listens_nowhere(user: User) -> None:
    def guest(machine: FakeMachine) -> None:
        user.type(b"typed early")
        machine.hvc.open(0)
        assert machine.hvc.read(0) == b"typed early"
        user.type(b"x")
        assert machine.hvc.read(0) == b"x"

    user.session(guest)


def test_a_guest_without_hvc0_is_spoken_to_by_its_serial_port(user: User) -> None:
    def guest(machine: FakeMachine) -> None:
        user.type(b"ls")
        machine.open_serial()
        assert machine.read_serial(2) == b"ls"
        until(lambda: user.ups == 1)
        user.type(b"\x01apwd\r")
        assert machine.read_serial(5) == b"\x01pwd\r"
        machine.hvc.open(0)
        user.type(b"hello")
        assert machine.hvc.read(0) == b"hello"

    user.session(guest)


def test_the_escape_key_is_seen_whatever_waits_for_the_guest(user: User) -> None:
    """Before anybody listens; with a pipe full of keys."""

    def guest(machine: FakeMachine) -> None:
        user.type(b"waits\x01h")
        until(lambda: user.lines)
        machine.hvc.open(0)
        for _ in range(50):  # more than waits for a guest; a terminal's surplus is lost
            user.type(b"y" * 4000)
        user.type(b"\x01h")
        until(lambda: len(user.lines) == 2)

    user.session(guest)
    assert user.lines == ["Ctrl-A x: quit; Ctrl-A a: send Ctrl-A; Ctrl-A h: this help"] * 2


def test_the_terminal_is_raw_meanwhile_and_as_it_was_afterwards(user: User) -> None:
    before = termios.tcgetattr(user.slave)
    sizes: list[bytes] = []

    def guest(machine: FakeMachine) -> None:
        raw = termios.tcgetattr(user.slave)
        assert not raw[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        machine.hvc.open(0)

        def told() -> bool:
            found = [more for _, event, _, more in machine.hvc.told() if event == uapi.VIRTIO_CONSOLE_RESIZE]
            sizes.extend(found)
            return bool(found)

        until(told)
        user.resize(50, 132)
        os.kill(os.getpid(), signal.SIGWINCH)
        until(told)

    user.session(guest)
    assert (sizes[0], sizes[-1]) == (struct.pack("<HH", 101, 33), struct.pack("<HH", 132, 50))
    assert termios.tcgetattr(user.slave) == before
    assert signal.getsignal(signal.SIGWINCH) is signal.SIG_DFL


def test_a_terminal_that_has_gone_ends_it(user: User) -> None:
    def guest(machine: FakeMachine) -> None:
        assert machine.hvc.device._streams[0].port.output is not None
        machine.hvc.device._streams[0].port.on_error(BrokenPipeError(32, "Broken pipe"))
        until(lambda: machine.stopped)

    stop = user.session(guest)
    assert stop.outcome is Outcome.FAILED
    assert str(stop.error).startswith("writing what the guest's console says failed: Broken pipe")
