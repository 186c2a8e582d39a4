"""Commands in a disposable host, and how such hosts end."""

import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.lab.errors import LabEnded, LabError, LabPanic, LabTimeout
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

pytestmark = pytest.mark.lab

PATIENCE = 60.0  # seconds for what takes 4 on an idle machine
GONE = 5.0  # seconds in which a killed QEMU must be gone, on an idle machine


def qemu_pids(mark: str) -> list[int]:
    """Find the QEMU processes whose command line holds ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if words.partition(b"\0")[0].endswith(b"qemu-system-x86_64") and mark.encode() in words:
            found.append(int(folder.name))
    return found


def await_end(pid: int) -> bool:
    """Wait until a process that is not our child has ended; False if it lives on."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], scaled(GONE))[0])
    finally:
        os.close(fd)


class Launched:
    """``offmap lab exec`` as a process of its own."""

    def __init__(self, tmp_path: Path, *command: str, options: tuple[str, ...] = ()) -> None:
        self.mark = f"id=out,path={tmp_path},"
        argv = [sys.executable, "-m", "offmap.cli.main", "lab", "exec", "--out", str(tmp_path), *options]
        argv += ["--", *command]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def await_line(self, line: bytes) -> int:
        """Wait until the command has written ``line``; return its QEMU's process id."""
        assert self.process.stdout
        got = self.process.stdout.readline()
        assert got == line, (got, self.process.stderr.read() if self.process.stderr and not got else b"")
        (pid,) = qemu_pids(self.mark)
        return pid

    def finish(self) -> tuple[int, bytes, bytes]:
        """Wait for the end; return status, output and messages."""
        out, err = self.process.communicate(timeout=scaled(PATIENCE))
        return self.process.returncode, out, err

    def close(self) -> None:
        """End it, whatever the test has come to."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    """Collect what a test launches, and end it."""
    launches: list[Launched] = []
    yield launches
    for launch in launches:
        launch.close()


@pytest.fixture(scope="module", autouse=True)
def overdue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Launched, int]]:
    """A command that runs into its deadline while the other tests run, and the process id of its QEMU."""
    folder = tmp_path_factory.mktemp("overdue")
    launch = Launched(folder, "sh", "-c", "echo ready; exec sleep 1000", options=("--timeout", "30"))
    try:
        yield launch, launch.await_line(b"ready\n")
    finally:
        launch.close()


# One host for many commands.


def test_a_silent_host_is_interrupted(lab_host: LabHost) -> None:
    """A timer's interrupt that QEMU has lost comes with the next one, whatever that is; the command waits for three."""
    # The end of its input comes as one, too.
    script = """
    device=$(basename /sys/bus/virtio/drivers/virtio_console/virtio*)
    count() { grep "$device-virtqueues" /proc/interrupts; }
    for _ in 1 2 3; do
        before=$(count)
        while [ "$(count)" = "$before" ]; do sleep 0.2; done
    done
    """
    assert lab_host.output(["sh", "-c", script]).status == 0


def test_host_is_what_was_asked_for(lab_host: LabHost) -> None:
    done = lab_host.output(
        ["sh", "-c", "id -u; uname -r; cat /proc/cmdline; cat /sys/class/net/lo/flags; echo $OFFMAP_LAB"]
    )
    uid, release, cmdline, lo_flags, name = done.stdout.decode().splitlines()
    assert uid == "0"
    assert release == lab_host.release == lab_host.kernel.release
    assert cmdline.endswith("memmap=256M$0x60000000")
    assert int(lo_flags, 16) & 1  # IFF_UP
    assert name == lab_host.kernel.name


def test_reserved_range_is_not_system_ram(lab_host: LabHost) -> None:
    iomem = lab_host.output(["cat", "/proc/iomem"]).stdout.decode()
    assert "60000000-6fffffff : Reserved" in iomem


def test_exit_status_and_separate_streams(lab_host: LabHost) -> None:
    done = lab_host.output(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.status, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert lab_host.output(["sh", "-c", "kill -SEGV $$"]).status == 128 + signal.SIGSEGV


def test_binary_streams(lab_host: LabHost) -> None:
    data = random.Random(3).randbytes(1 << 20)
    done = lab_host.output(["cat"], stdin=data, timeout=scaled(PATIENCE))
    assert (done.status, done.stdout == data) == (0, True)


def test_this_machines_files_and_interpreter(lab_host: LabHost) -> None:
    program = "import numpy, offmap, sys; print(offmap.__file__, sys.prefix)"
    here = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert lab_host.output([sys.executable, "-c", program]).stdout == here.stdout


def test_output_folder_survives(lab_host: LabHost, lab_out: Path) -> None:
    assert lab_host.run(["sh", "-c", "echo kept > $OFFMAP_OUT/kept; mkdir $OFFMAP_OUT/folder"]) == 0
    assert (lab_out / "kept").read_text() == "kept\n"
    assert (lab_out / "folder").is_dir()
    (lab_out / "from-outside").write_text("seen\n")
    assert lab_host.output(["cat", lab_out / "from-outside"]).stdout == b"seen\n"


def test_other_files_are_writable_there_and_untouched_here(lab_host: LabHost, tmp_path: Path) -> None:
    changed, removed, made = (tmp_path / name for name in ("changed", "removed", "made"))
    for path in (changed, removed):
        path.write_text("before\n")
    script = f"echo after >> {changed}; cat {changed}; echo x > {made}; rm {removed}; ls {tmp_path}"
    assert lab_host.output(["sh", "-c", script]).stdout == b"before\nafter\nchanged\nmade\n"
    assert changed.read_text() == removed.read_text() == "before\n"
    assert not made.exists()


def test_kvm_works(lab_host: LabHost) -> None:
    # KVM_GET_API_VERSION is _IO(0xAE, 0x00) and returns 12 (linux/kvm.h).
    program = (
        "import fcntl; f = open('/dev/kvm', 'rb+', 0); print(fcntl.ioctl(f, 0xAE00, 0), fcntl.ioctl(f, 0xAE01, 0) > 0)"
    )
    assert lab_host.output([sys.executable, "-c", program]).stdout == b"12 True\n"


def test_modules_of_its_kernel_can_be_loaded(lab_host: LabHost) -> None:
    assert lab_host.run(["modprobe", "nbd"]) == 0
    assert lab_host.run(["test", "-d", "/sys/module/nbd"]) == 0


def test_commands_at_the_same_time(lab_host: LabHost) -> None:
    out = bytearray()
    reader = lab_host.popen(["cat"], stdout=out.extend, keep_stdin=True)
    others = [lab_host.popen(["sh", "-c", f"exit {number}"]) for number in range(5)]
    reader.write(b"one ")
    assert [command.wait(scaled(PATIENCE)) for command in others] == list(range(5))
    assert reader.poll() is None
    reader.write(b"two")
    reader.close_stdin()
    assert reader.wait(scaled(PATIENCE)) == 0
    assert out == b"one two"


def test_command_with_a_terminal(lab_host: LabHost) -> None:
    out = bytearray()
    command = lab_host.popen(
        ["sh", "-c", "tty; stty size; read x; echo got $x"], stdout=out.extend, keep_stdin=True, terminal=(31, 97)
    )
    command.write(b"line\n")
    assert command.wait(scaled(PATIENCE)) == 0
    text = out.decode()
    assert "/dev/pts/" in text
    assert "31 97" in text
    assert "got line" in text


def test_command_that_takes_too_long(lab_host: LabHost) -> None:
    with pytest.raises(LabTimeout, match="sleep did not end in 1 s"):
        lab_host.run(["sleep", "1000"], timeout=1)
    assert lab_host.output(["sh", "-c", "ps ax | grep -c '[s]leep 1000'"]).stdout == b"0\n"


def test_unknown_program(lab_host: LabHost) -> None:
    with pytest.raises(LabError, match="cannot run nonesuch in the lab host: No such file"):
        lab_host.run(["nonesuch"])


# Hosts of their own, and their ends.


def test_panic_is_reported_at_once(lab_kernel: HostKernel) -> None:
    with LabHost.start(lab_kernel, memory="512M") as host:
        began = time.monotonic()
        with pytest.raises(LabPanic, match="sysrq triggered crash") as caught:
            host.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], timeout=scaled(PATIENCE))
        assert time.monotonic() - began < scaled(10)
        assert "Call Trace" in caught.value.oops
        with pytest.raises(LabPanic):
            host.run(["true"])


def test_host_that_powers_off_is_reported(lab_kernel: HostKernel) -> None:
    with LabHost.start(lab_kernel, memory="512M") as host, pytest.raises(LabEnded, match="powered off or reset"):
        # The power goes some time after the disks: a command that needs a file still, to run sleep, would end before.
        host.run(["sh", "-c", "echo o > /proc/sysrq-trigger; kill -STOP $$"], timeout=scaled(PATIENCE))


def test_boot_that_fails_says_why(lab_kernel: HostKernel) -> None:
    with pytest.raises(LabPanic, match="Unable to mount root fs"):
        LabHost.start(lab_kernel, memory="512M", cmdline="rdinit=/none init=/none")
    with pytest.raises(LabTimeout, match=r"did not come up in 0\.5 s"):
        LabHost.start(lab_kernel, memory="512M", timeout=0.5, fresh=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("not root, so no small disk can be mounted: a full disk in the output folder is not tested")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_full_disk_is_the_commands_own_problem(lab_kernel: HostKernel, small_disk: Path) -> None:
    with LabHost.start(lab_kernel, memory="512M", out=small_disk) as host:
        done = host.output(["sh", "-c", "head -c 2000000 /dev/zero > $OFFMAP_OUT/file; echo $?"])
        assert done.stdout == b"1\n"
        assert b"No space left on device" in done.stderr
        assert host.output(["echo", "still here"]).stdout == b"still here\n"


def test_command_that_uses_up_all_memory(lab_kernel: HostKernel) -> None:
    with LabHost.start(lab_kernel, memory="512M") as host:
        hog = "a = []\nwhile True: a.append(bytearray(1 << 24))"
        done = host.output([sys.executable, "-c", hog], timeout=scaled(PATIENCE))
        assert done.status in (1, 128 + signal.SIGKILL)  # MemoryError, or the out-of-memory killer
        assert host.output(["echo", "still here"]).stdout == b"still here\n"
        assert "invoked oom-killer" in host.console.text or b"MemoryError" in done.stderr


@pytest.mark.parametrize("death_signal", [True, False])
def test_killed_launcher_leaves_nothing(
    tmp_path: Path, launched: list[Launched], monkeypatch: pytest.MonkeyPatch, death_signal: bool
) -> None:
    """Both nets hold: the death signal of the parent, and the agent that sees the end of its socket."""
    if not death_signal:
        fake = tmp_path / "bin/setpriv"
        fake.parent.mkdir()
        fake.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    launch = Launched(tmp_path, "sh", "-c", "echo ready; exec sleep 1000")
    launched.append(launch)
    pid = launch.await_line(b"ready\n")
    launch.process.kill()
    assert await_end(pid)


def test_interrupt_is_the_commands_to_handle(tmp_path: Path, launched: list[Launched]) -> None:
    handler = "import signal, sys; signal.signal(2, lambda *_: sys.exit(9)); print('ready', flush=True); signal.pause()"
    launch = Launched(tmp_path, sys.executable, "-c", handler)
    launched.append(launch)
    pid = launch.await_line(b"ready\n")
    launch.process.send_signal(signal.SIGINT)
    assert launch.finish()[0] == 9
    assert await_end(pid)


def test_second_interrupt_ends_it(tmp_path: Path, launched: list[Launched]) -> None:
    handler = "import signal; signal.signal(2, lambda *_: print('again', flush=True)); print('ready', flush=True)"
    handler += "\nwhile 1: signal.pause()"
    launch = Launched(tmp_path, sys.executable, "-c", handler)
    launched.append(launch)
    pid = launch.await_line(b"ready\n")
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.stdout
    assert launch.process.stdout.readline() == b"again\n"
    launch.process.send_signal(signal.SIGINT)
    assert launch.finish()[0] == 128 + signal.SIGINT
    assert await_end(pid)


def test_reader_of_the_output_that_leaves(tmp_path: Path, launched: list[Launched]) -> None:
    launch = Launched(tmp_path, "yes")
    launched.append(launch)
    pid = launch.await_line(b"y\n")
    assert launch.process.stdout
    launch.process.stdout.close()
    assert launch.process.wait(scaled(PATIENCE)) == 128 + signal.SIGPIPE
    assert await_end(pid)


def test_exec_on_a_terminal(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "offmap.cli.main", "lab", "exec", "--out", str(tmp_path), "--", "sh"]
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    seen = bytearray()
    try:
        _await(ours, seen, b"# ")
        os.write(ours, b"sh -c 'echo $((20+3)); exec sleep 1000'\r")
        _await(ours, seen, b"\r\n23\r\n")
        os.write(ours, b"\x03")  # Ctrl-C is the command's, not ours
        os.write(ours, b"tty; echo $((6*7)); exit 5\r")
        _await(ours, seen, b"\r\n42\r\n")
        assert process.wait(scaled(PATIENCE)) == 5
        assert b"/dev/pts/0" in seen
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def _await(fd: int, seen: bytearray, text: bytes) -> None:
    deadline = time.monotonic() + scaled(PATIENCE)
    while text not in seen:
        assert select.select([fd], [], [], max(0, deadline - time.monotonic()))[0], bytes(seen)
        seen += os.read(fd, 4096)


def test_exec_deadline_leaves_nothing(overdue: tuple[Launched, int]) -> None:
    launch, pid = overdue
    status, _, err = launch.finish()
    assert status == 2
    assert b"did not end in" in err
    assert len(err.splitlines()) == 1
    assert await_end(pid)
