"""A process to watch and trace, run in a disposable host: memory, and a module that maps a page of it for a moment.

``trace_target.py KIND COUNT SECONDS MICROSECONDS`` starts ``offmap audit --watch --trace --json`` of itself, has
/dev/offmap-alias map a page of its memory COUNT times, SECONDS apart, for so many microseconds each. Then it ends the
watch.
It prints what the watch printed and ends with its status. KIND is ``reserved`` (no struct page: memremap) or ``anon``
(vmap). With COUNT 0 it waits for SECONDS. With COUNT -1 it puts ordinary memory in the place of its own instead.
"""

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PAGE = 4096
SIZE = 4 << 20
RESERVED = 0x6000_0000  # the host is booted with memmap=256M$0x60000000


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def physical(va: int) -> int:
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(va // PAGE * 8)
        return (int.from_bytes(file.read(8), "little") & ((1 << 55) - 1)) * PAGE


def put_ordinary_memory(va: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    place = ctypes.c_void_p(va)
    assert libc.mmap(place, ctypes.c_size_t(SIZE), 3, flags, -1, ctypes.c_long(0)) == va
    ctypes.memset(place, 1, SIZE)


def main() -> int:
    kind, count, seconds, microseconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    if kind == "reserved":
        memory = mmap.mmap(os.open("/dev/mem", os.O_RDWR), SIZE, offset=RESERVED)
    else:
        memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or khugepaged may move them to one
    for position in range(0, SIZE, PAGE):
        memory[position] = 1
    va = address(memory)
    slot = {"guest_phys_addr": 0, "memory_size": SIZE, "userspace_addr": va, "backend": kind}
    claim = os.memfd_create("offmap-memslots")
    os.write(claim, json.dumps({"schema": "offmap-memslots/1", "slots": [slot], "excluded": []}).encode())
    page = RESERVED if kind == "reserved" else physical(va)

    argv = [sys.executable, "-m", "offmap.cli.main", "audit", str(os.getpid()), "--watch", "3600", "--trace", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        first = watch.stdout.readline()  # the first audit is done, and the trace is running
        print(first, end="", flush=True)
        if not first:
            return watch.wait()
        for _ in range(count):
            with Path("/dev/offmap-alias").open("wb", buffering=0) as device:
                device.write(f"flash {page:#x} {microseconds}".encode())
            time.sleep(seconds)
        if count == 0:
            time.sleep(seconds)
        if count < 0:
            put_ordinary_memory(va)
        watch.send_signal(signal.SIGTERM)
        print(watch.stdout.read(), end="", flush=True)
        return watch.wait()


if __name__ == "__main__":
    sys.exit(main())
