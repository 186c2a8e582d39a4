"""Audits of processes that live, die and change meanwhile, run in a disposable host.

``audit_live_target.py SCENARIO…`` prints one JSON object: what each scenario found, by its name. The audited processes
are children that do what they are told over a socket; what is to happen in the middle of an audit is done in its
progress callback, between the look at the frames and the walk.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from offmap.audit import audit, pagemap, scan
from offmap.audit.audit import Snapshot, Stage
from offmap.audit.canary import make_canary, new_key
from offmap.audit.changes import compare
from offmap.audit.frames import POPULATED
from offmap.audit.mappings import covered
from offmap.audit.result import AuditResult
from offmap.audit.vms import audit_every_vm
from offmap.errors import KernelError, OffmapError
from offmap.patience import scaled

PAGE = 4096
MIB = 1 << 20
RESERVED = 0x6000_0000  # the host is booted with memmap=256M$0x60000000
SYS_MEMFD_SECRET = 447
KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE01, 0xAE41  # _IO(KVMIO, …), linux/kvm.h
MADV_HUGEPAGE, MADV_MERGEABLE = 14, 12  # asm-generic/mman-common.h
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2  # linux/mman.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
KPTR = "/proc/sys/kernel/kptr_restrict"

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def snapshot_process(pid: int, **options: Any) -> Snapshot:
    """With one walk: what is planted here does not move, and a host in a host is slow."""
    return audit.snapshot_process(pid, seconds=0, **options)


def audit_process(pid: int, **options: Any) -> AuditResult:
    """The published part of it."""
    return snapshot_process(pid, **options).audit


class Memory:
    """The guest RAM of a child, claimed in a memslots list."""

    def __init__(self, kind: str, size: int, claim: bool) -> None:
        self.size = size
        self.fd = -1
        if kind in {"anon", "thp", "merged"}:
            self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if kind != "anon":
                self.map.madvise(MADV_HUGEPAGE if kind == "thp" else MADV_MERGEABLE)
        elif kind == "reserved":
            self.fd = os.open("/dev/mem", os.O_RDWR)
            self.map = mmap.mmap(self.fd, size, offset=RESERVED)
        else:
            if kind == "secretmem":
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                self.fd = libc.syscall(SYS_MEMFD_SECRET, 0)
            else:
                self.fd = os.memfd_create("ram", os.MFD_HUGETLB if kind == "hugetlb" else 0)
            if self.fd < 0:
                raise OSError(ctypes.get_errno(), kind)
            os.ftruncate(self.fd, size)
            self.map = mmap.mmap(self.fd, size)
        if kind != "memfd":
            self.touch(0, size // PAGE)
        if claim:
            slot = {"guest_phys_addr": 0, "memory_size": size, "userspace_addr": address(self.map), "backend": kind}
            self.claim = os.memfd_create("offmap-memslots")
            os.write(self.claim, json.dumps({"schema": "offmap-memslots/1", "slots": [slot], "excluded": []}).encode())

    def touch(self, first: int, pages: int) -> None:
        for page in range(first, first + pages):
            self.map[page * PAGE] = 1

    def remap(self) -> None:
        """Put other memory in place of the second half."""
        half = self.size // 2
        other = mmap.mmap(-1, half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, half, PAGE):
            other[page] = 1
        length = ctypes.c_size_t(half)
        where = ctypes.c_void_p(address(self.map) + half)
        libc.mremap(ctypes.c_void_p(address(other)), length, length, MREMAP_MAYMOVE | MREMAP_FIXED, where)
        self.other = other  # whose address is not its memory's any more


class Child:
    """A process with memory to audit; a context manager that leaves none behind."""

    def __init__(self, kind: str, size: int = 4 * MIB, *, claim: bool = True, vm: bool = False) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ours.close()
                _live(theirs, Memory(kind, size, claim), vm)
            finally:
                os._exit(0)
        theirs.close()
        if self._ours.recv(1) != b"!":
            raise OSError(f"there is no {kind} memory here")

    def tell(self, command: str) -> None:
        """Have it done, and wait for it."""
        self._ours.send(command.encode())
        self._ours.recv(1)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._ours.close()


def _live(commands: socket.socket, memory: Memory, vm: bool) -> None:
    """A child's life."""
    held: list[Any] = []
    if vm:
        held.append(fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0))
        held.append(fcntl.ioctl(held[0], KVM_CREATE_VCPU, 0))
    commands.send(b"!")
    while command := commands.recv(64).decode():
        word, _, rest = command.partition(" ")
        if word == "exit":
            os._exit(0)
        elif word == "exec":
            os.execv("/bin/sleep", ["sleep", "60"])  # which closes the socket: that is the answer
        elif word == "touch":
            memory.touch(*map(int, rest.split()))
        elif word == "remap":
            memory.remap()
        elif word == "fork":
            if os.fork() == 0:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                commands.send(b"!")
                signal.pause()  # until its parent ends
            continue  # the new process answers, once nothing of it can be left behind
        elif word == "punch":
            libc.fallocate(memory.fd, 3, ctypes.c_long(int(rest) * PAGE), ctypes.c_long(PAGE))  # PUNCH_HOLE | KEEP_SIZE
        commands.send(b"!")


@contextmanager
def planted(words: str) -> Iterator[None]:
    """A kernel mapping by the test module."""
    fd = os.open("/dev/offmap-alias", os.O_WRONLY)
    try:
        os.write(fd, words.encode())
        yield
    finally:
        os.close(fd)


def told(result: AuditResult) -> dict[str, Any]:
    """What a test wants to know of a result."""
    document = result.to_json()
    json.dumps(document)
    wanted = ("verdict", "partial", "notes", "pages", "reach", "aliases", "sharing", "vmm", "scan")
    return {name: document[name] for name in wanted}


def frames(result: Snapshot) -> list[int]:
    """Frames of the guest's pages, in their order."""
    judged = result.judged
    here = judged.state == POPULATED
    runs = zip(judged.pfn[here].tolist(), judged.pages[here].tolist(), strict=True)
    return [int(pfn) for first, pages in runs for pfn in np.arange(first, first + pages)]


def restrict(value: int) -> None:
    with open(KPTR, "w", encoding="ascii") as file:  # noqa: PTH123
        file.write(str(value))


def aliases() -> dict[str, Any]:
    """A vmap of three scattered pages, and a memremap of four that Linux does not own: found, named, and gone again."""
    found: dict[str, Any] = {}
    with Child("secretmem", 32 * MIB) as child:  # more than pages with aliases are there
        snapshot = snapshot_process(child.pid)
        before = snapshot.audit
        free = sorted(
            set(frames(snapshot)) - {a.pa // PAGE + n for a in before.aliases for n in range(a.bytes // PAGE)}
        )
        wanted = [free[0], free[len(free) // 2], free[-1]]
        found["wanted"] = [f"{frame * PAGE:#x}" for frame in wanted]
        found["image"] = before.pages.alias_pages
        words = f"vmap {' '.join(hex(frame * PAGE) for frame in wanted)}"
        for value in (1, 0):
            restrict(value)
            with planted(words):
                found[f"vmap, kptr_restrict={value}"] = told(audit_process(child.pid))
        found["vmap, gone"] = told(audit_process(child.pid))
    with Child("reserved") as child:
        found["none"] = told(audit_process(child.pid))
        for value in (1, 0):
            restrict(value)
            with planted(f"memremap {RESERVED + MIB:#x} {4 * PAGE}"):
                found[f"memremap, kptr_restrict={value}"] = told(audit_process(child.pid))
        found["memremap, gone"] = told(audit_process(child.pid))
    return found


def in_the_middle(child: Child, deed: Callable[[], None]) -> AuditResult:
    """An audit of a child that something happens to between the first look and the walk."""
    state = {"done": False}

    def progress(stage: Stage, share: float) -> None:
        if stage is Stage.WALK and not state["done"]:
            state["done"] = True
            deed()

    return snapshot_process(child.pid, progress=progress).audit


def middle() -> dict[str, Any]:
    """Nothing, exit, kill, exec, remap and fork in the middle of audits of hidden memory."""
    found: dict[str, Any] = {}

    def kill(child: Child) -> None:
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    deeds: dict[str, Callable[[Child], None]] = {
        "nothing": lambda child: None,
        "exit": lambda child: child.tell("exit"),
        "kill": kill,
        "exec": lambda child: child.tell("exec"),
        "remap": lambda child: child.tell("remap"),
        "fork": lambda child: child.tell("fork"),
    }
    for name, deed in deeds.items():
        with Child("reserved") as child:
            found[name] = told(in_the_middle(child, lambda child=child, deed=deed: deed(child)))  # type: ignore[misc]
    with Child("anon") as child:
        found["kill, exposed"] = told(in_the_middle(child, lambda: kill(child)))
    # Dead before it began, and not yet waited for.
    with Child("anon") as child:
        kill(child)
        try:
            audit_process(child.pid)
        except OffmapError as error:
            found["zombie"] = [str(error), int(error.exit_status)]
    return found


def every() -> dict[str, Any]:
    """Two VMs, one hidden and one exposed, and one whose memory is not said."""
    with (
        Child("reserved", vm=True) as hidden,
        Child("anon", vm=True) as exposed,
        Child("reserved", 16 * MIB, claim=False, vm=True) as guessed,
    ):
        every_vm = audit_every_vm(lambda vm: snapshot_process(vm.pid))
        by_pid = {result.pid: told(result) for result in every_vm.vms}
        return {
            "exit_status": int(every_vm.exit_status),
            "pids": [vm.pid for vm in every_vm.vms],
            "notes": list(every_vm.notes),
            "hidden": by_pid[hidden.pid],
            "exposed": by_pid[exposed.pid],
            "guessed": by_pid[guessed.pid],
        }


def sharers() -> dict[str, Any]:
    """A process that forks, one whose file another maps too, and one alone."""
    found: dict[str, Any] = {}
    with Child("anon") as child:
        found["alone"] = told(audit_process(child.pid, sharers=True))
        child.tell("fork")
        found["fork"] = told(audit_process(child.pid, sharers=True))
    with Child("memfd") as child:
        child.tell("touch 0 64")
        fd = os.open(f"/proc/{child.pid}/fd/{_fd_named(child.pid, '/memfd:ram (deleted)')}", os.O_RDWR)
        view = mmap.mmap(fd, 4 * MIB)
        for page in range(16):
            view[page * PAGE] = 1  # a read would map what is around it too: how much depends on the address
        touched, done = os.pipe()
        pid = os.fork()  # the auditor itself is not named: so another process looks
        if pid == 0:
            for page in range(8):
                view[page * PAGE] = 1
            os.write(done, b"x")
            signal.pause()  # until it is killed
        os.close(done)
        os.read(touched, 1)
        os.close(touched)
        found["file"] = {"pid": pid, **told(audit_process(child.pid, sharers=True))}
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def merged() -> dict[str, Any]:
    """Two processes whose pages are all alike, once KSM has made them one."""
    ksm = Path("/sys/kernel/mm/ksm")
    for name, value in (("sleep_millisecs", 0), ("pages_to_scan", 4096), ("run", 1)):
        (ksm / name).write_text(str(value))
    try:
        # All of them on one page: it may have 256 (max_page_sharing).
        with Child("merged", 64 * PAGE) as one, Child("merged", 64 * PAGE) as other:
            deadline = time.monotonic() + scaled(60)
            while int((ksm / "pages_sharing").read_text()) < 127 and time.monotonic() < deadline:
                time.sleep(0.1)
            return {"other": other.pid, **told(audit_process(one.pid, sharers=True))}
    finally:
        (ksm / "run").write_text("2")  # stop, and give each its own pages back


def _fd_named(pid: int, link: str) -> str:
    folder = f"/proc/{pid}/fd"
    return next(name for name in os.listdir(folder) if os.readlink(f"{folder}/{name}") == link)  # noqa: PTH208, PTH115


def watched() -> dict[str, Any]:
    """What two audits of one process differ by."""
    found: dict[str, Any] = {}

    def difference(child: Child, before: Snapshot, name: str) -> Snapshot:
        after = snapshot_process(child.pid)
        found[name] = compare(before, after).to_json()
        return after

    with Child("memfd", 4 * MIB) as child:
        child.tell("touch 0 8")
        last = difference(child, snapshot_process(child.pid), "nothing")
        child.tell("touch 100 4")
        last = difference(child, last, "populated")
        child.tell("punch 2")
        last = difference(child, last, "punched")
    with Child("anon", 4 * MIB) as child:
        last = snapshot_process(child.pid)
        child.tell("remap")
        difference(child, last, "remapped")
    with Child("reserved", 4 * MIB) as child:
        last = snapshot_process(child.pid)
        with planted(f"memremap {RESERVED + MIB:#x} {PAGE}"):
            last = difference(child, last, "mapped")
        difference(child, last, "unmapped")
    return found


def beside_ram() -> dict[str, Any]:
    """Scans while the kernel maps memory that is neither its own nor the guest's, and after."""
    found = {}
    with Child("reserved") as child:
        more = RESERVED + 128 * MIB
        with (
            planted(f"memremap {more:#x} {4 * PAGE}"),
            planted(f"memremap {more + MIB:#x} {2 * PAGE} wc"),
            planted(f"memremap {more + 2 * MIB:#x} {2 * MIB}"),  # by one entry of a table above the last
            planted(f"memremap {more + 5 * MIB - PAGE // 2:#x} {PAGE}"),  # parts of two pages
        ):
            found["mapped"] = told(audit_process(child.pid, scan=new_key()))
        found["gone"] = told(audit_process(child.pid, scan=new_key()))
    return found


def behind_image() -> dict[str, Any]:
    """Scans for canaries in pages that are mapped behind the kernel's image and nowhere else."""
    key, memory, found = new_key(), Memory("secretmem", 32 * MIB, claim=False), dict[str, Any]()
    with Child("reserved") as child:
        mapped = snapshot_process(child.pid).mappings.runs
        frames = pagemap.pfn(pagemap.own_entries(address(memory.map), memory.size // PAGE))
        pages = np.flatnonzero(~covered(mapped, frames))[:3].tolist()
        for page in pages:
            canary = make_canary(key, page)
            memory.map[page * PAGE : page * PAGE + len(canary)] = canary
        found["pages"] = pages
        no_bpf = patch.object(scan, "KernelReader", side_effect=KernelError("bpf", errno.EPERM))
        found["unmapped"] = told(audit_process(child.pid, scan=key))
        with no_bpf:
            found["unmapped, without BPF"] = told(audit_process(child.pid, scan=key))
        with planted(f"image {' '.join(hex(frame * PAGE) for frame in frames[pages].tolist())}"):
            found["mapped"] = told(audit_process(child.pid, scan=key))
            with no_bpf:
                found["mapped, without BPF"] = told(audit_process(child.pid, scan=key))
            for page in pages:
                memory.map[page * PAGE : page * PAGE + PAGE] = bytes(PAGE)
            found["wiped"] = told(audit_process(child.pid, scan=key))
    return found


def mappings() -> dict[str, Any]:
    """Each sort of mapping: all its pages are seen and found in the direct map, or not there."""
    found = {}
    for kind in ("anon", "thp", "secretmem", "reserved"):
        with Child(kind) as child:
            found[kind] = told(audit_process(child.pid))
    subprocess.run(["sh", "-c", "echo 2 > /proc/sys/vm/nr_hugepages"], check=True)
    try:
        with Child("hugetlb") as child:
            found["hugetlb"] = told(audit_process(child.pid))
    finally:
        subprocess.run(["sh", "-c", "echo 0 > /proc/sys/vm/nr_hugepages"], check=True)
    return found


_ALL = (aliases, middle, every, sharers, merged, watched, beside_ram, behind_image, mappings)
SCENARIOS = {each.__name__: each for each in _ALL}


def main() -> int:
    found: dict[str, Any] = {}
    for name in sys.argv[1:]:
        started = time.monotonic()
        found[name] = SCENARIOS[name]()
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
