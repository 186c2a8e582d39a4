"""Whole machines with a guest of a few hundred bytes: every end there is, and what is left after it."""

import contextlib
import ctypes
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from offmap.boot.linux import BootSource
from offmap.errors import OffmapError
from offmap.hide import Vet
from offmap.kvm import Kvm
from offmap.memory.anon import Anon
from offmap.memory.backend import Backend
from offmap.memory.memfd import Memfd
from offmap.patience import scaled
from offmap.uapi.syscall import NUMBERS
from offmap.vmm.config import MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.session import Session

from .conftest import descriptors

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kvm")]

MIB = 1 << 20
PATIENCE = scaled(30.0)  # seconds for what takes a tenth of one
PROMPT = scaled(5.0)  # seconds in which a stop must have happened


@pytest.fixture
def monitor(payload: Callable[[str], Path], kvm: Kvm) -> Path:
    """Give the guest that obeys single letters (payloads/monitor.S), where it can run."""
    return payload("monitor")


def config(kernel: Path, backend: Backend | None = None, vcpus: int = 1, size: int = 32 * MIB) -> MachineConfig:
    return MachineConfig(BootSource(kernel, None, ""), backend or Anon(), size, vcpus, vetting=Vet())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # of another process's threads nothing tells


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def kvm_mappings() -> int:
    return sum("kvm" in line or "memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines())


def run(machine: MachineConfig, typed: bytes) -> tuple[Stop, bytes]:
    """A session whose input is `typed`; how it ended and what its console said."""
    read, write = os.pipe()
    out = os.memfd_create("console")
    try:
        os.write(write, typed)
        stop = Session(machine, stdin=read, stdout=out, say=lambda _: None).run()
        return stop, os.pread(out, 1 << 16, 0)
    finally:
        for fd in (read, write, out):
            os.close(fd)


@pytest.mark.parametrize(
    ("typed", "outcome", "said"),
    [
        (b"abcq", Outcome.POWERED_OFF, b"Uabc"),
        (b"r", Outcome.RESET, b"U"),
        (b"k", Outcome.RESET, b"U"),
        (b"t", Outcome.FAILED, b"U"),
        (b"ab\x01x", Outcome.QUIT, None),
        (b"\x01aq", Outcome.POWERED_OFF, b"U\x01"),
    ],
)
def test_how_a_guest_ends(monitor: Path, typed: bytes, outcome: Outcome, said: bytes | None) -> None:
    before, threads_before = descriptors(), threads()
    stop, console = run(config(monitor), typed)
    assert stop.outcome is outcome
    assert said is None or console == said
    if outcome is Outcome.FAILED:
        assert "the guest triple-faulted" in str(stop.error)
        assert "\n" not in str(stop.error)
    assert (descriptors(), threads()) == (before, threads_before)


def test_everything_typed_arrives(monitor: Path) -> None:
    text = b"The letters of this line are echoed one by one, but for those ".translate(None, b"qrktshfzm") * 60
    _, console = run(config(monitor), text + b"q")
    assert console == b"U" + text


def test_making_and_closing_leaves_nothing(monitor: Path) -> None:
    def one_round(number: int) -> None:
        backend = Memfd() if number % 2 else Anon()
        with Machine(config(monitor, backend, vcpus=1 + number % 4), lambda _: None) as machine:
            if number % 3:
                machine.start()
            if number % 3 == 2:
                machine.stop(Outcome.QUIT)

    one_round(0)
    before, threads_before, mappings = descriptors(), threads(), kvm_mappings()
    for number in range(20):
        one_round(number)
    assert descriptors() == before
    assert threads() == threads_before
    assert kvm_mappings() == mappings


def test_a_machine_that_cannot_be_made_leaves_nothing(tmp_path: Path, monitor: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(monitor.read_bytes()[:200])
    small = tmp_path / "initrd"
    small.write_bytes(b"x")
    before, mappings = descriptors(), kvm_mappings()
    bad = [
        config(kernel),  # found out after everything has been made
        config(monitor, size=4096),
        config(monitor, Memfd(), size=1 << 40),
        MachineConfig(BootSource(monitor, tmp_path / "none", ""), Anon(), 32 * MIB, vetting=Vet()),
        MachineConfig(BootSource(monitor, small, "x" * 3000), Anon(), 32 * MIB, vetting=Vet()),
    ]
    for one in bad:
        with pytest.raises(OffmapError) as caught:
            Machine(one, lambda _: None)
        assert "\n" not in str(caught.value)
        del caught
    assert descriptors() == before
    assert kvm_mappings() == mappings


def test_stop_ends_every_vcpu_promptly_and_only_the_first_counts(monitor: Path) -> None:
    with Machine(config(monitor, vcpus=4), lambda _: None) as machine:
        machine.start()
        assert len([name for name in threads() if name.startswith("vcpu")]) == 4
        machine.stop(Outcome.QUIT)
        machine.stop(Outcome.FAILED, OffmapError("late"))
        assert select.select([machine.stopped_fd], [], [], PROMPT)[0]
        for thread in threading.enumerate():
            if thread.name.startswith("vcpu"):
                thread.join(PROMPT)
        assert not [name for name in threads() if name.startswith("vcpu")]
        assert machine.stopped == Stop(Outcome.QUIT)


# The command


class Command:
    """``offmap run`` on the monitor, as a process of its own."""

    def __init__(self, monitor: Path, *options: str, **streams: Any) -> None:
        argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(monitor), "--memory-size", "32M", *options]
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | streams
        self.process: subprocess.Popen[bytes] = subprocess.Popen(argv, bufsize=0, text=False, **pipes)

    def await_up(self) -> None:
        self.says(b"U")

    def says(self, text: bytes) -> None:
        """Wait for this, which may come in pieces, and nothing else."""
        assert self.process.stdout
        said = b""
        while len(said) < len(text) and (piece := self.process.stdout.read(len(text) - len(said))):
            said += piece
        assert said == text

    def keys(self, typed: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(typed)

    def finish(self) -> tuple[int, str]:
        """Its status and what it said on standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, (errors or b"").decode()


@pytest.fixture
def command(monitor: Path) -> Iterator[Callable[..., Command]]:
    """Give a function that starts ``offmap run``."""
    started: list[Command] = []

    def start(*options: str, **streams: Any) -> Command:
        started.append(Command(monitor, *options, **streams))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_in_one_line(command: Callable[..., Command], number: signal.Signals) -> None:
    one = command()
    one.await_up()
    one.keys(b"s")  # the guest spins
    one.process.send_signal(number)
    assert one.finish() == (2, f"offmap run: stopped by {number.name}\n")


@pytest.mark.parametrize("options", [(), ("--no-sandbox",)], ids=["confined", "not confined"])
def test_a_signal_is_heard_on_whatever_thread_it_comes(command: Callable[..., Command], options: Sequence[str]) -> None:
    one = command(*options)
    one.await_up()
    one.keys(b"as")
    one.says(b"a")
    pid = one.process.pid
    tasks = {int(path.name): (path / "comm").read_text() for path in Path(f"/proc/{pid}/task").iterdir()}
    (thread,) = {task for task, name in tasks.items() if name == tasks[pid]} - {pid}  # KVM has its own in there
    assert ctypes.CDLL(None).syscall(NUMBERS["tgkill"], pid, thread, signal.SIGTERM) == 0
    assert one.process.wait(PATIENCE) == 2  # while it has input: the end of that would wake the main thread
    assert one.finish()[1].endswith("offmap run: stopped by SIGTERM\n")


def test_input_that_ends_does_not_end_the_guest(command: Callable[..., Command]) -> None:
    one = command()
    one.await_up()
    assert one.process.stdin
    one.process.stdin.write(b"a")
    one.process.stdin.close()
    assert one.process.stdout
    assert one.process.stdout.read(1) == b"a"
    assert one.process.poll() is None
    one.process.terminate()
    one.process.stdin = None
    assert one.finish()[0] == 2


def test_input_from_a_file_and_from_nowhere(command: Callable[..., Command], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(b"abq")
    with keys.open("rb") as file:
        one = command(stdin=file)
        assert one.finish() == (0, "")
    one = command(stdin=subprocess.DEVNULL)
    one.await_up()
    one.process.send_signal(signal.SIGTERM)
    assert one.finish()[0] == 2


def test_a_reader_that_goes_away_ends_it(command: Callable[..., Command]) -> None:
    one = command()
    one.await_up()
    assert one.process.stdout
    one.process.stdout.close()
    one.process.stdout = None
    one.keys(b"a")
    status, errors = one.finish()
    assert status == 2
    assert errors == "offmap run: writing what the guest's console says failed: Broken pipe (EPIPE)\n"


def test_no_thread_is_kicked_before_it_can_bear_it(monitor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal would end the whole process, and leave the guest's RAM as it is."""
    stopped = threading.Event()
    kicked: list[threading.Thread] = []
    monkeypatch.setattr("offmap.vmm.machine.accept_kicks", stopped.wait)
    monkeypatch.setattr("offmap.vmm.machine.kick", kicked.append)
    with Machine(config(monitor, vcpus=2), lambda _: None) as machine:
        machine.start()
        machine.stop(Outcome.QUIT)
        assert not kicked
        stopped.set()
    assert not {name for name in threads() if name.startswith("vcpu")}


@pytest.mark.parametrize("how", ["signal", "keys"])
def test_a_reader_that_reads_nothing_does_not_keep_it_alive(command: Callable[..., Command], how: str) -> None:
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        one = command("--vcpus", "2", stdout=writer)
        one.keys(b"abc" * 500)
        pidfile = Path(f"/proc/{one.process.pid}/task")
        wait_until(lambda: len(list(pidfile.iterdir())) > 1)
        if how == "signal":
            one.process.send_signal(signal.SIGTERM)
            assert one.finish() == (2, "offmap run: stopped by SIGTERM\n")
        else:
            one.keys(b"\x01x")
            assert one.finish() == (0, "")
    finally:
        os.close(reader)
        os.close(writer)


def test_a_slow_reader_gets_everything(command: Callable[..., Command]) -> None:
    text = b"0123456789abcdegijlnopuvwxy\n" * 300
    one = command()
    one.keys(text + b"q")
    assert one.process.stdin
    assert one.process.stdout
    assert one.process.stdout.read(1) == b"U"
    assert os.get_blocking(one.process.stdout.fileno())
    said, _ = one.process.communicate(timeout=PATIENCE)
    assert said == text


def test_a_full_disk_ends_it(command: Callable[..., Command]) -> None:
    with Path("/dev/full").open("wb") as full:
        status, errors = command(stdout=full).finish()
    assert (status, errors.count("\n")) == (2, 1)
    assert "No space left on device" in errors
    one = command("--report", "/dev/full")
    one.keys(b"q")
    status, errors = one.finish()
    assert (status, errors) == (
        2,
        "offmap run: cannot write the report /dev/full: No space left on device; give another file\n",
    )


def test_triple_fault_is_one_line_and_status_2(command: Callable[..., Command]) -> None:
    one = command()
    one.keys(b"t")
    status, errors = one.finish()
    assert status == 2
    assert errors.startswith("offmap run: the guest triple-faulted (vCPU 0 at rip 0x10000")
    assert errors.count("\n") == 1


def test_terminal_is_raw_while_it_runs_and_restored_after(command: Callable[..., Command]) -> None:
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        one = command(stdin=slave)
        one.await_up()
        assert termios.tcgetattr(slave) != before
        os.write(master, b"\x03a")  # Ctrl-C is the guest's
        one.says(b"\x03a")
        os.write(master, b"\x01h")
        assert one.process.stderr
        line = b"offmap run: Ctrl-A x: quit; Ctrl-A a: send Ctrl-A; Ctrl-A h: this help\n"
        assert one.process.stderr.readline() == line
        os.write(master, b"\x01x")
        assert one.finish() == (0, "")
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_statistics(command: Callable[..., Command], tmp_path: Path) -> None:
    one = command("--stats", "--report", str(tmp_path / "report.json"), "--vcpus", "2")
    one.keys(b"q")
    status, errors = one.finish()
    assert status == 0
    assert "32 MiB of RAM ready in" in errors
    assert "io 0x600 out" in errors
    assert "nested page tables: " in errors
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == "offmap-run/1"
    assert report["nested_pages"] is None or set(report["nested_pages"]) == {"4K", "2M", "1G"}


@pytest.mark.parametrize("quit_by_user", [False, True])
def test_audit_that_can_see_nothing_here_is_undetermined(command: Callable[..., Command], quit_by_user: bool) -> None:
    if Path("/proc/kcore").exists():
        pytest.skip("this machine has a /proc/kcore, so its absence was not tested (the lab does)")
    one = command("--audit")
    one.await_up()
    assert one.process.stderr
    line = one.process.stderr.readline().decode()
    assert line.startswith("offmap audit: ")
    assert "/proc/kcore" in line
    (broker,) = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
    (child,) = Path(f"/proc/{broker}/task/{broker}/children").read_text().split()
    pidfd = os.pidfd_open(int(child))
    try:
        assert select.select([pidfd], [], [], PATIENCE)[0]
    finally:
        os.close(pidfd)
    one.keys(b"\x01x" if quit_by_user else b"q")
    assert one.finish() == (3, "")
