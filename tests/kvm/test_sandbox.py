"""What a guest that has taken over its VMM can try there, on each kind of thread; and that it all works without.

The attempts are made inside a real ``offmap run``, while its guest runs: on the thread of a vCPU, of a device, and on
the one that waits for the user. Each is one system call by its number, which the interpreter itself would never make.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap.audit.process import Process
from offmap.audit.sandbox_result import NOT_LOOKED_AT, VmmSandbox
from offmap.audit.vmm_sandbox import vmm_sandbox
from offmap.kvm import Kvm
from offmap.uapi.syscall import NUMBERS

# Runs offmap as its own program does, and has one thread attempt something once the guest runs.
PROGRAM = """
import ctypes, os, sys, threading
sys.path[:0] = {path!r}
import offmap.cli.main
from offmap.devices.virtio.worker import Worker
from offmap.vmm.machine import Machine
from offmap.vmm.vcpu_loop import VcpuLoop

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long  # an address, for one
kvm_vm = lambda: next(fd for fd in range(3, 64) if fds.get(fd, "").startswith("anon_inode:kvm-vm"))
fds = {{}}
buffer = ctypes.create_string_buffer(8192)
text = lambda name: ctypes.cast(ctypes.c_char_p(name), ctypes.c_void_p).value
ourselves = os.getpid()

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

# What is tried: the system call, its arguments as Python, and whether root can do it where nothing confines it.
ATTEMPTS = [
    ("openat", '-100, text(b"/etc/passwd"), 0, 0', True),
    ("openat", '-100, text(b"/dev/mem"), 2, 0', False),  # not every kernel has one
    ("socket", "2, 1, 0", True),
    ("socket", "1, 1, 0", True),
    ("connect", "3, ctypes.addressof(buffer), 16", False),
    ("fork", "", False),  # a child would run our exit
    ("clone", "0x50f00, 0, 0, 0, 0", False),
    ("clone3", "ctypes.addressof(buffer), 88", False),
    ("execve", 'text(b"/bin/true"), 0, 0', False),
    ("ptrace", "0, 0, 0, 0", False),  # PTRACE_TRACEME: whoever waits for us would have to let us go
    ("kill", "1, 0", True),
    ("tgkill", "1, 1, 0", True),
    ("pidfd_open", "1, 0", True),
    ("pidfd_send_signal", "0, 0, 0, 0", False),
    ("process_vm_readv", "1, ctypes.addressof(buffer), 0, ctypes.addressof(buffer), 0, 0", True),
    ("mount", '0, text(b"/nowhere"), 0, 0, 0', False),
    ("unshare", "0x40000000", True),
    ("setns", "0, 0", False),
    ("bpf", "5, ctypes.addressof(buffer), 120", False),
    ("io_uring_setup", "8, ctypes.addressof(buffer)", False),
    ("userfaultfd", "0", True),
    ("perf_event_open", "0, 0, -1, -1, 0", False),
    ("init_module", '0, 0, text(b"")', False),
    ("keyctl", "0, -3, 0", False),
    ("memfd_create", 'text(b"m"), 0', True),
    ("mmap", "0, 4096, 7, 0x22, -1, 0", True),  # RWX
    ("mprotect", "ctypes.addressof(buffer) & ~4095, 4096, 5", True),  # what is written shall run
    ("ioctl", "kvm_vm(), 0xae41, 7", True),  # KVM_CREATE_VCPU
    ("ioctl", "kvm_vm(), 0x4020ae46, ctypes.addressof(buffer)", False),  # KVM_SET_USER_MEMORY_REGION
    ("ioctl", "0, 0x5412, ctypes.addressof(buffer)", False),  # TIOCSTI: input for whoever reads the terminal next
    ("prctl", "4, 1, 0, 0, 0", True),  # PR_SET_DUMPABLE
    ("setresuid", "0, 0, 0", True),
    ("seccomp", "1, 0, 0", False),
    ("rt_sigaction", "31, 0, 0, 8", True),  # of SIGSYS
    ("prlimit64", "0, 7, 0, ctypes.addressof(buffer)", True),
    ("unlink", 'text(b"/nowhere")', False),
]


@pytest.fixture
def monitor(payload: Callable[[str], Path], kvm: Kvm) -> Path:
    """Give a guest, where it can run."""
    return payload("monitor")


def try_in(monitor: Path, where: str, call: str, arguments: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Attempt it on the thread `where` of a VMM."""
    tuple_ = f"({arguments},)" if arguments else "()"
    program = PROGRAM.format(path=sys.path, arguments=tuple_, number=NUMBERS[call], where=where)
    argv = [sys.executable, "-c", program, "run", "--kernel", str(monitor), "--memory-size", "32M", "--rng", *options]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("where", ["main", "device", "vcpu"])
@pytest.mark.parametrize(("call", "arguments"), [(call, arguments) for call, arguments, _ in ATTEMPTS])
def test_it_ends_the_vm_by_name(monitor: Path, where: str, call: str, arguments: str) -> None:
    done = try_in(monitor, where, call, arguments)
    assert done.stderr == (
        f"offmap run: the VMM made a system call that its sandbox does not allow: {call}; its guest is ended\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize(("call", "arguments"), [(call, arguments) for call, arguments, works in ATTEMPTS if works])
def test_without_the_sandbox_it_works(monitor: Path, call: str, arguments: str) -> None:
    done = try_in(monitor, "vcpu", call, arguments, "--no-sandbox")
    attempt = re.search(r"^attempt: (-?\d+) ", done.stderr, re.MULTILINE)
    assert attempt and int(attempt[1]) != -1, done.stderr
    assert done.returncode == 77


def look(monitor: Path, *options: str) -> VmmSandbox:
    """What the audit says of a VMM whose guest runs."""
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(monitor), "--memory-size", "32M", "--rng", *options]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as vmm:
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
