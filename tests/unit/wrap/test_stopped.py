"""Processes that are killed while all their threads stand still."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import cast

import pytest

from offmap.uapi.seccomp_notify import seccomp_notif
from offmap.wrap.listener import Call, CallGone, Listener
from offmap.wrap.stopped import Stopped

THREADS = """
import threading, time
for _ in range(3):
    threading.Thread(target=time.sleep, args=(1000,)).start()
print(flush=True)
time.sleep(1000)
"""


class Answered:
    """Takes every answer. Its calls are in a thread that waits in another way."""

    def check(self, call: Call) -> None:
        """It is there."""

    def fail(self, call: Call, error: int) -> None:
        """The call has ended."""


@pytest.fixture
def process() -> Iterator[Popen[bytes]]:
    process = Popen([sys.executable, "-c", THREADS], stdout=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def tasks(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())
    return []


@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_is_killed_while_it_stands_leaves_nothing(process: Popen[bytes], first: bool) -> None:
    """Its first thread has no end before the others have theirs, and theirs wait for who traces them."""
    threads = tasks(process.pid)
    notified = seccomp_notif()
    notified.pid = process.pid if first else threads[-1]
    with Stopped(cast("Listener", Answered()), Call(notified)):
        os.kill(process.pid, signal.SIGKILL)  # Popen.kill() would take the stop for its end
    assert len(threads) == 4
    assert not tasks(process.pid)


def test_a_call_that_is_gone_leaves_its_thread_running(process: Popen[bytes]) -> None:
    class Gone(Answered):
        def fail(self, call: Call, error: int) -> None:
            raise CallGone

    notified = seccomp_notif()
    notified.pid = process.pid
    with Stopped(cast("Listener", Gone()), Call(notified)):
        pass
    for tid in tasks(process.pid):
        status = Path(f"/proc/{tid}/status").read_text()
        assert "State:\tt" not in status  # it is awake for a moment
        assert "TracerPid:\t0" in status
