"""Real guests on every kind of RAM, and what becomes of the host when they misbehave or are killed."""

import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offmap.boot.packed import unpacked
from offmap.compare.guest import READY, guest_initramfs
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

from .console import CMDLINE, PATIENCE, Guest

pytestmark = pytest.mark.lab

MIB = 1 << 20
RESERVED_START = 0x60000000  # conftest.RESERVED
RESERVED_END = 0x70000000
PATTERN_START = 32 * MIB  # monitor.S

PEEK = """
import mmap, os, sys
start, size = int(sys.argv[1]), int(sys.argv[2])
with mmap.mmap(os.open("/dev/mem", os.O_RDONLY), size, prot=mmap.PROT_READ, offset=start) as memory:
    print("zero" if memory[:] == bytes(size) else memory[:8].hex())
"""


@pytest.fixture(scope="module")
def initrd(lab_host: LabHost) -> Path:
    """Give the initramfs of offmap's small guest, where the shared host can see it."""
    assert lab_host.options.out is not None
    path = lab_host.options.out / "guest.initramfs"
    path.write_bytes(guest_initramfs())
    return path


@pytest.fixture(scope="module")
def monitor(lab_host: LabHost, payload: Callable[[str], Path]) -> Path:
    """Give the guest that obeys single letters (payloads/monitor.S), where the shared host can see it."""
    assert lab_host.options.out is not None
    path = lab_host.options.out / "monitor.elf"
    path.write_bytes(payload("monitor").read_bytes())
    return path


@pytest.fixture(autouse=True)
def host_stays_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after each test that the shared host still runs commands, and that no VMM is left in it."""
    yield
    if "lab_host" in request.fixturenames:
        host: LabHost = request.getfixturevalue("lab_host")
        left = host.output(
            ["sh", "-c", "grep -l offmap-memslots /proc/[0-9]*/maps; ls -l /proc/[0-9]*/fd | grep memslots"]
        )
        assert left.stdout == b""


def peek(host: LabHost, start: int, size: int) -> str:
    """What physical memory holds: "zero", or its first 8 bytes."""
    done = host.output([sys.executable, "-I", "-S", "-c", PEEK, str(start), str(size)])
    assert done.status == 0, done.stderr
    return done.stdout.decode().strip()


def children(host: LabHost, pid: int) -> list[int]:
    """The processes that a process has started: of a VMM its broker, of a broker its audit."""
    return [int(word) for word in host.output(["cat", f"/proc/{pid}/task/{pid}/children"]).stdout.split()]


def await_end(host: LabHost, pid: int) -> None:
    """Wait until a process has ended, whether or not somebody has asked for its status."""
    script = f"while [ -e /proc/{pid} ] && ! grep -q '^State:.Z' /proc/{pid}/status; do sleep 0.1; done 2>/dev/null"
    assert host.output(["sh", "-c", script], timeout=scaled(PATIENCE)).status == 0


def physical(host: LabHost, guest: Guest) -> list[tuple[int, int]]:
    """The ranges of /dev/mem that a VMM has mapped."""
    found = []
    for line in host.output(["cat", f"/proc/{guest.pid}/maps"]).stdout.decode().splitlines():
        words = line.split()
        if words[-1] == "/dev/mem":
            start, end = (int(part, 16) for part in words[0].split("-"))
            found.append((int(words[2], 16), int(words[2], 16) + end - start))
    return found


def refused(host: LabHost, status: int, *options: str, wrapper: tuple[str, ...] = ()) -> str:
    """An ``offmap run`` that must fail with this status and one line."""
    done = host.output([*wrapper, sys.executable, "-m", "offmap", "run", *options])
    text = done.stderr.decode()
    assert (done.status, done.stdout) == (status, b""), text
    assert text.count("\n") == 1, text
    return text


# Linux


def test_linux_on_reserved_memory(lab_host: LabHost, lab_kernel: HostKernel, initrd: Path) -> None:
    with Guest(
        lab_host,
        lab_kernel.vmlinuz,
        *("--initrd", str(initrd), "--cmdline", CMDLINE, "--memory", "reserved", "--vcpus", "2", "--audit"),
    ) as guest:
        guest.expect(READY)
        guest.expect_error("^HIDDEN: ")
        assert guest.shell("nproc") == "2"

        clock = "/sys/devices/system/clocksource/clocksource0"
        assert guest.shell(f"cat {clock}/current_clocksource") == "tsc"
        assert "kvm-clock" not in guest.shell(f"cat {clock}/available_clocksource")
        log = guest.shell("dmesg")
        assert "kvm-clock" not in log
        # The TSC's frequency was handed over. The processor's is still tried for against a PIT, which is absent, and
        # that costs a few exits (tsc_early_init in arch/x86/kernel/tsc.c). The delay loop of a second processor without
        # constant_tsc, as this emulated one, is timed by itself, which a starved host can spoil; not looked at here.
        tsc = {line.partition("] ")[2] for line in log.splitlines() if "TSC" in line or "tsc" in line}
        assert {line for line in tsc if "fail" in line or "nable" in line} <= {"tsc: Fast TSC calibration failed"}
        assert "tsc: Detected" in log
        assert not [line for line in log.splitlines() if "unstable" in line]
        flags = guest.shell("grep -m1 ^flags /proc/cpuinfo").split()
        assert "constant_tsc" in flags or "tsc" in flags
        assert not {"svm", "vmx"} & set(flags)

        before = int(lab_host.output(["date", "+%s"]).stdout)
        inside = int(guest.shell("date +%s"))
        after = int(lab_host.output(["date", "+%s"]).stdout)
        assert before - 2 <= inside <= after + 2
        check_clock(guest)

        paste(guest)
        # In a process of its own, which is in the foreground by the time it speaks: a Ctrl-C that comes while the shell
        # is starting one goes to the shell.
        guest.keys("sh -c 'echo sleep\"\"ing; exec sleep 1000'\n")
        guest.expect("sleeping\r\n")
        guest.keys("\x03")
        assert guest.shell("echo still here") == "still here"
        guest.keys("poweroff -f\n")
        assert guest.end() == 0, guest.errors
    assert peek(lab_host, RESERVED_START, RESERVED_END - RESERVED_START) == "zero"


UPTIME = "cut -d' ' -f1 /proc/uptime"


def check_clock(guest: Guest) -> None:
    """The guest's clock runs as fast as ours, and its timers fire when they are due by its clock.

    A busy machine delays every answer. So our clock is read before and after each reading of the guest's, and the span
    grows until the delays are less than a tenth of it.
    """

    def read() -> tuple[float, float, float]:
        return time.monotonic(), float(guest.shell(UPTIME)), time.monotonic()

    before, first, after = read()
    naps: list[float] = []
    shortest = longest = seconds = 0.0
    while not naps or longest > 1.1 * shortest or (min(naps) > 2.3 and len(naps) < 20):
        start, end = map(float, guest.shell(f"{UPTIME}; sleep 2; {UPTIME}").split())
        naps.append(end - start)
        asked, inside, answered = read()
        shortest, seconds, longest = asked - after, inside - first, answered - before
    assert 0.95 * shortest < seconds < 1.05 * longest
    assert 1.98 < min(naps) < 2.3, "a delay by others is in all of twenty, or the timer is wrong"


def paste(guest: Guest) -> None:
    """Paste into the guest's terminal at once, and see that all of it has arrived."""
    letters = random.Random(7)
    text = "".join(f"{letters.randbytes(31).hex()}\n" for _ in range(280))
    assert len(text) > 16 << 10
    guest.keys('stty -echo; echo "rea"dy; cat >/tmp/pasted; stty echo\n')
    guest.expect("ready\r\n")
    guest.keys(f"{text}\x04")
    assert guest.shell("md5sum /tmp/pasted").split()[0] == hashlib.md5(text.encode()).hexdigest()
    # Through the shell's line editor, which echoes each letter by itself: input and output in each other's way. Ten
    # times slower (a second and a half for each KiB in a guest of an emulated host), so less of it.
    text = text[: 64 * 63]
    guest.keys(f"cat >/tmp/pasted <<'END'\n{text}END\n")
    assert guest.shell("md5sum /tmp/pasted").split()[0] == hashlib.md5(text.encode()).hexdigest()


def test_linux_on_plain_memory(lab_host: LabHost, lab_kernel: HostKernel, initrd: Path) -> None:
    """The control of all that was absent on reserved memory: here it is there."""
    with Guest(
        lab_host,
        lab_kernel.vmlinuz,
        *("--initrd", str(initrd), "--cmdline", CMDLINE, "--kvm-clock", "on", "--vcpus", "4", "--audit"),
    ) as guest:
        guest.expect(READY)
        guest.expect_error("^EXPOSED: ")
        assert guest.shell("nproc") == "4"
        assert guest.shell("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock"
        assert {"svm", "vmx"} & set(guest.shell("grep -m1 ^flags /proc/cpuinfo").split())
        guest.keys("reboot -f\n")
        assert guest.end() == 1, guest.errors


def test_vmlinux_with_ram_above_4_gib_reboots_by_the_keyboard_controller(
    lab_kernel: HostKernel, tmp_path: Path
) -> None:
    vmlinux, initrd = tmp_path / "vmlinux", tmp_path / "guest.initramfs"
    vmlinux.write_bytes(unpacked(lab_kernel.vmlinuz))
    initrd.write_bytes(guest_initramfs())
    assert vmlinux.read_bytes().startswith(b"\x7fELF")
    with (
        LabHost.start(lab_kernel, memory="5G") as host,
        Guest(
            host,
            vmlinux,
            *("--initrd", str(initrd), "--cmdline", f"{CMDLINE} reboot=k", "--memory-size", "4G"),
        ) as guest,
    ):
        guest.expect(READY)
        iomem = guest.shell("cat /proc/iomem")
        assert "100000000-13fffffff : System RAM" in iomem
        assert int(guest.shell("grep MemTotal /proc/meminfo").split()[1]) > 3800 << 10
        guest.keys("reboot -f\n")
        assert guest.end() == 0, guest.errors


# Guests that misbehave


def test_pvclock_msrs_fault_on_hidden_memory(lab_host: LabHost, monitor: Path) -> None:
    with Guest(lab_host, monitor, "--memory", "reserved", "--memory-size", "128M") as hidden:
        hidden.expect("U")
        hidden.keys("m")
        assert hidden.expect("([WG]*)M") == "GGGG"
        hidden.keys("aq")
        hidden.expect("a")
        assert hidden.end() == 0
    assert lab_host.output(["echo", "up"]).stdout == b"up\n"
    # The control: the same writes do something where KVM may map the page.
    with Guest(lab_host, monitor, "--memory-size", "128M", "--kvm-clock", "on") as plain:
        plain.expect("U")
        plain.keys("m")
        assert plain.expect("([WG]*)M") == "WWWW"
        plain.keys("q")
        assert plain.end() == 0


def test_two_guests_share_the_reserved_memory_and_a_third_is_refused(lab_host: LabHost, monitor: Path) -> None:
    options = ("--memory", "reserved", "--memory-size", "128M")
    with Guest(lab_host, monitor, *options) as first, Guest(lab_host, monitor, *options) as second:
        first.expect("U")
        second.expect("U")
        ranges = sorted(physical(lab_host, first) + physical(lab_host, second))
        assert ranges == [(RESERVED_START, RESERVED_START + 128 * MIB), (RESERVED_START + 128 * MIB, RESERVED_END)]
        text = refused(lab_host, 2, "--kernel", str(monitor), *options)
        assert text.startswith("offmap run: refused: no 128 MiB of reserved physical memory are free")
        assert "256 MiB of it in use, largest free run 0 B" in text

        # A VMM that is killed cannot zero its guest's memory. Its broker does.
        ((base, end),) = physical(lab_host, first)
        first.keys("fz")
        first.expect("FD")
        broker = children(lab_host, first.pid)[0]
        assert peek(lab_host, base + PATTERN_START, 4096) != "zero"
        lab_host.output(
            ["sh", "-c", "kill -9 $0", str(first.pid)]
        )  # the shell's own: minimal systems have no kill command
        assert first.end() == 128 + 9
        await_end(lab_host, broker)
        assert peek(lab_host, base + PATTERN_START, 4096) == "zero"
        with Guest(lab_host, monitor, "--memory", f"reserved,base={base:#x}", "--memory-size", "128M") as third:
            third.expect("U")
            assert physical(lab_host, third) == [(base, end)]
            third.keys("z")
            third.expect("Z")
            third.keys("f")
            third.expect("F")
            third.keys("s")
            third.command.send_signal(15)
            assert third.end() == 2
            assert third.errors == "offmap run: stopped by SIGTERM\n"
        assert peek(lab_host, base, end - base) == "zero"
        second.keys("z")
        second.expect("Z")
        second.keys("q")
        assert second.end() == 0


SANDBOX = """
import os, stat, sys
pid = sys.argv[1]
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open(f"/proc/{pid}/status"))
tasks = [open(f"/proc/{pid}/task/{task}/status").read() for task in os.listdir(f"/proc/{pid}/task")]
print(status["Uid"].split()[0], status["CapEff"], status["CapPrm"], status["NoNewPrivs"])
print(len(tasks), sum("Seccomp:\\t2" in task for task in tasks))
print(os.listdir(f"/proc/{pid}/root/"))
for kind in ("mnt", "net", "ipc", "uts", "cgroup"):
    print(kind, os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"))
for fd in os.listdir(f"/proc/{pid}/fd"):
    opened, name = os.stat(f"/proc/{pid}/fd/{fd}"), os.readlink(f"/proc/{pid}/fd/{fd}")
    if stat.S_ISDIR(opened.st_mode) or name in ("/dev/mem", "/dev/kvm", "/dev/offmap"):
        print("bad", fd, name)
"""


def test_a_vmm_has_no_rights_and_no_descriptor_that_reaches_further(lab_host: LabHost, monitor: Path) -> None:
    options = ("--memory", "reserved", "--memory-size", "64M", "--rng", "--vcpus", "2")
    with Guest(lab_host, monitor, *options) as guest:
        guest.expect("U")
        done = lab_host.output([sys.executable, "-I", "-S", "-c", SANDBOX, str(guest.pid)])
        who, threads, root, *rest = done.stdout.decode().splitlines()
        uid, *rights = who.split()
        assert int(uid) > 1 << 30
        assert rights == ["0000000000000000", "0000000000000000", "1"]
        count, filtered = threads.split()
        assert count == filtered and int(count) >= 4, "each thread has a filter; KVM may have one of its own"
        assert root == "[]"
        assert rest == [f"{kind} True" for kind in ("mnt", "net", "ipc", "uts", "cgroup")]
        guest.keys("q")
        assert guest.end() == 0
    # The control: without it, all of that is root's.
    with Guest(lab_host, monitor, *options, "--no-sandbox") as guest:
        guest.expect("U")
        done = lab_host.output([sys.executable, "-I", "-S", "-c", SANDBOX, str(guest.pid)])
        assert done.stdout.startswith(b"0 ")
        assert b" /dev/mem\n" in done.stdout
        guest.keys("q")
        assert guest.end() == 0
        assert "no sandbox: a guest that breaks into this process" in guest.errors


def test_secretmem_is_refused_with_the_reason(lab_host: LabHost, monitor: Path) -> None:
    text = refused(lab_host, 2, "--kernel", str(monitor), "--memory", "secretmem", "--memory-size", "32M")
    assert "refused: this kernel's GUP refuses memfd_secret pages to KVM" in text
    assert "--memory reserved" in text


def test_without_kcore_the_audit_cannot_say(lab_host: LabHost, monitor: Path) -> None:
    wrapper = ("unshare", "-m", "sh", "-c", 'mount --bind /dev/null /proc/kcore && exec "$@"', "sh")
    options = ("--memory", "reserved", "--memory-size", "64M", "--audit")
    with Guest(lab_host, monitor, *options, wrapper=wrapper) as guest:
        guest.expect("U")
        guest.expect_error("offmap audit: .*/proc/kcore.*\n")
        # Its status can be had once it has ended.
        (broker,) = children(lab_host, guest.pid)
        (audit,) = children(lab_host, broker)
        await_end(lab_host, audit)
        guest.keys("q")
        assert guest.end() == 3
        assert guest.errors.count("\n") == 1


def test_more_than_is_there_is_refused(lab_host: LabHost, monitor: Path) -> None:
    kernel = ("--kernel", str(monitor))
    assert "this host cannot give 8 GiB of RAM: it has" in refused(lab_host, 2, *kernel, "--memory-size", "8G")
    text = refused(lab_host, 2, *kernel, "--memory", "reserved", "--memory-size", "512M")
    assert "256 MiB reserved, 0 B of it in use, largest free run 256 MiB" in text
    text = refused(lab_host, 2, *kernel, "--memory", "hugetlb")
    assert "needs 128 huge pages and this host has 0 free; run: echo 128 >" in text
    text = refused(lab_host, 2, *kernel, "--memory", "guest_memfd")
    assert "guest_memfd" in text and "6.18" in text


@pytest.mark.parametrize(("capability", "message"), [("sys_rawio", "/dev/mem"), ("sys_admin", "/proc/iomem")])
def test_reserved_memory_is_not_for_everybody(lab_host: LabHost, monitor: Path, capability: str, message: str) -> None:
    wrapper = ("setpriv", f"--bounding-set=-{capability}")
    text = refused(lab_host, 2, "--kernel", str(monitor), "--memory", "reserved", wrapper=wrapper)
    assert message in text
    assert "run as root" in text


# A full disk


def on_a_full_disk(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run offmap where `folder` is a file system of 64 KiB."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o size=64k none {folder} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-m", "offmap", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"a full output folder was not tested: no mount namespace for this user ({done.stderr.strip()})")
    return done


def test_a_full_output_folder_is_the_commands_own_error(lab_kernel: HostKernel, tmp_path: Path) -> None:
    out = tmp_path / "full"
    done = on_a_full_disk(
        out, *("lab", "exec", "--out", str(out), "--", "sh", "-c", "head -c 1M /dev/zero >$OFFMAP_OUT/x; echo alive")
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert "No space left on device" in done.stderr


def test_a_full_output_folder_ends_the_demo_in_one_line(lab_kernel: HostKernel, tmp_path: Path) -> None:
    out = tmp_path / "full"
    done = on_a_full_disk(out, "demo", "--out", str(out))
    assert done.returncode == 2
    assert (
        done.stderr == f"offmap demo: cannot write to {out}: No space left on device; give another folder with --out\n"
    )
