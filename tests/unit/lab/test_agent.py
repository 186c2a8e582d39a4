"""The agent's loop on this machine, over a socket pair in place of the virtio port."""

import hashlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from offmap.lab.command import LabCommand
from offmap.lab.errors import LabEnded, LabError, LabTimeout
from offmap.lab.guest.agent import Agent
from offmap.lab.guest.frames import START, Decoder, Start, encode_start, frame
from offmap.patience import scaled

ENV = [b"PATH=" + os.environ.get("PATH", os.defpath).encode()]


class Line:
    """Both ends of a session, without a host in between."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.commands: dict[int, LabCommand] = {}
        self.lock = threading.Lock()
        self.threads = [
            threading.Thread(target=self._agent, args=(theirs,), daemon=True),
            threading.Thread(target=self._read, daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _agent(self, end: socket.socket) -> None:
        Agent(end.fileno()).serve()
        end.close()

    def _read(self) -> None:
        decoder = Decoder()
        while data := self.ours.recv(65536):
            for kind, channel, payload in decoder.feed(data):
                self.commands[channel].deliver(kind, payload)
        for command in self.commands.values():
            command.abandon()

    def send(self, kind: int, channel: int, payload: bytes = b"") -> None:
        with self.lock:
            self.ours.sendall(frame(kind, channel, payload))

    def failure(self) -> LabError:
        return LabEnded("gone", "")

    def doing(self) -> str:
        return "nothing"

    def kill(self) -> None:
        self.ours.shutdown(socket.SHUT_RDWR)

    def start(
        self, *argv: str, stdin: bytes | int | None = None, keep_stdin: bool = False, cwd: bytes = b"/"
    ) -> "Running":
        channel = len(self.commands) + 1
        out, err = bytearray(), bytearray()
        command = LabCommand(self, channel, argv[0], out.extend, err.extend, stdin, keep_stdin)
        self.commands[channel] = command
        self.send(START, channel, encode_start(Start([word.encode() for word in argv], ENV, cwd)))
        command.begin()
        return Running(command, out, err)


class Running:
    """A command and what it has written."""

    def __init__(self, command: LabCommand, out: bytearray, err: bytearray) -> None:
        self.command, self.out, self.err = command, out, err


@pytest.fixture
def line() -> Iterator[Line]:
    session = Line()
    yield session
    session.kill()
    for thread in session.threads:
        thread.join(scaled(10))
        assert not thread.is_alive()


def test_status_and_separate_streams(line: Line) -> None:
    run = line.start("sh", "-c", "echo out; echo err >&2; exit 7")
    assert run.command.wait(scaled(10)) == 7
    assert (bytes(run.out), bytes(run.err)) == (b"out\n", b"err\n")


def test_binary_input_and_output_beyond_every_window(line: Line) -> None:
    data = random.Random(2).randbytes(3 << 20)
    run = line.start("cat", stdin=data)
    assert run.command.wait(scaled(30)) == 0
    assert hashlib.sha256(run.out).digest() == hashlib.sha256(data).digest()


def test_death_by_signal(line: Line) -> None:
    run = line.start("sh", "-c", "kill -9 $$")
    assert run.command.wait(scaled(10)) == 128 + signal.SIGKILL


def test_signal_reaches_the_whole_group(line: Line) -> None:
    run = line.start("sh", "-c", "echo ready; sleep 100 & wait", keep_stdin=True)
    run.command.send_signal(signal.SIGTERM)
    assert run.command.wait(scaled(10)) == 128 + signal.SIGTERM


def test_command_that_ignores_its_input_holds_up_nothing(line: Line) -> None:
    deaf = line.start("sleep", "100", keep_stdin=True)
    writer = threading.Thread(target=deaf.command.write, args=(bytes(1 << 20),), daemon=True)
    writer.start()
    assert line.start("echo", "still here").command.wait(scaled(10)) == 0
    deaf.command.kill()
    assert deaf.command.wait(scaled(10)) == 128 + signal.SIGKILL
    writer.join(scaled(10))
    assert not writer.is_alive()


def test_input_is_lost_on_a_command_that_closes_it(line: Line) -> None:
    run = line.start("sh", "-c", "exec <&-; echo done", stdin=bytes(1 << 20))
    assert run.command.wait(scaled(10)) == 0
    assert run.out == b"done\n"


def test_child_left_behind_does_not_delay_the_end(line: Line) -> None:
    run = line.start("sh", "-c", "sleep 60 & echo $!")
    assert run.command.wait(scaled(10)) == 0
    os.kill(int(run.out), signal.SIGKILL)


def test_what_was_written_before_the_end_arrives(line: Line) -> None:
    run = line.start("sh", "-c", "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
    assert run.command.wait(scaled(10)) == 0
    assert (len(run.out), len(run.err)) == (1000000, 1000000)


def test_timeout_kills(line: Line) -> None:
    with pytest.raises(LabTimeout, match=r"sleep did not end in 0\.2 s"):
        line.start("sleep", "100").command.wait(0.2)


def test_unknown_program_is_an_error(line: Line) -> None:
    with pytest.raises(LabError, match="cannot run nonesuch-program in the lab host: No such file"):
        line.start("nonesuch-program").command.wait(scaled(10))


def test_unknown_folder_is_an_error(line: Line) -> None:
    with pytest.raises(LabError, match="cannot enter the folder in which to run true"):
        line.start("true", cwd=b"/nonesuch").command.wait(scaled(10))


def test_input_from_a_descriptor_left_open(line: Line) -> None:
    read, write = os.pipe()
    try:
        run = line.start("head", "-c", "5", stdin=read)
        os.write(write, b"12345 and more")
        assert run.command.wait(scaled(10)) == 0
        assert run.out == b"12345"
    finally:
        os.close(read)
        os.close(write)


def test_lost_session_is_reported(line: Line) -> None:
    run = line.start("sleep", "100", keep_stdin=True)
    line.kill()
    with pytest.raises(LabEnded):
        run.command.wait(scaled(10))


def test_error_of_a_sink_reaches_the_caller(line: Line) -> None:
    def sink(_data: bytes) -> None:
        raise ValueError("sink")

    command = LabCommand(line, 99, "sh", sink, sink)
    line.commands[99] = command
    line.send(START, 99, encode_start(Start([b"sh", b"-c", b"echo x; sleep 100"], ENV, b"/")))
    command.begin()
    with pytest.raises(ValueError, match="sink"):
        command.wait(scaled(10))


def test_a_signal_ends_the_wait_whatever_thread_it_comes_on(line: Line) -> None:
    run = line.start("sleep", "86400")
    check_that_a_signal_ends_the_wait(run.command, "Condition.wait")
    run.command.kill()


def test_a_signal_ends_the_wait_for_a_sink_that_takes_nothing(line: Line) -> None:
    taken = threading.Event()
    command = LabCommand(line, 99, "echo", lambda _data: taken.wait(), 2)
    line.commands[99] = command
    line.send(START, 99, encode_start(Start([b"echo", b"x"], ENV, b"/")))
    command.begin()
    check_that_a_signal_ends_the_wait(command, "Thread.")
    taken.set()


def check_that_a_signal_ends_the_wait(command: LabCommand, place: str) -> None:
    """Have a signal come on another thread while the main thread waits for a command, in a function that begins so."""

    def send() -> None:
        while not waits(main, place):
            time.sleep(0)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    main = threading.get_ident()
    sender = threading.Thread(target=send)
    with pytest.raises(KeyboardInterrupt):
        sender.start()
        command.wait()
    sender.join()


def waits(thread: int, place: str) -> bool:
    """Whether it is in LabCommand.wait and stands in a wait there whose name begins so."""
    frame, names = sys._current_frames().get(thread), []
    while frame is not None:
        names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return "".join(names[:1]).startswith(place) and "LabCommand.wait" in names
