"""Programs that drive machines by the library's public names alone. Each machine is a process of its own."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import offmap
from offmap.devices.serial import FIFO_SIZE, INPUT_QUEUE
from offmap.kvm import Kvm
from offmap.vmm import records

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kvm")]

PATIENCE = 60.0  # seconds

# A program that is killed while its machine runs.
PROGRAM = """
import sys, offmap
source = offmap.BootSource(sys.argv[1], None, "")
config = offmap.MachineConfig(source, offmap.parse_backend("memfd"), 32 << 20, 1, vetting=offmap.Vet())
machine = offmap.Machine(config, lambda data: print(machine_pid, flush=True))
machine_pid = machine.pid
machine.start()
sys.stdin.read()
"""


@pytest.fixture
def config(payload: Callable[[str], Path], kvm: Kvm) -> offmap.MachineConfig:
    source = offmap.BootSource(payload("monitor"), None, "")
    return offmap.MachineConfig(source, offmap.parse_backend("memfd"), 32 << 20, 1, vetting=offmap.Vet())


class Heard:
    """What a machine has said."""

    def __init__(self) -> None:
        self.said = bytearray()
        self._changed = threading.Condition()

    def __call__(self, data: bytes) -> None:
        with self._changed:
            self.said += data
            self._changed.notify_all()

    def expect(self, data: bytes) -> None:
        """Wait for it to have said exactly this."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.said) >= len(data), PATIENCE)
        assert bytes(self.said) == data


@contextmanager
def started(config: offmap.MachineConfig) -> Iterator[tuple[offmap.Machine, Heard]]:
    """Give a machine whose guest runs."""
    heard = Heard()
    with offmap.Machine(config, heard) as machine:
        machine.start()
        heard.expect(b"U")
        yield machine, heard


def wait_for_end(machine: offmap.Machine) -> offmap.Stop:
    assert select.select([machine.stopped_fd], [], [], PATIENCE)[0]
    assert machine.stopped is not None
    return machine.stopped


def status_of(pid: int | str, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{key}:"))


def test_a_guest_on_another_thread(config: offmap.MachineConfig) -> None:
    ends: list[offmap.Stop] = []
    heard = Heard()

    def live() -> None:
        with offmap.Machine(config, heard) as machine:
            assert machine.console.feed(b"abq") == 3
            machine.start()
            ends.append(wait_for_end(machine))

    thread = threading.Thread(target=live)
    thread.start()
    thread.join(PATIENCE)
    assert [end.outcome for end in ends] == [offmap.Outcome.POWERED_OFF]
    assert bytes(heard.said) == b"Uab"


def test_its_process_is_confined_and_this_one_is_not(
    config: offmap.MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "not for a guest")
    before = {name: status_of("self", name) for name in ("Seccomp", "NoNewPrivs", "CapEff", "Uid")}
    with started(config) as (machine, _):
        words = Path(f"/proc/{machine.pid}/environ").read_bytes()
        assert b"PATH=" in words
        assert b"DATABASE_PASSWORD" not in words
        assert machine.pid != os.getpid()
        assert {status_of(f"{machine.pid}/task/{task}", "Seccomp") for task in vm_threads(machine.pid)} == {"2"}
        assert (status_of(machine.pid, "NoNewPrivs"), int(status_of(machine.pid, "CapEff"), 16)) == ("1", 0)
        assert {name: status_of("self", name) for name in before} == before
        for task in os.listdir("/proc/self/task"):  # noqa: PTH208
            assert status_of(f"self/task/{task}", "Seccomp") == before["Seccomp"]
        assert Path("/etc/passwd").read_bytes()
    assert not Path(f"/proc/{machine.pid}").exists()


def vm_threads(pid: int) -> list[str]:
    """Its threads, without those that KVM has there in the kernel."""
    tasks = Path(f"/proc/{pid}/task")
    return [each.name for each in tasks.iterdir() if not (each / "comm").read_text().startswith("kvm-")]


def test_it_stands_still_and_goes_on(config: offmap.MachineConfig) -> None:
    with started(config) as (machine, heard):
        assert machine.pause()
        assert machine.console.feed(b"a") == 1
        machine.resume()
        heard.expect(b"Ua")
        reason = offmap.OffmapError("enough")
        machine.stop(offmap.Outcome.FAILED, reason)
        assert wait_for_end(machine) == offmap.Stop(offmap.Outcome.FAILED, reason)
        assert not machine.pause()


def test_it_is_started_once(config: offmap.MachineConfig) -> None:
    with started(config) as (machine, _), pytest.raises(offmap.OffmapError, match="has been started before"):
        machine.start()


def test_input_that_the_guest_does_not_take_is_refused(config: offmap.MachineConfig) -> None:
    with offmap.Machine(config, lambda _: None) as machine:
        taken = 0
        while count := machine.console.feed(b"a" * 4096):
            taken += count
        assert 0 <= taken - records.MOST_TYPED <= INPUT_QUEUE + FIFO_SIZE  # the serial port's own


def test_a_callback_may_not_wait_for_its_own_machine(config: offmap.MachineConfig) -> None:
    refused: list[str] = []
    done = threading.Event()

    def output(_data: bytes) -> None:
        try:
            machine.pause()
        except offmap.OffmapError as error:
            refused.append(str(error))
        done.set()

    with offmap.Machine(config, output) as machine:
        machine.start()
        assert done.wait(PATIENCE)
    assert refused == ["a machine cannot be paused by one of its callbacks; do it on another thread"]


def test_an_error_is_the_same_as_here(config: offmap.MachineConfig) -> None:
    nowhere = config.replace(source=offmap.BootSource("/nowhere/bzImage", None, ""))
    with pytest.raises(offmap.KernelError, match="/nowhere/bzImage") as raised:
        offmap.Machine(nowhere, lambda _: None)
    assert raised.value.errno == 2


def test_a_process_that_is_killed_ends_the_machine(config: offmap.MachineConfig) -> None:
    with started(config) as (machine, _):
        os.kill(machine.pid, signal.SIGKILL)
        stop = wait_for_end(machine)
        assert stop.outcome is offmap.Outcome.FAILED
        assert "the VM's process was ended by SIGKILL" in str(stop.error)
        assert not machine.pause()


def test_its_process_ends_with_the_program(config: offmap.MachineConfig) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(config.source.kernel)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        vm = os.pidfd_open(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        broker = os.pidfd_open(int(children[0]))
        os.kill(pid, signal.SIGSTOP)  # as if its guest had it, and it did not care
        program.kill()
        for fd in (vm, broker):
            assert select.select([fd], [], [], PATIENCE)[0]
            os.close(fd)


def test_what_is_no_record_ends_the_machine(config: offmap.MachineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(config) as (machine, _):
        monkeypatch.setattr("offmap.vmm.process.decode_from_vm", lambda _: records.decode_from_vm(b"[" * 100))
        machine.console.feed(b"a")
        stop = wait_for_end(machine)
    assert stop.outcome is offmap.Outcome.FAILED
    assert "no record" in str(stop.error)
