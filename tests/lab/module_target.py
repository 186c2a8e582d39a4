"""What test_module.py does to /dev/offmap in a disposable host: ``module_target.py WHAT`` prints JSON."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from offmap.audit.kcore import Kcore
from offmap.audit.pagemap import pfn, present, read_pagemap
from offmap.audit.residency import physical_ranges
from offmap.uapi import offmap_module as uapi

MIB = 1 << 20
PAGE = 4096
SIZE = 256 * MIB
BLOCK = 128 * MIB  # a memory block of a small host
SYS_MEMFD_SECRET = 447
SYS_DELETE_MODULE = 176
MREMAP_MAYMOVE = 1
HOSTS = 0x5A5A_5A5A_0FF5_ED01  # fills the host's memory before
GUESTS = 0xA5A5_A5A5_0FF5_ED02  # and the guest's

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p


def open_device(flags: int = os.O_RDWR) -> int:
    return os.open(uapi.DEVICE, flags | os.O_CLOEXEC)


def take(fd: int, size: int = SIZE, node: int = -1) -> int:
    request = uapi.offmap_unplug(size, node, 0)
    fcntl.ioctl(fd, uapi.OFFMAP_UNPLUG, request)
    return int(request.size)


def bind(fd: int, secret: int) -> int:
    request = uapi.offmap_secretmem(secret, 0, 0)
    fcntl.ioctl(fd, uapi.OFFMAP_BIND_SECRETMEM, request)
    return int(request.size)


def secret_file(size: int) -> int:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    fd = int(libc.syscall(SYS_MEMFD_SECRET, 0))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "memfd_secret")
    if size:
        os.ftruncate(fd, size)
    return fd


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def words(memory: mmap.mmap) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    return np.frombuffer(memory, dtype=np.uint64)


def frames(memory: mmap.mmap, size: int) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        entries = read_pagemap(fd, address(memory), size // PAGE)
    finally:
        os.close(fd)
    return pfn(entries[present(entries)])


def pages_with(kcore: Kcore, addresses: "np.ndarray[Any, np.dtype[np.uint64]]", mark: int) -> list[int]:
    """Those of some pages of RAM that begin with a mark, read by physical address."""
    found = []
    for part in np.array_split(addresses, max(1, len(addresses) // 1024)):
        out = np.zeros((len(part), PAGE // 8), dtype=np.uint64)
        kcore.read_pages(part, out)
        found += part[out[:, 0] == np.uint64(mark)].tolist()
    return found


def leftovers() -> Any:
    """The host's leftovers in what is taken, and the guest's in what is given back."""
    size = (int(meminfo()["MemAvailable"].split()[0]) >> 10) * MIB - 160 * MIB
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words(memory)[:: PAGE // 8] = HOSTS
    pages = np.sort(frames(memory, size) * np.uint64(PAGE))[::32]  # a sample
    del memory  # freed, and nobody has zeroed it
    with Kcore() as kcore:
        dirty = pages_with(kcore, pages, HOSTS)
    fd = open_device()
    take(fd)
    taken = mmap.mmap(fd, SIZE)
    ranges = physical_ranges(os.getpid(), address(taken), SIZE)
    view = words(taken)
    result = {
        "leftovers": sum(any(start <= page < start + length for start, length in ranges) for page in dirty),
        "zero_before": not view.any(),
    }
    view[:: PAGE // 8] = GUESTS
    del view, taken
    os.close(fd)
    inside = np.concatenate([np.arange(start, start + length, PAGE, dtype=np.uint64) for start, length in ranges])
    with Kcore() as kcore:
        result["pages"] = len(inside)
        result["guests_after"] = len(pages_with(kcore, inside, GUESTS))
        # The control: the same read finds what is there.
        memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        words(memory)[:: PAGE // 8] = GUESTS
        result["control"] = len(pages_with(kcore, np.sort(frames(memory, MIB) * np.uint64(PAGE)), GUESTS))
    return result


def failure(action: Callable[[], object]) -> str:
    """The errno that an action fails with, by name; empty if it does not fail."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def hostile() -> Any:
    """All that must be refused, each by its errno."""
    result = {}
    fd = open_device()
    read_write = mmap.PROT_READ | mmap.PROT_WRITE
    result["private"] = failure(lambda: mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=read_write))
    result["exec"] = failure(lambda: mmap.mmap(fd, SIZE, prot=read_write | mmap.PROT_EXEC))
    result["offset"] = failure(lambda: mmap.mmap(fd, PAGE, offset=PAGE))
    result["no size"] = failure(lambda: take(fd, 0))
    result["2^63"] = failure(lambda: take(fd, 1 << 63))
    result["2^64 - 1"] = failure(lambda: take(fd, (1 << 64) - 1))
    result["no such node"] = failure(lambda: take(fd, SIZE, 77))
    result["negative node"] = failure(lambda: take(fd, SIZE, -2))
    result["flags"] = failure(lambda: fcntl.ioctl(fd, uapi.OFFMAP_UNPLUG, uapi.offmap_unplug(SIZE, -1, 1)))
    result["bad pointer"] = failure(lambda: ioctl_at(fd, uapi.OFFMAP_UNPLUG, 0xDEAD_0000))
    result["unknown"] = failure(lambda: fcntl.ioctl(fd, 0xB7FF, 0))
    result["translate nothing"] = failure(lambda: physical_ranges(os.getpid(), 0x1000, PAGE))
    result["translate nobody"] = failure(lambda: physical_ranges(4_000_000, 0x1000, PAGE))
    result["nothing taken yet"] = str(holders())
    size = take(fd)
    result["twice"] = failure(lambda: take(fd))
    result["too large"] = failure(lambda: mmap.mmap(fd, size + PAGE))
    result["beyond"] = failure(lambda: mmap.mmap(fd, 2 * PAGE, offset=size - PAGE))
    read_only = open_device(os.O_RDONLY)
    result["read-only"] = failure(lambda: mmap.mmap(read_only, PAGE, prot=mmap.PROT_READ))
    memory = mmap.mmap(fd, size)
    memory[0] = 1
    at = ctypes.c_void_p(address(memory))
    result["mprotect exec"] = failure(lambda: call(libc.mprotect, at, size, mmap.PROT_READ | mmap.PROT_EXEC))
    result["expand"] = failure(lambda: call(libc.mremap, at, size, size + PAGE, MREMAP_MAYMOVE))
    result["duplicate"] = failure(lambda: call(libc.mremap, at, 0, size, MREMAP_MAYMOVE))
    result["dontneed"] = failure(lambda: call(libc.madvise, at, size, mmap.MADV_DONTNEED))
    result["dofork"] = failure(lambda: call(libc.madvise, at, size, mmap.MADV_DOFORK))
    result["/proc/self/mem"] = failure(lambda: os.pread(os.open("/proc/self/mem", os.O_RDONLY), 8, address(memory)))
    result["process_vm_readv"] = failure(lambda: read_as_another(memory))
    child = os.fork()
    if child == 0:
        os._exit(memory[0])  # no such mapping: a segmentation fault
    result["fork"] = signal.Signals(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1).name
    result["moved"] = str(moved(fd, size))
    result["unprivileged"] = failure(lambda: unprivileged(fd))
    return result


def moved(fd: int, size: int) -> int:
    """Move half of a second mapping elsewhere, and write through both."""
    first, second = mmap.mmap(fd, size), mmap.mmap(fd, size)
    second[size - 1] = 42
    at = libc.mremap(ctypes.c_void_p(address(first) + size // 2), size // 2, size // 2, MREMAP_MAYMOVE)
    return at is not None and ctypes.string_at(at + size // 2 - 1, 1)[0]


def unprivileged(fd: int) -> None:
    """Command a file that somebody with the right to has opened."""
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os._exit(getattr(errno, failure(lambda: take(fd)), 0))
    raise OSError(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "")


def read_as_another(memory: mmap.mmap) -> None:
    """process_vm_readv(2), which goes through GUP whoever is asked."""
    local = ctypes.create_string_buffer(8)
    iov = (ctypes.c_void_p * 2)(ctypes.addressof(local), 8)
    remote = (ctypes.c_void_p * 2)(address(memory), 8)
    call(libc.process_vm_readv, os.getpid(), iov, 1, remote, 1, 0)


def ioctl_at(fd: int, request: int, pointer: int) -> None:
    call(libc.ioctl, fd, ctypes.c_ulong(request), ctypes.c_void_p(pointer))


def call(function: Callable[..., Any], *arguments: Any) -> None:
    if function(*arguments) in (-1, None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "")


def holders() -> list[list[str]]:
    with open("/sys/class/misc/offmap/holders") as file:  # noqa: PTH123
        return [line.split() for line in file.read().splitlines()]


def secrets() -> Any:
    """What must be refused of memfd_secret files, and what becomes of a bound one."""
    result = {}
    size = 4 * MIB
    fd = open_device()
    result["no fd"] = failure(lambda: bind(fd, 999))
    result["the device itself"] = failure(lambda: bind(fd, fd))
    result["memfd"] = failure(lambda: bind(fd, os.memfd_create("ram")))
    result["a pipe"] = failure(lambda: bind(fd, os.pipe()[0]))
    result["a path only"] = failure(lambda: bind(fd, os.open("/dev/null", os.O_PATH)))
    result["empty"] = failure(lambda: bind(fd, secret_file(0)))
    result["half a page"] = failure(lambda: bind(fd, secret_file(PAGE + 100)))
    secret = secret_file(size)
    memory = mmap.mmap(secret, size)
    for position in range(0, size - PAGE, PAGE):
        memory[position] = 1
    result["a page missing"] = failure(lambda: bind(fd, secret))
    assert memory[size - 1] == 0  # read only: a page that nothing but the module will hold
    result["bound"] = str(bind(fd, secret))
    result["grow"] = failure(lambda: os.ftruncate(secret, 2 * size))
    result["truncate"] = failure(lambda: os.ftruncate(secret, PAGE))
    result["twice"] = failure(lambda: bind(fd, secret_file(size)))
    other = open_device()
    result["by another"] = failure(lambda: bind(other, secret))
    result["private"] = failure(lambda: mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE))
    result["too large"] = failure(lambda: mmap.mmap(fd, size + PAGE))
    result["beyond"] = failure(lambda: mmap.mmap(fd, PAGE, offset=size))
    before = frames(memory, size)
    words(memory)[:: PAGE // 8] = np.arange(1, size // PAGE + 1, dtype=np.uint64)
    del memory
    os.close(secret)
    view = mmap.mmap(fd, size)
    os.close(fd)
    os.close(other)
    # Nothing but the mapping holds all this now.
    result["unload"] = failure(lambda: call(libc.syscall, SYS_DELETE_MODULE, b"offmap", os.O_NONBLOCK))
    for knob in ("drop_caches", "compact_memory"):
        with open(f"/proc/sys/vm/{knob}", "w") as file:  # noqa: PTH123
            file.write("3" if knob == "drop_caches" else "1")
    result["content"] = str(bool((words(view)[:: PAGE // 8] == np.arange(1, size // PAGE + 1, dtype=np.uint64)).all()))
    ranges = physical_ranges(os.getpid(), address(view), size)
    pages = np.concatenate([np.arange(start, start + length, PAGE, dtype=np.uint64) for start, length in ranges])
    result["translated"] = str(bool((pages // np.uint64(PAGE) == before).all()))
    result["holders"] = str([line[1:3] for line in holders()])
    return result


def takers() -> Any:
    """Two that ask at once: where each one's memory is."""
    fds = [open_device(), open_device()]
    results: list[Any] = [None, None]

    def ask(number: int) -> None:
        results[number] = failure(lambda: take(fds[number], SIZE))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    where = []
    for fd, result in zip(fds, results, strict=True):
        if not result:
            memory = mmap.mmap(fd, SIZE)
            where.append(physical_ranges(os.getpid(), address(memory), SIZE))
    return {"errors": results, "ranges": where, "holders": len(holders())}


def gigabytes() -> Any:
    """So much that a gigabyte which the direct map has as one page must go: the host before, meanwhile, after."""
    size = 4 << 30
    before = state()
    fd = open_device()
    taken = take(fd, size)
    memory = mmap.mmap(fd, taken)
    view = words(memory)
    result = {
        "taken": taken,
        "address": address(memory),
        "zero": not view[:: PAGE // 8].any(),
        "ranges": physical_ranges(os.getpid(), address(memory), taken),
        "out": state(),
    }
    view[:: PAGE // 8 * 64] = GUESTS
    del view, memory
    os.close(fd)
    return {**result, "before": before, "after": state()}


def refusal() -> Any:
    """More than the host can spare: how much it says it could."""
    fd = open_device()
    request = uapi.offmap_unplug(1900 * MIB, -1, 0)
    error = failure(lambda: fcntl.ioctl(fd, uapi.OFFMAP_UNPLUG, request))
    return {"error": error, "spare": request.size, "holders": holders(), "then": take(fd, SIZE)}


def kills() -> Any:
    """Kill 20 takers and 20 binders: some at once, some when they have it, the others in between; what is left then.

    Also how many of each had it.
    """
    chance = random.Random(11)
    had = {}
    for name, get in (("unplugged", get_blocks), ("secretmem", get_secret)):
        had[name] = 0
        takes = 0.0  # seconds, of a first child that is left to finish: the kills are spread around that
        for number in range(21):
            ready, go = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(go, b"x")
                get()
                os.write(go, b"x")
                signal.pause()
            os.close(go)  # a child that fails ends the wait for it
            os.read(ready, 1)
            if number == 0:
                began = time.monotonic()
                assert os.read(ready, 1), f"{name}: the first could not have it"
                takes = time.monotonic() - began
            elif number % 4 == 1:
                assert os.read(ready, 1), f"{name}: number {number} could not have it"
            elif number % 4 != 2:
                time.sleep(chance.uniform(0, 1.5 * takes))
            had[name] += number > 0 and bool(holders())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(ready)
    return {"had": had, "holders": holders()}


def get_blocks() -> None:
    fd = open_device()
    words(mmap.mmap(fd, SIZE))[:: PAGE // 8] = GUESTS  # the mapping takes them


def get_secret() -> None:
    fd = open_device()
    secret = secret_file(16 * MIB)
    words(mmap.mmap(secret, 16 * MIB))[:: PAGE // 8] = GUESTS
    bind(fd, secret)
    words(mmap.mmap(fd, 16 * MIB))[:: PAGE // 8] = GUESTS


def succession() -> Any:
    """Take at once what another had, or was getting, when it was killed: how that fails, if it does, and how often."""
    size = 1 << 30  # more than half of what the host can spare
    result: dict[str, Any] = {"errors": [], "while it was getting it": 0}
    for number in range(6):
        child = os.fork()
        if child == 0:
            take(open_device(), size)
            signal.pause()
        wanted = "requests" if number % 2 else "holders"
        with open(f"/sys/class/misc/offmap/{wanted}") as file:  # noqa: PTH123
            while not file.read():
                file.seek(0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        result["while it was getting it"] += number % 2
        fd = open_device()
        result["errors"].append(failure(partial(take, fd, size)))
        os.close(fd)
    return result


def meminfo() -> dict[str, str]:
    with open("/proc/meminfo") as file:  # noqa: PTH123
        return dict(line.split(":") for line in file)


RETURNING = "/sys/class/misc/offmap/returning"


def await_returned(patience: float = 60.0) -> int:
    """Wait until no memory is on its way back to the kernel; the bytes that still are, once the patience is over."""
    deadline = time.monotonic() + patience
    with open(RETURNING) as file:  # noqa: PTH123
        poll = select.poll()
        poll.register(file, select.POLLPRI | select.POLLERR)
        while (size := int(file.read())) and (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
            file.seek(0)
    return size


def state() -> Any:
    """The host's memory, once all is back that is on its way: what must be as before."""
    await_returned()
    lines = meminfo()
    offline = subprocess.run(
        ["grep", "-L", "^online", *(f"{entry.path}/state" for entry in memory_blocks())],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    memtypes = "/sys/kernel/debug/x86/pat_memtype_list"
    with open("/proc/iomem") as iomem, open(memtypes) as types:  # noqa: PTH123
        return {
            "direct_map": {name: lines[name].split()[0] for name in lines if name.startswith("DirectMap")},
            "total_kib": int(lines["MemTotal"].split()[0]),
            "blocks": len(list(memory_blocks())),
            "offline": offline,
            "claimed": [line.split()[0] for line in iomem if line.rstrip().endswith(": offmap")],
            "memtypes": types.read().splitlines(),
        }


def memory_blocks() -> "Iterator[os.DirEntry[str]]":
    with os.scandir("/sys/devices/system/memory") as entries:
        yield from sorted((e for e in entries if e.name[:6] == "memory" and e.name[6:].isdigit()), key=lambda e: e.name)


def nodes() -> Any:
    """Take memory of each NUMA node in turn: which blocks each node has before, meanwhile and after."""
    result: dict[str, Any] = {"before": node_blocks(), "total": len(list(memory_blocks()))}
    for node in result["before"]:
        fd = open_device()
        take(fd, SIZE, int(node))
        memory = mmap.mmap(fd, SIZE)
        ranges = physical_ranges(os.getpid(), address(memory), SIZE)
        result[node] = {"out": node_blocks(), "taken": [start // BLOCK for start, _ in blocks_of(ranges)]}
        del memory
        os.close(fd)
        result[node]["after"] = node_blocks()
    request = uapi.offmap_unplug(1 << 30, 1, 0)
    fd = open_device()
    result["too much"] = failure(lambda: fcntl.ioctl(fd, uapi.OFFMAP_UNPLUG, request))
    result["spare"] = request.size
    return result


def blocks_of(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, length in ranges:
        yield from ((at, BLOCK) for at in range(start, start + length, BLOCK))


def node_blocks() -> dict[str, list[int]]:
    """The memory blocks of each NUMA node, by number."""
    found = {}
    with os.scandir("/sys/devices/system/node") as entries:
        for entry in entries:
            if entry.name.startswith("node"):
                names = os.listdir(entry.path)  # noqa: PTH208
                numbers = [name.removeprefix("memory") for name in names if name.startswith("memory")]
                found[entry.name.removeprefix("node")] = sorted(int(n) for n in numbers if n.isdigit())
    return found


def hold() -> Any:
    """Take memory and keep it until the input ends; the state meanwhile."""
    fd = open_device()
    take(fd)
    memory = mmap.mmap(fd, SIZE)
    memory[0] = 1
    ranges = physical_ranges(os.getpid(), address(memory), SIZE)
    print(json.dumps({**state(), "ranges": ranges, "holders": holders(), "pid": os.getpid()}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    actions = (leftovers, hostile, secrets, takers, refusal, succession, kills, gigabytes, nodes, state, hold)
    print(json.dumps({action.__name__: action for action in actions}[sys.argv[1]]()))
