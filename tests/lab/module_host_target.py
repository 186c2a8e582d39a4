"""What test_module_host.py does in a disposable host: ``python -m tests.lab.module_host_target WHAT`` prints JSON.

All of it is about what the host must keep while /dev/offmap takes memory from it.
"""

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from offmap.audit.residency import physical_ranges
from offmap.kvm import Kvm
from offmap.uapi import offmap_module as uapi

from .module_target import (
    BLOCK,
    MIB,
    PAGE,
    RETURNING,
    SIZE,
    address,
    await_returned,
    bind,
    failure,
    frames,
    holders,
    libc,
    meminfo,
    open_device,
    secret_file,
    state,
    take,
    words,
)

PARAMETERS = Path("/sys/module/offmap/parameters")
SYSFS = Path("/sys/class/misc/offmap")
HARD_OFFLINE = Path("/sys/devices/system/memory/hard_offline_page")
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
INJECT = Path("/sys/kernel/debug/mce-inject")
KPF_HWPOISON = 19
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01


@contextmanager
def parameters(**values: int) -> Iterator[None]:
    """Module parameters, for a while."""
    before = {name: (PARAMETERS / name).read_text() for name in values}
    for name, value in values.items():
        (PARAMETERS / name).write_text(str(value))
    try:
        yield
    finally:
        for name, text in before.items():
            (PARAMETERS / name).write_text(text)


def available() -> int:
    return int(meminfo()["MemAvailable"].split()[0]) << 10


def poisoned(page: int) -> bool:
    with open("/proc/kpageflags", "rb") as file:  # noqa: PTH123
        file.seek(page * 8)
        flags = int.from_bytes(file.read(8), "little")
    return bool(flags >> KPF_HWPOISON & 1)


def corrupted() -> int:
    return int(meminfo()["HardwareCorrupted"].split()[0])


def take_all() -> list[int]:
    """Take block by block until no more can be had."""
    fds = [open_device()]
    while not failure(lambda: take(fds[-1], BLOCK)):
        fds.append(open_device())
    os.close(fds.pop())
    return fds


def give_back(fds: list[int]) -> list[tuple[int, int]]:
    """Close files of one block each; returns the physical ranges (start, length) that they had."""
    ranges = []
    for fd in fds:
        view = mmap.mmap(fd, BLOCK)
        ranges += physical_ranges(os.getpid(), address(view), BLOCK)
        view.close()
        os.close(fd)
    return ranges


def poison() -> Any:
    """Pages that failed before: whether they are still known to have, when all that can go has gone and is back."""
    memory = mmap.mmap(-1, 3 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words(memory)[:: PAGE // 8] = 1
    mapped = frames(memory, 3 * BLOCK)
    _, first = np.unique(mapped // np.uint64(BLOCK // PAGE), return_index=True)
    pages = [int(page) for page in mapped[first]][-3:]
    before = corrupted()
    for page in pages:
        HARD_OFFLINE.write_text(hex(page * PAGE))
    result: dict[str, Any] = {"pages": len(pages), "failed": (corrupted() - before) // 4}
    del memory
    fds = take_all()
    result["taken"] = len(fds)
    result["meanwhile"] = (corrupted() - before) // 4
    for fd in fds:
        os.close(fd)
    await_returned()
    result["after"] = (corrupted() - before) // 4
    result["still poisoned"] = sum(map(poisoned, pages))
    return result


class Pinned:
    """A page in every memory block that can be had, held by pipes: nothing can move it."""

    def __init__(self) -> None:
        size = available() - 192 * MIB
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        libc.madvise(ctypes.c_void_p(address(memory)), ctypes.c_size_t(size), 15)  # MADV_NOHUGEPAGE
        words(memory)[:: PAGE // 8] = 1
        blocks = frames(memory, size) // np.uint64(BLOCK // PAGE)
        self.blocks, first = np.unique(blocks, return_index=True)
        self.pipes = []
        for index in first:
            read, write = os.pipe()
            iov = (ctypes.c_void_p * 2)(address(memory) + int(index) * PAGE, PAGE)
            assert libc.vmsplice(write, iov, ctypes.c_ulong(1), 0) == PAGE
            self.pipes += [read, write]
        self._memory = memory

    def close(self) -> None:
        for pipe in self.pipes:
            os.close(pipe)


def pinned() -> Any:
    """Takers where each block has a page that cannot be moved: one that waits, one that is killed, and the log."""
    pins = Pinned()
    del pins._memory
    with parameters(block_timeout=1, timeout=3):
        began = time.monotonic()
        fd = open_device()
        request = uapi.offmap_unplug(SIZE, -1, 0)
        result: dict[str, Any] = {"blocks": len(pins.blocks)}
        seen: list[list[str]] = []
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.1):
                seen.extend(line.split() for line in (SYSFS / "requests").read_text().splitlines())

        looker = threading.Thread(target=look)
        looker.start()
        result["error"] = failure(lambda: libc_ioctl(fd, request))
        result["seconds"] = time.monotonic() - began
        done.set()
        looker.join()
        result["shown"] = bool(seen) and seen[0][0] == str(os.getpid()) and int(seen[-1][3]) > 0
    with parameters(block_timeout=300, timeout=600):
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(go, b"x")
            take(open_device())
            os._exit(0)
        os.read(ready, 1)
        while not (SYSFS / "requests").read_text():
            time.sleep(0.05)
        result["hibernation"] = failure(hibernate)
        began = time.monotonic()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        result["killed after"] = time.monotonic() - began
        # One who comes then is not held up by what the killed one had asked for.
        while (SYSFS / "requests").read_text():
            time.sleep(0.05)
        result["left after"] = time.monotonic() - began
    pins.close()
    result["then"] = take(open_device())
    return result


def hibernate() -> None:
    """Hibernate the host, as far as its processes are frozen."""
    Path("/sys/power/pm_test").write_text("freezer")
    Path("/sys/power/state").write_text("disk")


def starved() -> Any:
    """A taker while tasks that could run get next to no processor: they may be about to read struct pages."""
    root = Path("/sys/fs/cgroup")
    if not (root / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "none", root], check=True)
    (root / "cgroup.subtree_control").write_text("+cpu")
    slow = root / "slow"
    slow.mkdir()
    (slow / "cpu.max").write_text("1000 1000000")  # a millisecond of each second, for all of them
    before = state()
    spinners = []
    for _ in range(4):
        child = os.fork()
        while child == 0:
            pass
        (slow / "cgroup.procs").write_text(str(child))
        spinners.append(child)
    while "nr_throttled 0\n" in (slow / "cpu.stat").read_text():
        time.sleep(0.01)
    with parameters(block_timeout=1, timeout=2):
        began = time.monotonic()
        result: dict[str, Any] = {"error": failure(lambda: take(open_device(), BLOCK))}
        result["seconds"] = time.monotonic() - began
        while (SYSFS / "requests").read_text():
            time.sleep(0.01)
    result["lost"] = {name: after for name, after in state().items() if name != "total_kib" and after != before[name]}
    (slow / "cpu.max").write_text("max")
    for child in spinners:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    slow.rmdir()
    result["then"] = take(open_device(), BLOCK)
    return result


def libc_ioctl(fd: int, request: Any) -> None:
    if libc.ioctl(fd, ctypes.c_ulong(uapi.OFFMAP_UNPLUG), ctypes.byref(request)) < 0:
        raise OSError(ctypes.get_errno(), "")


def hugepages() -> Any:
    """The administrator's huge pages, all of them free: before, with all taken that can go, and after."""
    NR_HUGEPAGES.write_text(str(max(1, available() // 3 // (2 * MIB))))
    counts = [meminfo()["HugePages_Total"].strip()]
    fds = take_all()
    counts.append(meminfo()["HugePages_Total"].strip())
    for fd in fds:
        os.close(fd)
    await_returned()
    counts.append(meminfo()["HugePages_Total"].strip())
    NR_HUGEPAGES.write_text("0")
    return {"counts": [int(count) for count in counts], "taken": len(fds)}


def limits() -> Any:
    """What many takers at once leave of a reserve, and take of a limit."""
    result: dict[str, Any] = {}
    kept = available() - 3 * BLOCK
    for name, values in (("reserve", {"reserve": kept >> 20}), ("limit", {"limit": 2 * BLOCK >> 20})):
        with parameters(**values):
            fds = [open_device() for _ in range(8)]
            threads = [threading.Thread(target=failure, args=(lambda fd=fd: take(fd, BLOCK),)) for fd in fds]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            result[name] = {"holders": len(holders()), "left": available() - kept}
            for fd in fds:
                os.close(fd)
            await_returned()
    return result


def alias() -> Any:
    """A VM that has kvm-clock and lives on when its memory is unmapped: where that memory is then."""
    fd = open_device()
    take(fd, BLOCK)
    memory = mmap.mmap(fd, BLOCK)
    where, _ = physical_ranges(os.getpid(), address(memory), BLOCK)[0]
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vm.set_user_memory_region(0, 0, BLOCK, address(memory))
        vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: 0x5000 | 1})
        alias = f"phys=0x{where + 0x5000:016x}"
        result: dict[str, Any] = {"mapped": alias in Path("/proc/vmallocinfo").read_text()}
        os.close(fd)
        memory.close()
        result["while the VM lives"] = int(Path(RETURNING).read_text())
        result["still mapped"] = alias in Path("/proc/vmallocinfo").read_text()
        # What is out for this reason is nobody else's.
        others = take_all()
        ranges = give_back(others)
        result["given to another"] = any(start <= where < start + length for start, length in ranges)
        result["others"] = len(others)
    result["after"] = await_returned()
    result["mapped after"] = alias in Path("/proc/vmallocinfo").read_text()
    with open("/proc/iomem") as file:  # noqa: PTH123
        result["claimed after"] = sum(line.rstrip().endswith(": offmap") for line in file)
    return result


def tree() -> Any:
    """What the resource tree names beside RAM, for a reader that looks at it while blocks come and go."""
    names = ("Kernel code", "Crash kernel")
    seen = missing = 0
    done = threading.Event()

    def churn() -> None:
        for _ in range(6):
            fd = open_device()
            take(fd, SIZE)
            os.close(fd)
        done.set()

    before = sorted(tree_lines())
    thread = threading.Thread(target=churn)
    thread.start()
    while not done.is_set():
        text = Path("/proc/iomem").read_text()
        seen += 1
        missing += not all(name in text for name in names)
    thread.join()
    await_returned()
    return {"seen": seen, "missing": missing, "same": sorted(tree_lines()) == before}


def tree_lines() -> list[str]:
    """The lines of /proc/iomem but RAM's own, which is in other pieces afterwards."""
    return [line for line in Path("/proc/iomem").read_text().splitlines() if not line.endswith(": System RAM")]


def misuse() -> Any:
    """What is refused to those who have no right to it, or ask for what cannot be."""
    result: dict[str, Any] = {}
    fd = open_device()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os._exit(failure(lambda: mmap.mmap(fd, BLOCK)) != "EPERM")
    result["a fresh file, unprivileged"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    take(fd, BLOCK)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os._exit(mmap.mmap(fd, BLOCK)[0])
    result["a file with memory, unprivileged"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    other = open_device()
    result["huge secretmem"] = failure(lambda: bind(other, secret_file(1 << 42)))
    result["log"] = subprocess.run(
        ["sh", "-c", "dmesg | grep -c 'WARNING:\\|page dumped because'"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return result


def untried() -> Any:
    """Memory that was not there at boot, and secret memory, which cannot move, when all is taken that can go."""
    memory = mmap.mmap(secret_file(16 * MIB), 16 * MIB)
    words(memory)[:: PAGE // 8] = 1
    start = 4 << 30
    blocks = Path("/sys/devices/system/memory")
    added = [path for path in blocks.glob("memory[0-9]*") if int(path.name[6:]) * BLOCK >= start]
    for path in added:
        if (path / "state").read_text().strip() == "offline":
            (path / "state").write_text("online")
    ranges = give_back(take_all())
    await_returned()
    # The kernel dumps a page that it could not move.
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    result = {"added": len(added), "taken": len(ranges), "of it": sum(at >= start for at, _ in ranges)}
    return {**result, "secret": log.count("secretmem_aops")}


def is_mapped(pid: int, at: int) -> bool:
    """Whether a process has a page at an address; one that has been killed has none, nor a page map."""
    try:
        with open(f"/proc/{pid}/pagemap", "rb") as file:  # noqa: PTH123
            file.seek(at // PAGE * 8)
            return bool(int.from_bytes(file.read(8), "little") >> 63)
    except ProcessLookupError:
        return False


def inject(page: int) -> None:
    """Have the kernel told of a machine check at a physical address: an uncorrected error of memory."""
    subprocess.run(["modprobe", "mce-inject"], check=True)
    (INJECT / "flags").write_text("sw\n")
    # VAL, UC, EN, ADDRV, and POISON; extended error code 8 of bank 4 is DRAM, on AMD.
    bits = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 58 | 1 << 43 | 8 << 16
    (INJECT / "status").write_text(hex(bits))
    (INJECT / "addr").write_text(hex(page))
    (INJECT / "bank").write_text("4")


def fail_while_out(how: str) -> Any:
    """A page of memory that is out fails: its user's signal, and what becomes of the block."""
    report, done = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    child = os.fork()
    if child == 0:
        fd = open_device()
        take(fd, BLOCK)
        memory = mmap.mmap(fd, BLOCK)
        words(memory)[:: PAGE // 8] = 1
        where, _ = physical_ranges(os.getpid(), address(memory), BLOCK)[0]
        os.write(done, where.to_bytes(8, "little") + address(memory).to_bytes(8, "little"))
        signal.sigwait({signal.SIGUSR1})
        memory[PAGE * 8]  # another page
        os.write(done, b"other")
        os._exit(memory[PAGE * 7])
    os.close(done)
    heard = os.read(report, 16)
    where, at = (int.from_bytes(heard[half : half + 8], "little") for half in (0, 8))
    page = where + 7 * PAGE
    if how == "hard_offline":
        # Else memory_failure() asks nobody but the process that ran into the page.
        Path("/proc/sys/vm/memory_failure_early_kill").write_text("1")
        HARD_OFFLINE.write_text(hex(page))
    else:
        inject(page)
    with open("/dev/kmsg", "rb", buffering=0) as log:  # noqa: PTH123
        while b"memory failed at" not in os.read(log.fileno(), 8192):
            pass
    while is_mapped(child, at + 7 * PAGE):
        os.sched_yield()
    os.kill(child, signal.SIGUSR1)
    status = os.waitpid(child, 0)[1]
    result = {"signal": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(status)}
    result["other page"] = os.read(report, 5).decode()
    result["returning"] = str(await_returned())
    result["kept"] = (SYSFS / "kept").read_text().strip()
    ranges = give_back(take_all())
    result["given to another"] = str(any(start <= page < start + length for start, length in ranges))
    return result


if __name__ == "__main__":
    actions = (poison, pinned, starved, hugepages, limits, alias, tree, misuse, untried, fail_while_out)
    print(json.dumps({action.__name__: action for action in actions}[sys.argv[1]](*sys.argv[2:])))
