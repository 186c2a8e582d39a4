"""virtio-console: ports that are found by their names, bytes in both directions, and drivers that break the rules."""

import errno
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self, cast

import pytest

from offmap.devices.virtio.console import Console
from offmap.devices.virtio.console_port import Port
from offmap.devices.virtio.device import Activation
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.queue import Chain, Queue
from offmap.devices.virtio.worker import Worker
from offmap.owned import Owned
from offmap.patience import scaled
from offmap.uapi.virtio import console as uapi

from .driver import Driver, guest_memory

MULTIPORT = 1 << uapi.VIRTIO_CONSOLE_F_MULTIPORT
SPACING = 0x80000  # of what each queue's driver uses of memory


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + scaled(seconds)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Guest(Owned):
    """A device on its worker, and a driver for each of its queues."""

    def __init__(self, *ports: Port, features: int = MULTIPORT, device: Console | None = None) -> None:
        self.device = device or Console(ports)
        self.errors: list[Exception] = []
        self.changes = 0
        self._room = 0  # buffers for messages that are not used yet
        count = len(self.device.queue_sizes)
        memory = guest_memory(count * SPACING)
        self.drivers = [Driver(memory, size=8, base=n * SPACING) for n in range(count)]
        self.worker = Worker("console", self.errors.append)
        queues = [driver.queue() for driver in self.drivers]
        activation = Activation(queues, features, self.drivers[0].dma, self.worker, self._changed)
        self.worker.call(lambda: self.device.activate(activation))

    def _changed(self) -> None:
        self.changes += 1

    def kick(self, queue: int) -> None:
        self.worker.call(lambda: self.device.handle(queue))

    def tell(self, number: int, event: int, value: int = 1) -> None:
        self.drivers[3].add(struct.pack("<IHH", number, event, value))
        self.kick(3)

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """Give room for messages; those that came."""
        while self._room < 6:
            self.drivers[2].add(64)
            self._room += 1
        self.kick(2)
        found = []
        while self.drivers[2].used_idx() != self.drivers[2].seen:
            message = self.drivers[2].result()
            self._room -= 1
            found.append((*struct.unpack_from("<IHH", message), message[8:]))
        return found

    def open(self, *numbers: int) -> None:
        for number in numbers:
            self.tell(number, uapi.VIRTIO_CONSOLE_PORT_OPEN)

    def read(self, number: int, size: int = 64) -> bytes:
        """What comes by a port into a buffer of this size."""
        driver = self.drivers[queue_of(number)]
        driver.add(size)
        self.kick(queue_of(number))
        until(lambda: driver.used_idx() != driver.seen)
        return driver.result()

    def write(self, number: int, *data: bytes) -> None:
        self.drivers[queue_of(number) + 1].add(*data)
        self.kick(queue_of(number) + 1)

    def close(self) -> None:
        self.worker.call(self.device.reset)
        self.worker.close()


def queue_of(port: int) -> int:
    """Its receive queue (virtio 1.2, 5.3.2)."""
    return 2 * port + 2 if port else 0


class Pipe(Owned):
    """A pipe of the host: its non-blocking write end, its read end."""

    def __init__(self) -> None:
        self.r, self.w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self) -> bytes:
        return os.read(self.r, 1 << 20)

    def close(self) -> None:
        for fd in (self.r, self.w):
            if fd >= 0:
                os.close(fd)

    def close_end(self, end: str) -> None:
        os.close(getattr(self, end))
        setattr(self, end, -1)

    def __enter__(self) -> Self:
        return self


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_ports_are_announced_opened_and_named(stack: ExitStack) -> None:
    guest = stack.enter_context(Guest(Port(console=True), Port("data")))
    assert guest.device.config() == struct.pack("<HHII", 0, 0, 2, 0)
    assert len(guest.device.queue_sizes) == 6
    assert guest.told() == []
    guest.tell(0, uapi.VIRTIO_CONSOLE_DEVICE_READY)
    assert guest.told() == [(0, uapi.VIRTIO_CONSOLE_PORT_ADD, 1, b""), (1, uapi.VIRTIO_CONSOLE_PORT_ADD, 1, b"")]
    guest.tell(0, uapi.VIRTIO_CONSOLE_PORT_READY)
    assert guest.told() == [
        (0, uapi.VIRTIO_CONSOLE_CONSOLE_PORT, 1, b""),
        (0, uapi.VIRTIO_CONSOLE_PORT_OPEN, 1, b""),
    ]
    # Open before it has its name: whoever finds it may read at once.
    guest.tell(1, uapi.VIRTIO_CONSOLE_PORT_READY)
    assert guest.told() == [
        (1, uapi.VIRTIO_CONSOLE_PORT_OPEN, 1, b""),
        (1, uapi.VIRTIO_CONSOLE_PORT_NAME, 1, b"data"),
    ]


def test_the_size_of_the_terminal_goes_to_the_console(stack: ExitStack) -> None:
    guest = stack.enter_context(Guest(Port(console=True), Port("data")))
    guest.open(0, 1)
    guest.device.resize(132, 43)
    guest.worker.call(lambda: None)
    assert guest.told() == [(0, uapi.VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", 132, 43))]
    assert guest.device.config()[:4] == struct.pack("<HH", 132, 43)
    plain = stack.enter_context(Guest(Port(console=True), features=1 << uapi.VIRTIO_CONSOLE_F_SIZE))
    plain.device.resize(80, 25)
    plain.worker.call(lambda: None)
    assert plain.changes == 1


def test_input_waits_until_the_guest_opens_and_has_room_and_ends_once(stack: ExitStack) -> None:
    pipe = stack.enter_context(Pipe())
    guest = stack.enter_context(Guest(Port(), Port("in", input=pipe.r)))
    os.write(pipe.w, b"hello, guest")
    guest.drivers[4].add(5)
    guest.kick(4)
    guest.worker.call(lambda: None)
    assert guest.drivers[4].used_idx() == 0, "the guest has not opened it"
    guest.open(1)
    until(lambda: guest.drivers[4].used_idx() == 1)
    assert guest.drivers[4].result() == b"hello"
    assert guest.read(1) == b", guest"
    guest.drivers[4].add(64)
    guest.kick(4)
    os.write(pipe.w, b"more")
    until(lambda: guest.drivers[4].used_idx() == 3)
    assert guest.drivers[4].result() == b"more"
    assert guest.told() == []
    guest.drivers[4].add(64)
    guest.kick(4)
    pipe.close_end("w")
    found: list[tuple[int, int, int, bytes]] = []

    def told() -> bool:
        found.extend(guest.told())
        return bool(found)

    until(told)
    assert found == [(1, uapi.VIRTIO_CONSOLE_PORT_OPEN, 0, b"")]
    guest.kick(4)
    assert guest.told() == []
    assert guest.errors == []


def test_input_from_a_file_and_from_nothing(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"x" * 100)
    file = stack.enter_context(path.open("rb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    stack.callback(os.close, nothing)
    guest = stack.enter_context(Guest(Port(), Port("file", input=file.fileno()), Port("null", input=nothing)))
    for queue in (4, 4, 6):
        guest.drivers[queue].add(60)
        guest.kick(queue)
    guest.open(1, 2)
    assert (guest.drivers[4].result(), guest.drivers[4].result()) == (b"x" * 60, b"x" * 40)
    guest.drivers[4].add(60)
    guest.kick(4)
    assert {(number, value) for number, _, value, _ in guest.told()} == {(1, 0), (2, 0)}


def test_what_a_file_system_cannot_move_itself_passes_by_a_small_buffer(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EFAULT: by GUP, hidden RAM cannot be reached. A guest that describes much room makes us take no more memory."""
    path = tmp_path / "input"
    content = bytes(range(256)) * 768
    path.write_bytes(content)
    source = stack.enter_context(path.open("rb"))
    target = stack.enter_context((tmp_path / "output").open("wb"))
    guest = stack.enter_context(Guest(Port(), Port("file", input=source.fileno(), output=target.fileno())))
    readv, write = os.readv, os.write
    sizes: list[int] = []

    def no_gup(fd: int, buffers: Sequence[memoryview]) -> int:
        if isinstance(buffers[0].obj, mmap.mmap):
            raise OSError(errno.EFAULT, "Bad address")
        sizes.append(sum(map(len, buffers)))
        return readv(fd, buffers)

    def counted_write(fd: int, data: memoryview) -> int:
        if fd == target.fileno():
            sizes.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "readv", no_gup)
    monkeypatch.setattr(os, "writev", no_gup)
    monkeypatch.setattr(os, "write", counted_write)
    guest.open(1)
    assert b"".join(guest.read(1, 70_000) for _ in range(3)) == content
    guest.write(1, content[:100_000], content[100_000:])
    assert (tmp_path / "output").read_bytes() == content
    assert max(sizes) == 64 << 10
    assert guest.errors == []


def test_output_in_its_order_and_a_reader_that_is_slow(stack: ExitStack) -> None:
    slow, quick = stack.enter_context(Pipe()), stack.enter_context(Pipe())
    guest = stack.enter_context(Guest(Port(), Port("slow", output=slow.w), Port("quick", output=quick.w)))
    guest.write(1, b"one ", b"two ")
    assert slow.read() == b"one two "
    assert guest.drivers[5].take() == (0, 0)
    block = bytes(range(256)) * 256
    for _ in range(4):
        guest.write(1, block)
    used = guest.drivers[5].used_idx()
    assert used < 5, "the pipe has room for 64 KiB"
    guest.write(2, b"not stopped")
    assert quick.read() == b"not stopped"
    got = b""
    while len(got) < 4 * len(block):
        until(lambda: _readable(slow.r))
        got += slow.read()
    assert got == 4 * block
    until(lambda: guest.drivers[5].used_idx() == 5)


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_output_to_a_socket_never_blocks(stack: ExitStack) -> None:
    ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
    guest = stack.enter_context(Guest(Port(), Port("socket", output=ours.fileno())))
    for _ in range(6):
        guest.write(1, bytes(40_000))  # more than a socket's buffer holds
    total = 0
    while total < 240_000:
        total += len(theirs.recv(1 << 20))
    until(lambda: guest.drivers[5].used_idx() == 6)


def test_the_last_port_waits_for_the_others(stack: ExitStack) -> None:
    out, status = stack.enter_context(Pipe()), stack.enter_context(Pipe())
    guest = stack.enter_context(Guest(Port("out", output=out.w), Port("status", output=status.w, last=True)))
    block = bytes(200_000)
    guest.drivers[1].add(block)  # of which nobody is told
    guest.write(1, b"exit 0\n")
    assert not _readable(status.r)
    total = len(out.read())
    while total < len(block):
        assert total + (64 << 10) >= len(block) or not _readable(status.r), "what is left does not fit into the pipe"
        until(lambda: _readable(out.r))
        total += len(out.read())
    until(lambda: _readable(status.r))
    assert status.read() == b"exit 0\n"


class Endless:
    """A queue whose driver, or another device, adds buffers as quickly as they are used."""

    stopped = False

    def __init__(self) -> None:
        self._data = [memoryview(bytearray(8))]
        self.used = 0

    def take(self) -> Chain | None:
        return None if self.stopped else Chain(0, self._data, [], 8, 0)

    def push(self, _chain: Chain, _written: int) -> None:
        self.used += 1

    def notify(self) -> None:
        pass


@pytest.mark.parametrize("output", [os.devnull, None])
def test_a_guest_that_never_stops_writing_leaves_the_thread_to_others(stack: ExitStack, output: str | None) -> None:
    fd = None if output is None else os.open(output, os.O_WRONLY)
    guest = stack.enter_context(Guest(Port(output=fd)))
    guest.open(0)
    queue, stream, heard = Endless(), guest.device._streams[0], threading.Event()
    stack.callback(setattr, queue, "stopped", True)
    stream.output_queue = cast(Queue, queue)
    guest.worker.post(lambda: guest.device.handle(1))
    until(lambda: queue.used)
    guest.worker.post(heard.set)
    assert heard.wait(scaled(10.0))
    used = queue.used
    until(lambda: queue.used > used)  # and it goes on


def test_a_reader_that_has_gone_is_reported_once_and_the_rest_lost(stack: ExitStack) -> None:
    pipe = stack.enter_context(Pipe())
    errors: list[OSError] = []
    guest = stack.enter_context(Guest(Port(), Port("out", output=pipe.w, on_error=errors.append)))
    pipe.close_end("r")
    for _ in range(3):
        guest.write(1, b"lost")
    assert guest.drivers[5].used_idx() == 3
    assert [type(error) for error in errors] == [BrokenPipeError]


def test_a_driver_without_multiple_ports_has_the_first(stack: ExitStack) -> None:
    inwards, outwards = stack.enter_context(Pipe()), stack.enter_context(Pipe())
    guest = stack.enter_context(Guest(Port(input=inwards.r, output=outwards.w, console=True), Port("x"), features=0))
    os.write(inwards.w, b"in")
    assert guest.read(0) == b"in"
    guest.write(0, b"out")
    assert outwards.read() == b"out"
    guest.kick(2)
    guest.kick(4)
    guest.kick(5)


def test_after_a_reset_it_starts_anew(stack: ExitStack) -> None:
    pipe = stack.enter_context(Pipe())
    guest = stack.enter_context(Guest(Port(), Port("in", input=pipe.r)))
    guest.open(1)
    guest.drivers[4].add(8)
    guest.kick(4)
    guest.worker.call(guest.device.reset)
    os.write(pipe.w, b"late")
    guest.worker.call(lambda: None)
    assert guest.drivers[4].used_idx() == 0
    guest.kick(3)
    guest.kick(4)
    guest.kick(5)
    assert guest.errors == []


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (b"\0" * 7, "a control message of 7 bytes"),
        (struct.pack("<IHH", 2, uapi.VIRTIO_CONSOLE_PORT_READY, 1), "port 2 of 2"),
        (struct.pack("<IHH", 0xFFFFFFFF, uapi.VIRTIO_CONSOLE_PORT_OPEN, 1), "port 4294967295 of 2"),
    ],
)
def test_messages_that_make_no_sense(stack: ExitStack, message: bytes, what: str) -> None:
    guest = stack.enter_context(Guest(Port(), Port()))
    guest.drivers[3].add(message)
    with pytest.raises(DriverError, match=what):
        guest.kick(3)


def test_messages_that_mean_nothing_are_ignored(stack: ExitStack) -> None:
    guest = stack.enter_context(Guest(Port(), Port()))
    for event in (uapi.VIRTIO_CONSOLE_PORT_ADD, uapi.VIRTIO_CONSOLE_RESIZE, 99):
        guest.tell(0, event)
    guest.tell(0, uapi.VIRTIO_CONSOLE_PORT_READY, 0)
    assert guest.told() == []


def test_a_driver_that_asks_and_never_listens_is_stopped(stack: ExitStack) -> None:
    guest = stack.enter_context(Guest(Port(), Port()))
    with pytest.raises(DriverError, match="control messages unread"):
        for _ in range(2000):
            guest.tell(0, uapi.VIRTIO_CONSOLE_DEVICE_READY)
            guest.drivers[3].take()


def test_buffers_that_are_no_use(stack: ExitStack) -> None:
    pipe = stack.enter_context(Pipe())
    guest = stack.enter_context(Guest(Port(), Port("in", input=pipe.r, output=pipe.w)))
    guest.drivers[2].add(4)
    with pytest.raises(DriverError, match="4 bytes for a control message of 8"):
        guest.tell(0, uapi.VIRTIO_CONSOLE_DEVICE_READY)
    guest = stack.enter_context(Guest(Port(), Port("in", input=pipe.r, output=pipe.w)))
    guest.write(1, b"")
    assert guest.drivers[5].take() == (0, 0)
    guest.open(1)
    os.write(pipe.w, b"x")
    guest.drivers[4].add(b"read only")
    guest.kick(4)
    until(lambda: guest.errors)
    assert "empty buffer" in str(guest.errors[0])
