"""What test_pool.py does with pools in a disposable host: ``python -m tests.lab.pool_target WHAT`` prints JSON."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from offmap.audit.residency import physical_ranges
from offmap.errors import BackendRefused
from offmap.kvm import Kvm
from offmap.memory.pool import Pool
from offmap.memory.probe import try_out
from offmap.uapi import offmap_module as uapi

from .module_host_target import HARD_OFFLINE, MSR_KVM_SYSTEM_TIME_NEW, SYSFS, inject, is_mapped
from .module_target import (
    BLOCK,
    MIB,
    MREMAP_MAYMOVE,
    PAGE,
    address,
    await_returned,
    call,
    failure,
    libc,
    open_device,
    state,
    take,
    words,
)

POOL = "/run/hidden"
SIZE = 256 * MIB
USER, GROUP = 4711, 4712
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
RENAME_NOREPLACE = 1
MAP_FIXED = 0x10
MAP_FAILED = ctypes.c_void_p(-1).value
ACCESS = f"mode=1770,gid={GROUP}"

libc.mmap.restype = ctypes.c_void_p


def mount(options: str) -> None:
    os.makedirs(POOL, exist_ok=True)  # noqa: PTH103
    call(libc.mount, b"offmap", POOL.encode(), b"offmapfs", ctypes.c_ulong(0), options.encode())


def remount(options: str) -> None:
    call(libc.mount, b"offmap", POOL.encode(), b"offmapfs", ctypes.c_ulong(32), options.encode())


def unmount() -> None:
    call(libc.umount2, POOL.encode(), 0)


@contextmanager
def pool(size: int = SIZE, options: str = ACCESS) -> Iterator[None]:
    mount(f"size={size},{options},allow_nested")
    try:
        yield
    finally:
        unmount()


def figures() -> list[int]:
    """Bytes of the pool: all, free, being cleaned, held, failed; the number of its files; its node."""
    with open("/sys/class/misc/offmap/pools") as file:  # noqa: PTH123
        return [int(word) for word in file.read().split()[1:]]


def make(name: str, size: int = 0, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    fd = os.open(f"{POOL}/{name}", flags | os.O_CLOEXEC, 0o660)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def unlink(name: str) -> None:
    os.unlink(f"{POOL}/{name}")  # noqa: PTH108


def ranges_of(memory: mmap.mmap, size: int) -> list[tuple[int, int]]:
    return physical_ranges(os.getpid(), address(memory), size)


def in_child(action: Callable[[], object], user: int = 0, group: int = 0) -> str:
    """How an action fails in another process and as another user: its errno or signal by name; empty if it does not."""
    child = os.fork()
    if child == 0:
        try:
            if user:
                os.setgroups([])
                os.setgid(group)
                os.setuid(user)
            os._exit(getattr(errno, failure(action), 0))
        except BaseException as error:  # the parent is told, and goes on
            print(error, file=sys.stderr)
            os._exit(255)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-status).name if status < 0 else errno.errorcode.get(status, str(status) if status else "")


def use(size: int = 64 * MIB) -> None:
    """What a VMM does with its guest's RAM."""
    fd = make("ram", size)
    memory = mmap.mmap(fd, size)
    assert not words(memory).any()
    words(memory)[:: PAGE // 8] = 0xA5A5
    unlink("ram")


def leave() -> None:
    """What a VMM does that will be started again, as for an update."""
    words(mmap.mmap(make("kept", 4 * MIB), 4 * MIB))[:: PAGE // 8] = 0x5A5A


def find() -> None:
    """What it does then."""
    with open(f"{POOL}/kept", "r+b") as file:  # noqa: PTH123
        assert (words(mmap.mmap(file.fileno(), 4 * MIB))[:: PAGE // 8] == 0x5A5A).all()


def basics() -> Any:
    """From mount to unmount: who may use a pool, for what, and what the host has afterwards."""
    before = state()
    result: dict[str, Any] = {"no size": failure(lambda: mount(ACCESS + ",allow_nested"))}
    result["too much"] = failure(lambda: mount("size=1T,allow_nested"))
    result["2^64 - 1"] = failure(lambda: mount(f"size={(1 << 64) - 1},allow_nested"))
    result["unprivileged mount"] = in_child(lambda: mount("size=128M,allow_nested"), USER, GROUP)
    with pool():
        all_of_it = os.statvfs(POOL)
        result["size"] = [all_of_it.f_blocks * PAGE, all_of_it.f_bavail * PAGE]
        result["the group"] = in_child(use, USER, GROUP)
        result["others"] = in_child(use, USER, USER)
        result["left"] = in_child(leave, USER, GROUP)
        result["found again"] = in_child(find, USER, GROUP)
        result["found by others"] = in_child(find, USER, USER)
        unlink("kept")
        result["more than there is"] = failure(lambda: make("large", SIZE + PAGE))
        fd = make("ram", SIZE)  # all: so what the other had is clean again by now
        memory = mmap.mmap(fd, SIZE)
        result["zero"] = not words(memory).any()
        ranges = ranges_of(memory, SIZE)
        result["mapped"] = sum(length for _, length in ranges)
        result["aligned"] = address(memory) % (2 * MIB) == 0 and all(start % (2 * MIB) == 0 for start, _ in ranges)
        with open("/proc/iomem") as file:  # noqa: PTH123
            claimed = [line.split()[0].split("-") for line in file if line.rstrip().endswith(": offmap")]
        result["claimed"] = all(
            any(int(low, 16) <= start and start + length - 1 <= int(high, 16) for low, high in merged(claimed))
            for start, length in ranges
        )
        result["none left"] = failure(lambda: make("one more", PAGE))
        result["read"] = failure(lambda: os.read(fd, 8))
        result["write"] = failure(lambda: os.write(fd, b"x"))
        result["O_DIRECT"] = failure(lambda: os.open(f"{POOL}/ram", os.O_RDWR | os.O_DIRECT))
        result["sendfile"] = failure(lambda: os.sendfile(os.open("/dev/null", os.O_WRONLY), fd, 0, PAGE))
        result["private"] = failure(lambda: mmap.mmap(fd, PAGE, flags=mmap.MAP_PRIVATE))
        result["exec"] = failure(lambda: mmap.mmap(fd, PAGE, prot=mmap.PROT_READ | mmap.PROT_EXEC))
        result["beyond"] = failure(lambda: map_at(None, SIZE + PAGE, mmap.MAP_SHARED, fd))
        result["link"] = failure(lambda: os.link(f"{POOL}/ram", f"{POOL}/name"))
        result["symlink"] = failure(lambda: os.symlink("ram", f"{POOL}/name"))  # noqa: PTH211
        result["busy"] = failure(unmount)
        inodes = os.statvfs(POOL).f_ffree
        os.mkdir(f"{POOL}/folder")  # noqa: PTH102
        result["a folder counts"] = inodes - os.statvfs(POOL).f_ffree
        os.rename(f"{POOL}/ram", f"{POOL}/folder/ram")  # noqa: PTH104
        unlink("folder/ram")
        words(memory)[:: PAGE // 8] = 0x5A5A
        del memory
        os.close(fd)
        unlink("one more")
        unlink("large")
        nameless = os.open(POOL, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        os.ftruncate(nameless, SIZE)
        memory = mmap.mmap(nameless, SIZE)
        result["zero again"] = not words(memory).any()
        del memory
        os.close(nameless)
    after = state()
    result["back"] = {name: after[name] == before[name] for name in after if name != "total_kib"}
    result["missing kib"] = before["total_kib"] - after["total_kib"]
    return result


def merged(claimed: list[list[str]]) -> list[tuple[str, str]]:
    """Neighbours as one."""
    found: list[tuple[int, int]] = []
    for low, high in sorted((int(low, 16), int(high, 16)) for low, high in claimed):
        if found and found[-1][1] + 1 == low:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return [(f"{low:x}", f"{high:x}") for low, high in found]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    call(libc.fallocate, fd, mode, ctypes.c_long(offset), ctypes.c_long(length))


def holes() -> Any:
    """Give pieces of a file back, and have them again."""
    result: dict[str, Any] = {}
    punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    with pool():
        fd = make("ram", SIZE)
        memory = mmap.mmap(fd, SIZE)
        words(memory)[:: PAGE // 8] = np.arange(SIZE // PAGE, dtype=np.uint64) + 1
        result["part of a page"] = failure(lambda: fallocate(fd, punch, 100, PAGE))
        hole = (100 * MIB + PAGE, 20 * MIB)
        fallocate(fd, punch, *hole)
        result["blocks"] = os.fstat(fd).st_blocks * 512
        other = make("other", hole[1])  # there is room now
        result["other is zero"] = not words(mmap.mmap(other, hole[1])).any()
        result["touch"] = in_child(lambda: memory_at(fd, hole[0]))  # nothing left
        os.ftruncate(other, 0)
        result["zero"] = not words(memory)[hole[0] // 8 : (hole[0] + hole[1]) // 8].any()  # found by touching them
        result["blocks after"] = os.fstat(fd).st_blocks * 512
        expected = np.arange(SIZE // PAGE, dtype=np.uint64) + 1
        expected[hole[0] // PAGE : (hole[0] + hole[1]) // PAGE] = 0
        result["rest"] = bool((words(memory)[:: PAGE // 8] == expected).all())
        result["beyond"] = in_child(lambda: shorten(fd, 64 * MIB))
        result["shorter"] = os.fstat(fd).st_blocks * 512
        # 192 MiB are there: enough for these, and not for what is before them too.
        result["too far"] = failure(lambda: fallocate(other, 0, 100 * MIB, 100 * MIB))
        result["nothing kept"] = os.fstat(other).st_blocks
        fallocate(fd, 0, 64 * MIB, 64 * MIB)
        result["longer"] = [os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512]
        result["longer is zero"] = not words(memory)[64 * MIB // 8 : 128 * MIB // 8].any()
        del memory
        os.close(fd)
        os.close(other)
    await_returned()
    return result


def shorten(fd: int, size: int) -> int:
    """Cut off what this process has mapped, and read it."""
    memory = mmap.mmap(fd, SIZE)
    os.ftruncate(fd, size)
    return int(memory[size])


def memory_at(fd: int, offset: int) -> int:
    """Map a page of a file in a process that has no mapping of it, and read it."""
    return int(mmap.mmap(fd, PAGE, offset=offset)[0])


def come_and_go() -> None:
    """Make a file that takes all of the pool, fifty times: each waits for what the one before it gave back."""
    for _ in range(50):
        os.close(make("all", BLOCK))
        unlink("all")
    while figures()[1] < BLOCK:
        os.sched_yield()


def sizes() -> Any:
    """Grow and shrink a pool, with a file in it."""
    result: dict[str, Any] = {}
    with pool(BLOCK):
        result["again and again"] = failure(come_and_go)
        fd = make("ram", 64 * MIB)
        result["at first"] = figures()[0]
        remount(f"size={3 * BLOCK}")
        result["grown"] = figures()[:2]
        remount(f"size={BLOCK}")
        result["shrunk"] = figures()[:2]
        remount(f"size={2 * BLOCK}")
        os.close(fd)
        fd = make("more", 150 * MIB)
        result["too small"] = failure(lambda: remount(f"size={BLOCK}"))
        result["left"] = figures()[0]
        result["another option"] = failure(lambda: remount("mode=777"))
        os.close(fd)
    await_returned()
    return result


def quotas() -> Any:
    """What one user may have of a pool, and what others and root have beside it."""
    result: dict[str, Any] = {}
    punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    with pool(SIZE, "mode=1777,quota=64M"):
        result["all"] = in_child(lambda: make("first", 64 * MIB), USER, GROUP)
        result["one more"] = in_child(lambda: make("more", PAGE), USER, GROUP)
        result["another user"] = in_child(lambda: make("other", 64 * MIB), USER + 1, GROUP)
        with open(f"{POOL}/first", "r+b") as file:  # noqa: PTH123
            fallocate(file.fileno(), punch, 0, 32 * MIB)
            result["a hole"] = in_child(lambda: make("second", 32 * MIB), USER, GROUP)
            result["touch it"] = in_child(lambda: memory_at(file.fileno(), 0), USER, GROUP)
            result["root touches it"] = in_child(lambda: memory_at(file.fileno(), 0))
        os.close(make("root's", 68 * MIB))
        os.chown(f"{POOL}/root's", USER + 1, GROUP)
        result["given"] = in_child(lambda: os.truncate(f"{POOL}/root's", 70 * MIB), USER + 1, GROUP)
        result["users"] = sorted(line.split()[1:] for line in (SYSFS / "pool_users").read_text().splitlines())
        # As mount(8) does it, with all options that there are.
        subprocess.run(["mount", "-o", f"remount,quota=0,size={SIZE + BLOCK}", POOL], check=True)
        result["no quota"] = in_child(lambda: os.truncate(f"{POOL}/root's", 70 * MIB), USER + 1, GROUP)
        result["size"] = figures()[0]
        subprocess.run(["mount", "-o", "remount,quota=1", POOL], check=True)
        result["a byte is a page"] = [in_child(lambda n=n: make("tiny", n * PAGE), USER + 2, GROUP) for n in (1, 2)]  # type: ignore[misc]
    await_returned()
    return result


def held() -> Any:
    """A user whose VM has the kernel map a page of what its file gave back: what it can have of the pool meanwhile."""
    result: dict[str, Any] = {}
    size = 64 * MIB
    with pool(SIZE, "mode=1777,quota=64M"):
        fd = make("ram", size)
        os.chown(fd, USER, GROUP)
        memory = mmap.mmap(fd, size)
        with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            vm.set_user_memory_region(0, 0, size, address(memory))
            vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: 0x5000 | 1})
            os.close(fd)
            memory.close()
            unlink("ram")
            while not figures()[3]:
                os.sched_yield()
            result["held"] = figures()[3]
            result["users"] = [line.split()[1:] for line in (SYSFS / "pool_users").read_text().splitlines()]
            result["more"] = in_child(lambda: make("more", size), USER, GROUP)
            result["another user"] = in_child(lambda: make("other", size), USER + 1, GROUP)
        while figures()[3]:
            os.sched_yield()
        result["afterwards"] = in_child(lambda: make("again", size), USER, GROUP)
    await_returned()
    return result


def guards() -> Any:
    """What a process can do to a mapping that is to stay."""
    result: dict[str, Any] = {}
    size = 8 * MIB
    with pool(BLOCK):
        for name, action in {
            "control": lambda at: call(libc.munmap, at, size),
            "unmap": lambda at: call(libc.munmap, at, size),
            "unmap a part": lambda at: call(libc.munmap, at, PAGE),
            "move": lambda at: call(libc.mremap, at, size, size, MREMAP_MAYMOVE | 2, ctypes.c_void_p(0x7000_0000_0000)),
            "protect": lambda at: call(libc.mprotect, at, size, 0),
            "protect a part": lambda at: call(libc.mprotect, at, PAGE, 0),
            "map over": lambda at: over(at, size),
            "map over a part": lambda at: over(at, PAGE),
            "end": lambda at: None,
        }.items():
            result[name] = in_child(lambda name=name, action=action: guarded(name, action, size))  # type: ignore[misc]
    await_returned()
    return result


def guarded(name: str, action: Callable[[ctypes.c_void_p], object], size: int) -> None:
    fd = make("guarded", size)
    if name != "control":
        fcntl.ioctl(fd, uapi.OFFMAP_GUARD)
    at = map_at(None, size, mmap.MAP_SHARED, fd)
    ctypes.memset(at, 1, size)
    action(ctypes.c_void_p(at))


def over(at: ctypes.c_void_p, size: int) -> None:
    map_at(at, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED, -1)


def map_at(at: ctypes.c_void_p | None, size: int, flags: int, fd: int) -> int:
    """mmap(2): where it is, in the end."""
    address = libc.mmap(at, ctypes.c_size_t(size), 3, flags, fd, ctypes.c_long(0))
    if address == MAP_FAILED:
        raise OSError(ctypes.get_errno(), "")
    return int(address)


class Guest:
    """A process with a VM on the pool: one instruction of it runs, then its RAM is full of a canary."""

    def __init__(self, size: int, canary: int) -> None:
        self.size, self.canary = size, canary
        told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(told)
            os._exit(self._run(tell))
        os.close(tell)
        with open(told, "rb") as heard:  # noqa: PTH123
            self.said = heard.read(4).decode()  # nothing if it died
        if self.said != "runs":
            os.waitpid(self.pid, 0)

    def _run(self, tell: int) -> int:
        try:
            with Kvm() as kvm, kvm.create_vm() as vm, Pool(POOL).guest_memory(vm, self.size) as memory:
                (backing,) = memory.backings
                seen = np.frombuffer(backing.view, dtype=np.uint64)
                if seen.any():
                    os.write(tell, b"leak")
                    return 1
                try_out(vm, memory)
                seen[:: PAGE // 8] = self.canary
                os.write(tell, b"runs")
                signal.pause()
        except BackendRefused as error:
            os.write(tell, b"full" if "are free" in str(error) else b"fail")
        return 0

    def end(self, kill: bool) -> None:
        os.kill(self.pid, signal.SIGKILL if kill else signal.SIGTERM)
        os.waitpid(self.pid, 0)


def stress(starts: str, pool_mib: str, least_mib: str, most_mib: str) -> Any:
    """Guests come and go on one pool, in an order that chance gives and that is always the same."""
    size, chance = int(pool_mib) * MIB, random.Random(14)
    before = state()
    said: dict[str, int] = {}
    alive: list[Guest] = []
    most = 0
    with pool(size):
        size = figures()[0]
        for number in range(int(starts)):
            while alive and (len(alive) == 8 or chance.random() < 0.4):
                alive.pop(chance.randrange(len(alive))).end(kill=chance.random() < 0.5)
            guest = Guest(chance.randrange(int(least_mib), int(most_mib) + 1) * MIB, 0x0FF5_ED00_0000_0000 + number)
            said[guest.said] = said.get(guest.said, 0) + 1
            alive += [guest] if guest.said == "runs" else []
            most = max(most, len(alive))
        for guest in alive:
            guest.end(kill=True)
        os.close(make("all", size))  # waits until all is clean
        unlink("all")
        while (now := figures())[1] < size:
            os.sched_yield()
    after = state()
    same = {name: after[name] == before[name] for name in after if name != "total_kib"}
    return {"said": said, "most": most, "pool": now[:5], "size": size, "same": same}


def first_touch(get: Callable[[], int], size: int) -> float:
    """Seconds from opening a file of `size` bytes to having it mapped, all of it; the file is closed after that."""
    began = time.monotonic()
    fd = get()
    memory = mmap.mmap(fd, size)
    words(memory)[:: 2 * MIB // 8].any()
    seconds = time.monotonic() - began
    del memory
    os.close(fd)
    return seconds


def unplugged_file() -> int:
    fd = open_device()
    take(fd, SIZE)
    return fd


def speed(times: str = "5") -> Any:
    """Seconds to have 256 MiB: taken off the kernel, and out of a clean pool."""
    found: dict[str, list[float]] = {"unplugged": [], "pool": []}
    for _ in range(int(times)):
        found["unplugged"].append(first_touch(unplugged_file, SIZE))
        await_returned()
    with pool():
        for _ in range(int(times)):
            found["pool"].append(first_touch(lambda: make("ram", SIZE), SIZE))
            unlink("ram")
            while figures()[1] < SIZE:
                os.sched_yield()
    await_returned()
    return found


class SignalInfo(ctypes.Structure):
    """``struct signalfd_siginfo`` (linux/signalfd.h), as far as it is used here."""

    _fields_ = (
        ("signo", ctypes.c_uint32),
        ("errno", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 60),
        ("addr", ctypes.c_uint64),
        ("rest", ctypes.c_uint8 * 48),
    )


def user(fd: int, tell: int) -> None:
    """Map a file of SIZE bytes, wait for SIGBUS, and tell the offset in the file that it names."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
    mask = (ctypes.c_uint64 * 16)(1 << (signal.SIGBUS - 1))  # sigset_t
    signals = libc.signalfd(-1, ctypes.byref(mask), 0)
    memory = mmap.mmap(fd, SIZE)
    part = mmap.mmap(fd, PAGE, offset=64 * PAGE)  # has not the page: no reason to be killed
    os.write(tell, b"ready")
    info = SignalInfo.from_buffer_copy(os.read(signals, ctypes.sizeof(SignalInfo)))
    os.write(tell, f"{signal.Signals(info.signo).name} at {info.addr - address(memory):#x} {part[0]}".encode())


def offline(fd: int, page: int) -> str:
    """Have memory_failure() called for a page of a file; what its user is told."""
    with open("/proc/sys/vm/memory_failure_early_kill", "w") as file:  # noqa: PTH123
        file.write("1")  # else it asks nobody but a process that ran into the page
    heard, tell = os.pipe()
    child = os.fork()
    if child == 0:
        user(fd, tell)
        os._exit(0)
    os.close(tell)
    os.read(heard, 5)
    with open("/dev/kmsg", "rb", buffering=0) as log:  # noqa: PTH123
        os.lseek(log.fileno(), 0, os.SEEK_END)
        HARD_OFFLINE.write_text(hex(page))
        told = os.read(heard, 100).decode()
        os.waitpid(child, 0)
        while b"memory failed at" not in os.read(log.fileno(), 8192):
            pass
    return told


def failed(how: str = "mce") -> Any:
    """A page of a file fails: its user's signal, and whether the page is ever given out again."""
    result: dict[str, Any] = {}
    with pool():
        fd = make("ram", SIZE)
        memory = mmap.mmap(fd, SIZE)
        words(memory)[:: PAGE // 8] = 1
        where, _ = ranges_of(memory, SIZE)[0]
        page = where + 7 * PAGE
        if how == "mce":
            inject(page)
            while figures()[4] == 0 and is_mapped(os.getpid(), address(memory) + 7 * PAGE):
                os.sched_yield()
        else:
            del memory  # or memory_failure() would kill this process, which asks for it
            result["told"] = offline(fd, page)
            memory = mmap.mmap(fd, SIZE)
        result["signal"] = in_child(lambda: memory_at(fd, 7 * PAGE))
        result["other page"] = in_child(lambda: memory_at(fd, 8 * PAGE))
        del memory
        os.close(fd)
        unlink("ram")
        while (now := figures())[1] < SIZE - PAGE:
            os.sched_yield()
        result["failed"] = now[4]
        result["all of it"] = failure(lambda: make("all", SIZE))
        fd = make("all", SIZE - PAGE)
        memory = mmap.mmap(fd, SIZE - PAGE)
        result["zero"] = not words(memory).any()
        result["given again"] = any(start <= page < start + length for start, length in ranges_of(memory, SIZE - PAGE))
        del memory
        os.close(fd)
    result["returning"] = await_returned()
    with open("/sys/class/misc/offmap/kept") as file:  # noqa: PTH123
        result["kept"] = int(file.read())
    return result


def taken() -> int:
    """Bytes that whoever asks for memory now has got so far."""
    return sum(int(line.split()[2]) for line in (SYSFS / "requests").read_text().splitlines())


def claimed() -> list[int]:
    """Where what is out begins, in ascending order."""
    with open("/proc/iomem") as file:  # noqa: PTH123
        return [int(line.split("-")[0], 16) for line in file if line.rstrip().endswith(": offmap")]


def failed_early() -> Any:
    """A page of a pool's first block fails while the pool gets its other blocks."""
    subprocess.run(["modprobe", "mce-inject"], check=True)
    before = claimed()
    child = os.fork()
    if child == 0:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # so that what is told of the page is before it
        mount(f"size={3 * BLOCK},allow_nested")
        os._exit(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # so that it gets no further meanwhile
    while taken() < BLOCK:
        time.sleep(0.001)
    inject([start for start in claimed() if start not in before][-1])  # blocks are taken from the top down
    still = bool(taken())
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    result: dict[str, Any] = {"still taking": still, "mounted": os.waitpid(child, 0)[1] == 0}
    until = time.monotonic() + 20
    while not figures()[4] and time.monotonic() < until:
        os.sched_yield()
    result["failed"] = figures()[4]
    unmount()
    await_returned()
    return result


def nested() -> Any:
    """Whether a pool is refused while a guest of it could be a host."""
    return {"refused": failure(lambda: mount("size=128M"))}


if __name__ == "__main__":
    actions = (basics, holes, sizes, quotas, held, guards, nested, stress, speed, failed, failed_early)
    print(json.dumps({action.__name__: action for action in actions}[sys.argv[1]](*sys.argv[2:])))
