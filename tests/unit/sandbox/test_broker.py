"""The broker takes descriptors before it is sealed only, and gives none but connections."""

import errno
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.memory.iomem import PhysicalRange
from offmap.memory.range_lock import RangeLock
from offmap.patience import scaled
from offmap.sandbox import broker as module
from offmap.sandbox.broker import Broker, Services


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """Give one whose vsock ports all lead to a socket of its own, and which waits for no child."""
    monkeypatch.setattr(module, "_CHILD_GRACE", 0)
    services = Services(lambda _folder, _name: socket.socketpair()[0], lambda _pid: None, lambda _wait: None)
    with Broker(services) as broker:
        yield broker


def held(broker: Broker) -> set[str]:
    """What its descriptors are."""
    folder = Path(f"/proc/{broker.pid}/fd")
    return {str(each.readlink()) for each in folder.iterdir()}


def test_descriptors_go_to_it_before_it_is_sealed(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "sock").touch()
    folder = os.open(tmp_path, os.O_PATH)
    try:
        broker.keep_folder(folder, "sock")
        assert str(tmp_path) in held(broker)
    finally:
        os.close(folder)
    with broker.connect(0, 1000) as client:
        assert client.fileno() >= 0
    with pytest.raises(OSError) as refused:
        broker.connect(1, 1000)
    assert refused.value.errno == errno.EINVAL


def test_names_of_files_need_not_be_utf_8(tmp_path: Path) -> None:
    name = "sock\udcff"

    def connect(_folder: int, asked: str) -> socket.socket:
        raise OSError(errno.EPROTO if asked == f"{name}_1000" else errno.ENOENT, asked)

    (tmp_path / name).touch()
    folder = os.open(tmp_path, os.O_PATH)
    with Broker(Services(connect, lambda _pid: None, lambda _wait: None)) as broker:
        broker.keep_folder(folder, name)
        broker.log(30, "offmap.vmm", f"about {name}")
        with pytest.raises(OSError) as refused:
            broker.connect(0, 1000)
    os.close(folder)
    assert refused.value.errno == errno.EPROTO
    assert not (tmp_path / name).exists()


def test_a_child_that_does_not_end_is_killed(broker: Broker) -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        pidfd = os.pidfd_open(child.pid)
        broker.keep_child(pidfd)
        os.close(pidfd)
        broker.close()
        assert child.wait() == -signal.SIGKILL


def test_and_never_afterwards(broker: Broker, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch()
    with file.open() as opened:
        broker.seal()
        before = held(broker)
        for request in (module._KEEP_RANGE, module._KEEP_FOLDER, module._KEEP_CHILD, module._LOG, 0):
            broker._ask(request, 0, 0, 1 << 40, text="sock", fds=[opened.fileno()])
        assert held(broker) == before
        with pytest.raises(OSError):
            broker.connect(0, 1000)


VMM = """
import os, sys
sys.path[:0] = {path!r}
from offmap.sandbox.broker import Broker, Services
from offmap.memory.range_lock import RangeLock

broker = Broker(Services(lambda _folder, _name: None, lambda _pid: None, lambda _wait: None))
lock = RangeLock({file!r})
lock.take([{range!r}], 4096, 4096)
broker.keep_range(lock.fd, 0, 4096)
lock.close()
broker.seal()
{then}
print("said", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.parametrize("then", ["pass", "broker.zeroed()", "broker.close()", "broker.zeroed(); broker.close()"])
def test_memory_stays_locked_for_as_long_as_its_vmm_may_map_it(tmp_path: Path, then: str) -> None:
    file = tmp_path / "mem"
    file.write_bytes(b"secret".ljust(4096, b"."))
    free = PhysicalRange(0, 4096)
    program = f"from offmap.memory.iomem import PhysicalRange\n{VMM}".format(
        path=sys.path, file=str(file), range=free, then=then
    )
    with (
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vmm,
        RangeLock(file) as other,
    ):
        assert vmm.stdout is not None and vmm.stdin is not None
        assert vmm.stdout.readline() == b"said\n"
        assert other.take([free], 4096, 4096) is None
        vmm.stdin.close()
        vmm.wait()
        assert other.take_soon([free], 4096, (4096,)) == free
    assert (file.read_bytes() == bytes(4096)) == ("zeroed" not in then)


def test_a_vmm_that_goes_on_without_its_broker_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "mem"
    file.write_bytes(bytes(4096))
    program = f"from offmap.memory.iomem import PhysicalRange\n{VMM}".format(
        path=sys.path,
        file=str(file),
        range=PhysicalRange(0, 4096),
        then="broker.close()",
    ).replace("broker = ", "from offmap.sandbox import broker; broker._GRACE = 1; broker = ", 1)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vmm:
        assert vmm.wait() == -signal.SIGKILL


AT_A_TERMINAL = """
import os, signal, sys, tty
sys.path[:0] = {path!r}
from offmap.sandbox.broker import Broker, Services

def ask_for_nothing(*_arguments):
    return None

vmm = os.fork()
if vmm:
    os.waitpid(vmm, 0)
    print("ended", flush=True)
    signal.pause()  # a shell stays, whatever has become of its input
    os._exit(0)
broker = Broker(Services(ask_for_nothing, ask_for_nothing, ask_for_nothing))
tty.setraw(0)
os.set_blocking(0, False)
{end}
"""
VIOLATION = "broker._ask = None; os.write(broker.fd, (31).to_bytes(4, 'little') + bytes(124)); os.read(broker.fd, 4)"


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", f"{VIOLATION}; os.kill(broker.pid, 9); os._exit(2)"]
)
def test_the_terminal_is_as_it_was_when_a_vmm_could_not_restore_it(end: str) -> None:
    pid, ours = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL.format(path=sys.path, end=end)])
    try:
        before = termios.tcgetattr(ours)
        said = b""
        while b"ended" not in said:
            said += os.read(ours, 4096)
        deadline = time.monotonic() + scaled(10.0)
        while termios.tcgetattr(ours) != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert termios.tcgetattr(ours) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)


def test_an_audit_is_started_once(tmp_path: Path) -> None:
    def audit(_pid: int) -> None:
        with (tmp_path / "started").open("a") as file:
            file.write("x")

    services = Services(lambda _folder, _name: socket.socketpair()[0], audit, lambda _wait: None)
    with Broker(services) as broker:
        for _ in range(3):
            broker.audit()
    assert (tmp_path / "started").read_text() == "x"
