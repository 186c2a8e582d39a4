"""Where the console goes: slow readers, absent ones, and those that are given up."""

import os
import pty
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap.patience import scaled
from offmap.vmm.output import ConsoleOutput


def test_all_arrives_however_slow_the_reader() -> None:
    reader, writer = os.pipe()
    data = os.urandom(300_000)
    got = bytearray()
    with ConsoleOutput(writer) as output:
        thread = threading.Thread(target=output.write, args=(data,))
        thread.start()
        while len(got) < len(data):
            got += os.read(reader, 1000)
        thread.join()
        assert os.get_blocking(writer)  # the flag is everybody's who holds this pipe
    assert got == data
    os.close(reader)
    os.close(writer)


def _fifo() -> tuple[int, int]:
    return os.pipe()


def _terminal() -> tuple[int, int]:
    return pty.openpty()


def _in_poll(thread: threading.Thread) -> bool:
    """Whether the kernel has it in poll(2), which is system call 7 of x86-64 (proc(5), ``syscall``)."""
    return Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith("7 ")


@pytest.mark.parametrize("pair", [_fifo, _terminal])
def test_abandoned_it_waits_for_nobody(pair: Callable[[], tuple[int, int]]) -> None:
    reader, writer = pair()
    more = b"x" * 1_000_000  # than a pipe or a terminal ever takes while nobody reads
    with ConsoleOutput(writer) as output:
        thread = threading.Thread(target=output.write, args=(more,))
        thread.start()
        os.read(reader, 1)
        # ConsoleOutput.ready() does not tell: a full terminal has room again once a thread of the kernel has carried on
        # what was written (flush_to_ldisc), and wakes nobody for it.
        while thread.is_alive() and not _in_poll(thread):
            time.sleep(0.001)
        assert thread.is_alive()
        output.abandon()
        thread.join(scaled(60))
        assert not thread.is_alive()
        output.write(more)
    os.close(reader)
    os.close(writer)


def test_errors_and_what_is_left() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    reader, writer = os.pipe()
    os.close(reader)
    with ConsoleOutput(writer) as output, pytest.raises(BrokenPipeError):
        output.write(b"x")
    full = os.open("/dev/full", os.O_WRONLY)
    with ConsoleOutput(full) as output, pytest.raises(OSError, match="No space left"):
        output.write(b"x")
    file = os.memfd_create("console")
    with ConsoleOutput(file) as output:
        output.write(b"text")
        assert os.pread(file, 10, 0) == b"text"
    output.close()
    for fd in (writer, full, file):
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
