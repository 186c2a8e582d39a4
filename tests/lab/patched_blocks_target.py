"""What test_patched.py does with the blocks of unmapped memory: ``patched_blocks_target.py WHAT [KIND]`` prints JSON.

How they are taken and given back, reused, split or not, and what races do to them.
"""

import ctypes
import json
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmap.audit.kcore import Kcore
from offmap.kvm import Kvm
from offmap.memory.guest import GuestMemory
from offmap.memory.guest_memfd import MAPPABLE, map_guest_memfd
from offmap.memory.populate import populate
from offmap.memory.secretmem import secret_backing
from offmap.uapi.kvm import KVM_EXIT_HLT

from .patched_target import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MIB,
    PAGE,
    at_start,
    await_return,
    call,
    failure,
    frames,
    memory,
    no_direct_map_flag,
    off_map,
)

PROGRAM = (sys.executable, "-m", "tests.lab.patched_blocks_target")


def populating(_kind: str) -> Any:
    """Nanoseconds and TLB flushes per page: by fallocate then touch, and by touch alone, with the flag and without."""

    def flushes() -> int:
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return sum(int(fields[name]) for name in ("nr_tlb_remote_flush_received", "nr_tlb_local_flush_one"))

    size = 64 * MIB
    result: dict[str, list[tuple[float, float]]] = {}
    with Kvm() as kvm:
        for _ in range(4):
            for name, flagged, allocate in (
                ("plain", False, True),
                ("plain, by faults", False, False),
                ("flagged", True, True),
                ("flagged, by faults", True, False),
            ):
                with kvm.create_vm() as vm:
                    flag = no_direct_map_flag(vm) if flagged else 0
                    with map_guest_memfd(vm, size, MAPPABLE | flag) as backing:
                        before, started = flushes(), time.monotonic_ns()
                        if allocate:
                            fd, mode = backing.guest_memfd, FALLOC_FL_KEEP_SIZE
                            call("fallocate", fd, mode, ctypes.c_long(0), ctypes.c_long(size))
                        populate(backing, 1)
                        pages = size // PAGE
                        spent = (time.monotonic_ns() - started) / pages, (flushes() - before) / pages
                result.setdefault(name, []).append(spent)
    return result


def reused(_kind: str) -> Any:
    """What the next file finds in pages that another one gave back while their blocks are in use."""

    def received() -> int:
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(fields["nr_tlb_remote_flush_received"])

    size = 4 * MIB
    with memory("unmapped", size) as (vm, first):
        first.view[:] = b"x" * size
        pfns = frames(first)
        # Every second page: no block is free as a whole.
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        for offset in range(0, size, 2 * PAGE):
            call("fallocate", first.guest_memfd, mode, ctypes.c_long(offset), ctypes.c_long(PAGE))
        while True:
            before = received()
            with map_guest_memfd(vm, size // 4, MAPPABLE | no_direct_map_flag(vm)) as second:
                found = np.frombuffer(second.view, dtype=np.uint8)
                nonzero = int(np.count_nonzero(found))
                again = int(np.isin(frames(second), pfns).sum())
                del found
                if again:  # else a batch of the LRU has them still
                    return {"again": again, "not zero": nonzero, "flushes": received() - before}


def split(_kind: str) -> Any:
    """KiB of the direct map in 4K pages: how many more there are after a hundred files, and what is off meanwhile."""

    def in_pages() -> int:
        return int(re.search(r"DirectMap4k:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]

    before, off, most = in_pages(), off_map(), 0
    for number in range(100):
        with Kvm() as kvm, kvm.create_vm() as vm:
            size = (1 + number * 7 % 13) * MIB + number % 5 * PAGE
            with map_guest_memfd(vm, size, MAPPABLE | no_direct_map_flag(vm)) as backing:
                if number % 2:
                    fd, mode = backing.guest_memfd, FALLOC_FL_KEEP_SIZE
                    call("fallocate", fd, mode, ctypes.c_long(0), ctypes.c_long(size))
                populate(backing, 1)
                most = max(most, off_map() - off)
    await_return(off)
    return {"meanwhile": most * PAGE >> 10, "more in 4K pages": in_pages() - before}


def populated(kind: str) -> Any:
    """The errno of madvise(2) with each way of populating, and how many pages are there afterwards."""
    size = 2 * MIB
    with Kvm() as kvm, kvm.create_vm() as vm:
        if kind == "secretmem":
            backing = secret_backing(size)
        else:
            backing = map_guest_memfd(vm, size, MAPPABLE | no_direct_map_flag(vm))
        with backing:
            address = ctypes.c_void_p(backing.address)
            result: dict[str, Any] = {
                name: failure(partial(call, "madvise", address, ctypes.c_size_t(length), advice))
                for name, advice, length in (("MADV_POPULATE_READ", 22, size // 2), ("MADV_POPULATE_WRITE", 23, size))
            }
            return result | {"there": len(frames(backing))}


def flush_calls(_kind: str) -> Any:
    """Addresses of the calls in which the kernel flushes the TLBs when it takes a block off its direct map."""
    lines = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    symbols = {name: int(address, 16) for address, _, name, *module in lines if not module}
    start, end = symbols["no_direct_map_alloc"], symbols["no_direct_map_return"]
    text = bytearray(end - start)
    with Kcore() as kcore:
        kcore.read_virtual(start, memoryview(text))
    calls = ((at, struct.unpack_from("<i", text, at + 1)[0]) for at in range(len(text) - 4) if text[at] == 0xE8)
    return [start + at for at, off in calls if start + at + 5 + off == symbols["flush_tlb_kernel_range"]]


MARK = np.uint64(0xA5A5A5A5A5A5A5A5)
MARKED = 4 * MIB


def marked(kcore: Kcore, pfns: NDArray[np.uint64]) -> int:
    """How many of some pages the kernel reads by its direct map, all of them filled with the mark."""
    found = np.zeros((len(pfns), PAGE // 8), dtype=np.uint64)
    kcore.read_pages(pfns * np.uint64(PAGE), found)
    return int(np.count_nonzero((found == MARK).all(axis=1)))


@contextmanager
def filled(kind: str) -> Iterator[NDArray[np.uint64]]:
    """The page frames of memory that is full of the mark."""
    with memory(kind, MARKED) as (_, backing):
        np.frombuffer(backing.view, dtype=np.uint64)[:] = MARK
        yield np.sort(frames(backing))


def stale(kind: str) -> Any:
    """How many pages a second processor still reads by its TLB, i.e. by the direct map that they have just left.

    It has read these addresses before the first processor filled the pages; the most of four times.
    """
    before, seen = off_map(), []
    want, have = (np.frombuffer(mmap.mmap(-1, PAGE), dtype=np.uint8) for _ in range(2))
    pfns = np.frombuffer(mmap.mmap(-1, MARKED // PAGE * 8), dtype=np.uint64)
    if not (other := os.fork()):
        os.sched_setaffinity(0, {0})
        while True:
            with filled(kind) as ours:
                pfns[:] = ours
                have[0] = 1
                while want[0]:
                    pass
            await_return(before)
            have[0] = 0
            while not want[0]:
                pass

    def ask(state: int) -> None:
        want[0] = state
        while have[0] != state:  # without a sleep: no other process runs here, and the processor keeps its TLB
            pass

    os.sched_setaffinity(0, {1})
    with Kcore() as kcore:
        for _ in range(4):
            ask(1)  # to learn which pages it will get again
            ask(0)
            marked(kcore, pfns)
            ask(1)
            seen.append(marked(kcore, pfns))
            ask(0)
    os.kill(other, signal.SIGKILL)
    return max(seen)


# 16-bit: count in the first byte of each page from 128 KiB to 960 KiB, then hlt.
TOUCH_PAGES = bytes.fromhex("b80020 8ed8 fe060000 050001 3d00f0 72f2 f4")


def racing(seed: str) -> Any:
    """Fault, allocate, punch and run a guest on one file at once, until killed: a page holds our mark, or is zero."""
    chance = random.Random(seed)
    pages = 512 * 3
    with (
        Kvm() as kvm,
        kvm.create_vm() as vm,
        map_guest_memfd(vm, pages * PAGE, MAPPABLE | no_direct_map_flag(vm)) as backing,
    ):
        (guest := GuestMemory([backing])).map_into(vm)
        vm.reserve_vmx_pages()
        guest.view(PAGE, len(TOUCH_PAGES))[:] = TOUCH_PAGES
        mark = os.getpid().to_bytes(8, "little")

        def run_guest() -> None:
            with vm.create_vcpu(0) as vcpu:
                while at_start(vcpu).run() == KVM_EXIT_HLT:
                    pass
            os._exit(3)

        def allocate() -> None:
            while True:
                start, length = chance.randrange(2, pages - 64), chance.randrange(1, 64)
                mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE * chance.randrange(2)
                call(
                    *("fallocate", backing.guest_memfd, mode),
                    *(ctypes.c_long(start * PAGE), ctypes.c_long(length * PAGE)),
                )

        for work in (run_guest, allocate):
            threading.Thread(target=work, daemon=True).start()
        print("begins", flush=True)
        while True:
            at = chance.randrange(2, pages) * PAGE
            if (seen := bytes(backing.view[at + 8 : at + 16])) not in (bytes(8), mark):
                print(f"{at:#x} holds {seen.hex()}", flush=True)
                os._exit(3)
            backing.view[at + 8 : at + 16] = mark


def races(count: str) -> Any:
    """So many processes at once that do so, four times; pages of another fail meanwhile. All are killed in the end."""
    before, said = off_map(), []
    inject = Path("/sys/kernel/debug/hwpoison")
    for round_ in range(4):
        argv = [[*PROGRAM, "racing", f"{round_}.{number}"] for number in range(int(count))]
        children = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in argv]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "begins\n"
        with memory("unmapped", 2 * MIB) as (_, backing):
            bad = [int(each) for each in frames(backing)[::100]]
            for each in bad:
                with suppress(OSError):
                    (inject / "corrupt-pfn").write_text(f"{each}\n")
        for each in bad:
            while failure(lambda each=each: (inject / "unpoison-pfn").write_text(f"{each}\n")):  # type: ignore[misc]
                time.sleep(0.01)  # its file has just been closed
        for child in children:
            child.kill()
            said.append(child.communicate()[0])
    await_return(before)
    return {"said": "".join(said), "lost": off_map() - before}


if __name__ == "__main__":
    what, argument = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    print(json.dumps(globals()[what](argument)))
