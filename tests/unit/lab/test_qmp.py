"""QEMU's control protocol, against a QEMU that is played by the test."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from offmap.lab.qmp import Qmp, QmpError

GREETING: dict[str, object] = {"QMP": {}}


@contextmanager
def talking(*answers: dict[str, object], seconds: float = 30.0) -> Iterator[tuple[Qmp, list[dict[str, object]]]]:
    """A connection whose other end sends the greeting, and an answer or events for each command."""
    ours, theirs = socket.socketpair()
    asked: list[dict[str, object]] = []

    def serve() -> None:
        with theirs, theirs.makefile("rwb") as file:
            file.write(json.dumps(GREETING).encode() + b"\n")
            file.flush()
            for answer in answers:
                line = file.readline()
                if not line:
                    return
                asked.append(json.loads(line))
                file.write(json.dumps(answer).encode() + b"\n")
                if "event" in answer:
                    file.write(b'{"return": {}}\n')
                file.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    qmp = Qmp(ours, seconds)
    try:
        yield qmp, asked
    finally:
        qmp.close()
        thread.join()


def test_commands_and_events() -> None:
    with talking({"return": {}}, {"event": "STOP"}, {"return": 7}) as (qmp, asked):
        qmp.negotiate()
        assert qmp.execute("stop") == {}
        assert qmp.execute("x", {"a": 1}) == 7
        assert asked[2] == {"execute": "x", "arguments": {"a": 1}}


def test_refusal_and_end() -> None:
    with talking({"return": {}}, {"error": {"class": "GenericError", "desc": "no such thing"}}) as (qmp, _):
        qmp.negotiate()
        with pytest.raises(QmpError, match="refuses migrate: no such thing"):
            qmp.execute("migrate")
        with pytest.raises(QmpError):
            qmp.execute("stop")


def test_silence_ends() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Qmp(ours, 0.05) as qmp, pytest.raises(QmpError, match="does not answer"):
        qmp.negotiate()


def test_an_end_in_the_middle_of_a_line() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"QMP": {')
    theirs.close()
    with Qmp(ours, 30) as qmp, pytest.raises(QmpError, match="QEMU is gone"):
        qmp.negotiate()


def test_a_descriptor_goes_along() -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with theirs, Qmp(ours, 30) as qmp:
        theirs.sendall(b'{"return": {}}\n')
        qmp.execute("getfd", {"fdname": "x"}, fd=write)
        message, fds, _, _ = socket.recv_fds(theirs, 4096, 1)
        assert json.loads(message)["arguments"] == {"fdname": "x"}
        os.write(fds[0], b"through")
        assert os.read(read, 100) == b"through"
        for fd in (read, write, *fds):
            os.close(fd)


def test_awaited_event() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Qmp(ours, 30) as qmp:
        theirs.sendall(b'{"event": "MIGRATION", "data": {"status": "active"}}\n{"event": "RESUME"}\n')
        theirs.sendall(b'{"event": "MIGRATION", "data": {"status": "failed"}}\n')
        assert qmp.await_event("MIGRATION", "status", frozenset({"completed", "failed"})) == "failed"
