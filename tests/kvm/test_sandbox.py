"""What a guest that has taken over its VMM can try there, on each kind of thread; and that it all works without.

The attempts are made inside a real ``offmap run``, while its guest runs: on the thread of a vCPU, of a device, and on
the one that waits for the user. Each is one system call by its number, which the interpreter itself would never make.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offmap.audit.process import Process
from offmap.audit.sandbox_result import NOT_LOOKED_AT, VmmSandbox
from offmap.audit.vmm_sandbox import vmm_sandbox
from offmap.kvm import Kvm
from offmap.patience import scaled
from offmap.uapi.syscall import NUMBERS

# Runs offmap as its own program does, and has one thread attempt something once the guest runs.
PROGRAM = """
import ctypes, _socket, os, select, signal, sys, threading
sys.path[:0] = {path!r}
import offmap.cli.main
from offmap.devices.virtio.worker import Worker
from offmap.vmm.machine import Machine
from offmap.vmm.vcpu_loop import VcpuLoop

# PyDLL keeps the GIL: a child of fork would wait for ever for another thread that has it.
libc = ctypes.PyDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long  # an address, for one
kvm_vm = lambda: next(fd for fd in range(3, 64) if fds.get(fd, "").startswith("anon_inode:kvm-vm"))
fds = {{}}
buffer = ctypes.create_string_buffer(8192)
page = ctypes.addressof(buffer) + 4095 & ~4095
at = ctypes.addressof
kept = []

def text(name):
    kept.append(name)
    return ctypes.cast(ctypes.c_char_p(name), ctypes.c_void_p).value

ourselves = os.getpid()

def other():
    # A process that is none of ours any more, and ends with this one. (The kernel sends no death signal for a process
    # that may not: ours will have another user.)
    ours = os.pidfd_open(os.getpid())
    pid = os.fork()
    if not pid:
        os.dup2(ours, 0)
        os.closerange(1, 1024)
        ended = select.poll()
        ended.register(0, select.POLLIN)
        ended.poll()
        os._exit(0)
    os.close(ours)
    return pid

def prepare():
    # What an attempt needs, made while this process still may.
    global victim, victim_fd, namespace, listener, client, pair, address
    global region, clone_args, bpf_map, perf, message, allow
    victim = other()
    victim_fd = os.pidfd_open(victim)
    namespace = os.open("/proc/self/ns/uts", 0)
    listener, client = _socket.socket(1, 1), _socket.socket(1, 1)
    listener.bind("")
    listener.listen(1)
    address = ctypes.create_string_buffer(b"\\1\\0" + listener.getsockname())
    pair = _socket.socketpair(1, 1)
    region = (ctypes.c_uint64 * 4)(9, 1 << 40, 4096, page)  # slot 9, no flags
    clone_args = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17)  # a child that sends SIGCHLD
    bpf_map = (ctypes.c_uint32 * 30)(2, 4, 4, 1)  # an array
    perf = (ctypes.c_uint32 * 32)(1, 128)  # the software clock
    data = (ctypes.c_uint64 * 2)(page, 1)
    rights = (ctypes.c_uint64 * 3)(20, 1 | 1 << 32, 0)  # SOL_SOCKET, SCM_RIGHTS, descriptor 0
    message = (ctypes.c_uint64 * 7)(0, 0, at(data), 1, at(rights), 24, 0)
    kept.extend((data, rights))
    allow = ctypes.c_uint32(0x7FFF0000)
    open("planted", "w").close()

def attempt():
    arguments = {arguments}
    result = libc.syscall({number}, *(ctypes.c_long(a) for a in arguments))
    error = ctypes.get_errno()
    os.write(2, f"attempt: {{result}} {{os.strerror(error) if result == -1 else ''}}\\n".encode())
    os._exit(77)

def look():
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{{name}}")
        except OSError:
            pass

start = Machine.start
def started(machine, *arguments):
    prepare()
    look()
    start(machine, *arguments)
    if {where!r} == "main":
        attempt()
    if {where!r} == "device":
        machine._virtio.transports[0].worker.post(attempt)
Machine.start = started
if {where!r} == "vcpu":
    VcpuLoop.run = lambda loop: attempt()
sys.exit(offmap.cli.main.main(sys.argv[1:]))
"""

WORKS, MAY, NO, ENDS = "works", "works where the host allows it to root", "is not tried", "replaces the program"

# What is tried: the system call, its arguments as Python, and what comes of it as root where nothing confines it.
ATTEMPTS = [
    ("openat", '-100, text(b"/etc/passwd"), 0, 0', WORKS),
    ("openat", '-100, text(b"/proc/%d/mem" % victim), 2, 0', WORKS),
    ("openat", '-100, text(b"/dev/mem"), 2, 0', NO),  # not every kernel has one
    ("open", 'text(b"/dev/kvm"), 2, 0', WORKS),
    ("socket", "2, 1, 0", WORKS),
    ("socket", "1, 1, 0", WORKS),
    ("connect", "client.fileno(), at(address), len(address) - 1", WORKS),
    ("sendmsg", "pair[0].fileno(), at(message), 0", WORKS),  # with a descriptor
    ("fork", "", WORKS),
    ("clone", "17, 0, 0, 0, 0", WORKS),
    ("clone", "0x50f00, 0, 0, 0, 0", NO),  # a thread, on our stack
    ("clone3", "at(clone_args), 64", WORKS),
    ("execve", 'text(b"/bin/true"), 0, 0', ENDS),
    ("ptrace", "0x4206, victim, 0, 0", WORKS),  # PTRACE_SEIZE
    ("kill", "1, 0", WORKS),
    ("kill", "victim, 10", WORKS),
    ("tgkill", "1, 1, 0", WORKS),
    ("tkill", "victim, 0", WORKS),
    ("pidfd_open", "1, 0", WORKS),
    ("pidfd_send_signal", "victim_fd, 0, 0, 0", WORKS),
    ("pidfd_getfd", "victim_fd, 0, 0", NO),  # it has none
    ("process_vm_readv", "1, at(buffer), 0, at(buffer), 0, 0", WORKS),
    ("process_vm_writev", "victim, at(buffer), 0, at(buffer), 0, 0", WORKS),
    ("mount", '0, text(b"/nowhere"), 0, 0, 0', NO),  # it would change this machine
    ("fsopen", 'text(b"tmpfs"), 0', MAY),
    ("chroot", 'text(b"/")', WORKS),
    ("unshare", "0x40000000", WORKS),
    ("setns", "namespace, 0x4000000", WORKS),
    ("bpf", "0, at(bpf_map), 72", MAY),  # BPF_MAP_CREATE
    ("io_uring_setup", "8, at(buffer)", MAY),
    ("userfaultfd", "0", WORKS),
    ("perf_event_open", "at(perf), 0, -1, -1, 0", MAY),
    ("init_module", '0, 0, text(b"")', NO),  # it would change this machine
    ("keyctl", "0, -3, 0", MAY),
    ("memfd_create", 'text(b"m"), 0', WORKS),
    ("shmget", "0, 4096, 0", NO),  # it would be left behind
    ("mmap", "0, 4096, 7, 0x22, -1, 0", WORKS),  # RWX
    ("mmap", "0, 1 << 21, 3, 0x40022, -1, 0", MAY),  # a huge page, which another guest waits for
    ("madvise", "page, 4096, 12", MAY),  # MADV_MERGEABLE: which pages others have
    ("futex", "page, 6, 0, 0", WORKS),  # FUTEX_LOCK_PI
    ("mprotect", "page, 4096, 5", WORKS),  # what is written shall run
    ("pkey_mprotect", "page, 4096, 4, -1", WORKS),
    ("ioctl", "kvm_vm(), 0xae41, 7", WORKS),  # KVM_CREATE_VCPU
    ("ioctl", "kvm_vm(), 0x4020ae46, at(region)", WORKS),  # KVM_SET_USER_MEMORY_REGION
    ("ioctl", "0, 0x5412, at(buffer)", NO),  # TIOCSTI: input for whoever reads the terminal next; there is none
    ("prctl", "4, 1, 0, 0, 0", WORKS),  # PR_SET_DUMPABLE
    ("setresuid", "0, 0, 0", WORKS),
    ("seccomp", "2, 0, at(allow)", WORKS),  # SECCOMP_GET_ACTION_AVAIL
    ("rt_sigaction", "31, 0, 0, 8", WORKS),  # of SIGSYS
    ("prlimit64", "0, 7, 0, at(buffer)", WORKS),
    ("unlink", 'text(b"planted")', WORKS),
]


# Runs offmap as its own program does, and tells which files it opens, and whether the broker takes descriptors yet.
OPENS = """
import os, sys
sys.path[:0] = {path!r}
import offmap.cli.main
from offmap.sandbox.broker import Broker

when, ourselves = "before", os.getpid()
def hook(event, arguments):
    if event == "open" and os.getpid() == ourselves:
        os.write(2, f"{{when}} {{os.fsdecode(arguments[0])}}\\n".encode())
sys.addaudithook(hook)
seal = Broker.seal
def sealed(broker):
    global when
    seal(broker)
    when = "after"
Broker.seal = sealed
sys.exit(offmap.cli.main.main(sys.argv[1:]))
"""


# Runs offmap as its own program does, on a host that allows one vCPU's thread no filter.
NO_FILTER = """
import sys, threading
sys.path[:0] = {path!r}
import offmap.cli.main
from offmap.errors import OffmapError
from offmap.sandbox import seccomp

install = seccomp.install
def refused(program):
    if threading.current_thread().name == "vcpu1":
        raise OffmapError("no filter for this one")
    install(program)
seccomp.install = refused
sys.exit(offmap.cli.main.main(sys.argv[1:]))
"""


@pytest.fixture
def monitor(payload: Callable[[str], Path], kvm: Kvm) -> Path:
    """Give a guest, where it can run."""
    return payload("monitor")


def try_in(
    monitor: Path, folder: Path, where: str, call: str, arguments: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Attempt it on the thread `where` of a VMM, which is started in `folder`."""
    tuple_ = f"({arguments},)" if arguments else "()"
    program = PROGRAM.format(path=sys.path, arguments=tuple_, number=NUMBERS[call], where=where)
    argv = [sys.executable, "-c", program, "run", "--kernel", str(monitor), "--memory-size", "32M", "--rng", *options]
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=scaled(60), cwd=folder
    )


@pytest.mark.parametrize("where", ["main", "device", "vcpu"])
@pytest.mark.parametrize(("call", "arguments"), [(call, arguments) for call, arguments, _ in ATTEMPTS])
def test_it_ends_the_vm_by_name(monitor: Path, tmp_path: Path, where: str, call: str, arguments: str) -> None:
    done = try_in(monitor, tmp_path, where, call, arguments)
    assert done.stderr == (
        f"offmap run: the VMM made a system call that its sandbox does not allow: {call}; its guest is ended\n"
    )
    assert done.returncode == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: much of it does not work without the sandbox either")
@pytest.mark.parametrize(("call", "arguments", "works"), [each for each in ATTEMPTS if each[2] is not NO])
def test_without_the_sandbox_it_works(monitor: Path, tmp_path: Path, call: str, arguments: str, works: str) -> None:
    done = try_in(monitor, tmp_path, "vcpu", call, arguments, "--no-sandbox")
    if works is ENDS:
        assert done.returncode == 0 and "attempt" not in done.stderr, done.stderr
        return
    attempt = re.search(r"^attempt: (-?\d+) (.*)", done.stderr, re.MULTILINE)
    assert attempt, done.stderr
    if works is MAY and int(attempt[1]) == -1:
        pytest.skip(f"{call} does not work without the sandbox here either: {attempt[2]}")
    assert int(attempt[1]) != -1, done.stderr
    assert done.returncode == 77


TOO_MUCH = [
    ("pwrite64", 'next(fd for fd in fds if fds[fd].endswith("drive")), page, 1, 1 << 20', "File too large"),
    ("ftruncate", 'next(fd for fd in fds if fds[fd].endswith("drive")), 1 << 40', "File too large"),
    ("mmap", "0, 2 << 30, 3, 0x22, -1, 0", "Cannot allocate memory"),
]


@pytest.mark.parametrize(("call", "arguments", "error"), TOO_MUCH)
@pytest.mark.parametrize("sandbox", [True, False])
def test_it_can_fill_neither_disk_nor_memory(
    monitor: Path, tmp_path: Path, call: str, arguments: str, error: str, sandbox: bool
) -> None:
    drive = tmp_path / "drive"
    drive.write_bytes(bytes(1 << 20))
    more = () if sandbox else ("--no-sandbox",)
    done = try_in(monitor, tmp_path, "main", call, arguments, "--drive", str(drive), *more)
    assert done.returncode == 77, done.stderr
    assert (f"attempt: -1 {error}\n" in done.stderr) == sandbox, done.stderr


@contextmanager
def opened(path: str) -> Iterator[int]:
    """Give a descriptor."""
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_descriptor_that_somebody_has_left_open_is_closed(monitor: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(monitor), "--memory-size", "32M"]
    secret = tmp_path / "secret"
    secret.touch()
    with opened(str(secret)) as file, socket.socket() as any_socket:
        left = file, any_socket.fileno()
        names = {Path(f"/proc/self/fd/{fd}").readlink() for fd in left}
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=left) as vmm:
            assert vmm.stdout is not None and vmm.stdout.read(1) == b"U"
            held = {each.readlink() for each in Path(f"/proc/{vmm.pid}/fd").iterdir()}
            vmm.communicate(b"q")
    assert names and not names & held


def look(monitor: Path, *options: str) -> VmmSandbox:
    """What the audit says of a VMM whose guest runs, and which whoever started it left descriptors to."""
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(monitor), "--memory-size", "32M", "--rng", *options]
    with (
        opened("/") as folder,
        opened("/dev/kvm") as kvm,
        subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(folder, kvm),
        ) as vmm,
    ):
        assert vmm.stdout is not None
        assert vmm.stdout.read(1) == b"U"
        with Process(vmm.pid) as process:
            found = vmm_sandbox(process)
        vmm.communicate(b"q")
        assert vmm.returncode == 0
    assert found is not None
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: the VMM has no user id of its own")
def test_the_audit_shows_it(monitor: Path) -> None:
    found = look(monitor)
    assert found.uid > 0x7000_0000
    assert (found.capabilities, found.no_new_privs, found.seccomp) == ((), True, "filter")
    assert {"ipc", "mnt", "net", "uts"} <= set(found.namespaces)
    assert (found.mounts, found.root, found.dumpable) == (1, "tmpfs, read-only", False)
    assert [each for each in found.descriptors if each.kind != NOT_LOOKED_AT] == []


def test_and_that_there_is_none(monitor: Path) -> None:
    found = look(monitor, "--no-sandbox")
    assert (found.uid, found.no_new_privs, found.seccomp, found.namespaces) == (os.geteuid(), False, "none", ())
    assert {each.kind for each in found.descriptors} >= {"directory", "/dev/kvm"}


def test_every_file_is_one_of_the_command_line_and_opened_before_the_guest_runs(monitor: Path, tmp_path: Path) -> None:
    image, report, sockets = tmp_path / "image", tmp_path / "report", Path(tempfile.mkdtemp(dir="/run"))
    image.write_bytes(bytes(1 << 20))
    options = ["--drive", str(image), "--rng", "--vsock", f"cid=3,path={sockets / 'sock'}", "--report", str(report)]
    argv = [sys.executable, "-c", OPENS.format(path=sys.path), "run", "--kernel", str(monitor), "--memory-size", "32M"]
    try:
        done = subprocess.run([*argv, *options], input=b"q", capture_output=True, check=False, timeout=scaled(60))
    finally:
        sockets.rmdir()
    assert done.returncode == 0, done.stderr.decode()
    opened = [line.split(" ", 1) for line in done.stderr.decode().splitlines()]
    assert [path for when, path in opened if when != "before"] == []
    # What Python imports, what this process says of itself, and folders on the way to vsock's socket.
    own = {*sys.path, sys.prefix, "/usr/lib", "/proc", "/sys"}
    named = {path for _, path in opened if not any(path.startswith(each) for each in own if each)}
    folders = {"/", "run", sockets.name}
    assert named == {str(monitor), "/dev/kvm", str(image), "/dev/urandom", str(report), *folders}


def test_no_guest_runs_where_one_thread_has_no_filter(monitor: Path) -> None:
    argv = [sys.executable, "-c", NO_FILTER.format(path=sys.path), "run", "--kernel", str(monitor), "--vcpus", "2"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=scaled(60)
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "offmap run: no filter for this one\n")
