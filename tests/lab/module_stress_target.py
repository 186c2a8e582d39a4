"""All at once that makes memory hard to take: ``python -m tests.lab.module_stress_target SECONDS TAKERS``.

Takers come, are killed, and leave, while other processes fill memory, compact it, pin pages, let pages fail, and ask
for huge pages. Prints JSON: what was done, what went wrong, and whether the host's memory is as it was.
``--takes N``: it goes on after SECONDS until memory has been taken N times. ``--block-timeout``, ``--timeout``: the
module's parameters, in seconds.

A taker has its answer by the deadline of its request, whatever it had to queue for in the module and the kernel. It
asks with real-time priority and locked memory, so it does not queue for the processor as well, nor for a page of its
program that was dropped meanwhile: with many takers on one processor, that takes longer than the deadline.
"""

import argparse
import ctypes
import errno
import json
import mmap
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from offmap.audit.pageflags import KPF_HWPOISON

from .module_host_target import NR_HUGEPAGES, available, corrupted, parameters
from .module_target import (
    BLOCK,
    GUESTS,
    MIB,
    PAGE,
    address,
    await_returned,
    bind,
    failure,
    holders,
    libc,
    meminfo,
    open_device,
    secret_file,
    state,
    take,
    words,
)

BLOCK_TIMEOUT, TIMEOUT = 2, 10
GRACE = 60  # more seconds, on a busy machine that takes its time from all of this one
EXPECTED = ("", "ENOMEM", "ETIMEDOUT")
SPARE = 256 * MIB  # left by the workers, so that none is ended for lack of memory
MADV_HWPOISON = 100
MCL_CURRENT = 1
UNCHANGED = ("blocks", "offline", "claimed", "memtypes")
UNPOISON = Path("/sys/kernel/debug/hwpoison/unpoison-pfn")


class Worker:
    """A process that does one thing again and again, and says what came of it in lines of JSON.

    Args:
        step: does it once, and returns what to count; and for how many seconds it waited, if that matters.
    """

    def __init__(self, name: str, step: Callable[[random.Random], str | tuple[str, float]], seed: int) -> None:
        self.name = name
        self.seen: Counter[str] = Counter()
        self.longest = 0.0  # seconds of waiting
        self._step = step
        self._seed = seed
        self._text = b""
        self.start()

    def start(self) -> None:
        """Start the process, also after it has been killed."""
        self._seed += 1000
        self._text = b""
        self.pipe, said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(said)
        os.close(said)
        os.set_blocking(self.pipe, False)

    def _work(self, said: int) -> None:
        chance = random.Random(self._seed)
        try:
            going: list[int] = [1]
            signal.signal(signal.SIGTERM, lambda *_: going.clear())
            while going:
                os.write(said, json.dumps(self._step(chance)).encode() + b"\n")
        except OSError as error:
            os.write(said, json.dumps(f"wrong: {error}").encode() + b"\n")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def listen(self) -> None:
        """Count what it has said since."""
        with suppress(BlockingIOError):
            while data := os.read(self.pipe, 1 << 16):
                *lines, self._text = (self._text + data).split(b"\n")
                for said in map(json.loads, lines):
                    what, waited = (said, 0) if isinstance(said, str) else said
                    self.seen[what] += 1
                    self.longest = max(self.longest, waited)

    def end(self, how: signal.Signals = signal.SIGKILL) -> bool:
        """Kill it, or let it end after its step (SIGTERM); return whether it was alive."""
        alive = os.waitpid(self.pid, os.WNOHANG)[0] == 0
        if alive:
            os.kill(self.pid, how)
            os.waitpid(self.pid, 0)
        self.listen()
        os.close(self.pipe)
        return alive


@contextmanager
def real_time() -> Iterator[None]:
    """Run before all ordinary processes."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def taker(limit: float, chance: random.Random) -> tuple[str, float]:
    """Take one block or two, look whether they are zero, fill them, and give them back by one of three ways.

    Args:
        limit: seconds that an answer may take.
    """
    fd = open_device()
    size = chance.choice((BLOCK, 2 * BLOCK))
    libc.mlockall(MCL_CURRENT)
    with real_time():
        began = time.monotonic()
        error = failure(partial(take, fd, size))
        wait = time.monotonic() - began
    if wait > limit + GRACE:
        return f"wrong: {error or 'taken'} after {wait:.0f} s", wait
    if error:
        time.sleep(chance.random())
        os.close(fd)
        return error, wait
    memory = mmap.mmap(fd, size)
    view = words(memory)[:: PAGE // 8]
    if view[:: chance.randrange(1, 64)].any():
        return "wrong: not zero", wait
    view[:] = GUESTS
    time.sleep(chance.random())
    if not (view == GUESTS).all():
        return "wrong: not what was written", wait
    del view
    if chance.random() < 0.5:  # the mapping, or the file, is the last that holds the memory
        os.close(fd)
        del memory
    else:
        del memory
        os.close(fd)
    return "taken", wait


def binder(chance: random.Random) -> str:
    """The same with secret memory."""
    fd, size = open_device(), chance.randrange(1, 64) * MIB
    secret = secret_file(size)
    words(mmap.mmap(secret, size))[:: PAGE // 8] = GUESTS
    bind(fd, secret)
    os.close(secret)
    ok = bool((words(mmap.mmap(fd, size))[:: PAGE // 8] == GUESTS).all())
    os.close(fd)
    return "bound" if ok else "wrong: not what was written"


def pressure(chance: random.Random) -> str:
    """Fill memory, in base pages or huge ones, with anonymous memory or a file's, as far as there is some."""
    size = int(available() * chance.uniform(0.2, 0.9)) // PAGE * PAGE
    try:
        memory = mmap.mmap(-1, size, flags=chance.choice((mmap.MAP_PRIVATE, mmap.MAP_SHARED)) | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return "no room"  # takers have taken so much since, that the kernel does not promise it
    libc.madvise(ctypes.c_void_p(address(memory)), ctypes.c_size_t(size), chance.choice((14, 15)))  # MADV_[NO]HUGEPAGE
    view = words(memory)[:: PAGE // 8]
    began = time.monotonic()
    for start in range(0, len(view), 4096):  # takers take meanwhile
        if available() < SPARE:
            break
        view[start : start + 4096] = 1
    took = time.monotonic() - began
    time.sleep(chance.random() / 2)
    del view, memory
    time.sleep(took * chance.random())  # the slower a host fills memory, the longer none is left for a taker
    return "filled"


def compaction(chance: random.Random) -> str:
    """Have the kernel move memory about."""
    Path("/proc/sys/vm", chance.choice(("compact_memory", "drop_caches"))).write_text("1")
    time.sleep(chance.random() / 4)
    return "compacted"


def pins(chance: random.Random) -> str:
    """Hold pages here and there so that they can't move, for a while."""
    size = 64 * MIB
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words(memory)[:: PAGE // 8] = 1
    pipes = []
    for _ in range(8):
        read, write = os.pipe()
        iov = (ctypes.c_void_p * 2)(address(memory) + chance.randrange(size // PAGE) * PAGE, PAGE)
        libc.vmsplice(write, iov, ctypes.c_ulong(1), 0)
        pipes += [read, write]
    time.sleep(chance.random() * 2)
    for pipe in pipes:
        os.close(pipe)
    return "pinned"


def poison(chance: random.Random) -> str:
    """Let a page fail, and be good again: one that a process lost is nobody's until then."""
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    libc.madvise(ctypes.c_void_p(address(memory)), ctypes.c_size_t(MIB), 15)
    words(memory)[:: PAGE // 8] = 1
    signal.signal(signal.SIGBUS, lambda *_: None)  # since 6.11 for who lets a page of its own fail
    at = address(memory) + chance.randrange(MIB // PAGE) * PAGE
    refused = libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), MADV_HWPOISON)
    # Which one it was when it failed: the kernel moves pages all the time. pagemap(5): an entry like one for swap.
    entry = _entry("/proc/self/pagemap", at // PAGE)
    frame = entry & (1 << 55) - 1 if entry >> 63 else entry >> 5 & (1 << 50) - 1
    if refused:
        if not _entry("/proc/kpageflags", frame) >> KPF_HWPOISON & 1:
            return "not poisoned"
        del memory  # it counts as failed, and was left where it is: the kernel does not make it good while it is mapped
    time.sleep(chance.random())
    for _ in range(1000):
        if not failure(lambda: UNPOISON.write_text(f"{frame}\n")):
            return "poisoned"
        time.sleep(0.01)
    return "wrong: poisoned for good"


def _entry(path: str, number: int) -> int:
    """A number of eight bytes of a table in /proc."""
    with open(path, "rb") as file:  # noqa: PTH123
        file.seek(8 * number)
        return int.from_bytes(file.read(8), "little")


def hugepages(chance: random.Random) -> str:
    """Ask for huge pages as an administrator; what there is then is there as long as nobody asks again."""
    NR_HUGEPAGES.write_text(str(chance.randrange(0, max(2, (available() - SPARE) // 4 // (2 * MIB)))))
    total = meminfo()["HugePages_Total"]
    ends = time.monotonic() + chance.random() * 2
    while time.monotonic() < ends:
        if (now := meminfo()["HugePages_Total"]) != total:
            return f"wrong: {total.strip()} huge pages became {now.strip()}"
        time.sleep(0.02)
    return "reserved"


def stress(seconds: float, takers: int, takes: int, limit: float) -> dict[str, Any]:
    """Run all of it, and kill a taker, the binder or who fills memory about every second."""
    NR_HUGEPAGES.write_text("0")
    before, failed = state(), corrupted()
    chance = random.Random(5)
    others = (binder, pressure, compaction, pins, poison, hugepages)
    workers = [Worker("taker", partial(taker, limit), place) for place in range(takers)]
    workers += [Worker(work.__name__, work, takers + place) for place, work in enumerate(others)]
    killed, wrong = 0, []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or sum(worker.seen["taken"] for worker in workers) < takes:
        time.sleep(chance.random() * 2)
        for worker in workers:
            worker.listen()
        if any("wrong" in what for worker in workers for what in worker.seen):
            break
        victim = chance.choice(workers[: takers + 2])  # takers, the binder, the one that fills memory
        if victim.end():
            killed += 1
        else:
            wrong.append(f"{victim.name} ended by itself")
        victim.start()
    done: Counter[str] = Counter()
    for worker in workers:
        # A page that has failed is to be good again.
        if not worker.end(signal.SIGTERM if worker.name == "poison" else signal.SIGKILL):
            wrong.append(f"{worker.name} ended by itself")
        done.update({f"{worker.name}: {what}": count for what, count in worker.seen.items()})
    NR_HUGEPAGES.write_text("0")
    left = await_returned(4 * limit)
    wrong += [what for what in done if "wrong" in what]
    wrong += [what for what in done if what.startswith("taker") and what[7:] not in (*EXPECTED, "taken")]
    after = state()
    return {
        "done": dict(sorted(done.items())),
        "killed": killed,
        "limit": limit,
        "longest": max(worker.longest for worker in workers),
        "wrong": wrong,
        "left": left,
        "holders": holders(),
        "failed": corrupted() - failed,
        # A block that comes back brings the struct pages that it had at boot: there is more then, and never less.
        "lost": max(0, before["total_kib"] - after["total_kib"]),
        "changed": {name: [before[name], after[name]] for name in UNCHANGED if before[name] != after[name]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("takers", type=int)
    parser.add_argument("--takes", type=int, default=1)
    parser.add_argument("--block-timeout", type=int, default=BLOCK_TIMEOUT)
    parser.add_argument("--timeout", type=int, default=TIMEOUT)
    args = parser.parse_args()
    # After how long a taker has its answer: docs/module.md.
    limit = args.timeout + 2 * args.block_timeout
    with parameters(block_timeout=args.block_timeout, timeout=args.timeout, reserve=SPARE >> 20):
        print(json.dumps(stress(args.seconds, args.takers, args.takes, limit)))
