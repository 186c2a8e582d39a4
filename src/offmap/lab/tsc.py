"""The frequency of this machine's time stamp counter, which is also an emulated processor's.

A kernel that boots beside much else measures it wrong, by up to a factor of seven, and its clock is then wrong for
good: in a snapshot, for every host that comes from it. So an emulated host is told.
"""

import ctypes
import mmap
import platform
import time

_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_APART_NS = 30_000_000  # between two readings; with each known to 3 µs, the error is 0.01 %
_CLOSE_NS = 3_000
_ATTEMPTS = 1000


def tsc_khz() -> int | None:
    """Measure the frequency in kHz; None where the machine has no such counter, or is too busy to tell."""
    if platform.machine() != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, len(_RDTSC), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # a hardened machine forbids it
        return None
    page.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    first = _reading(read)
    time.sleep(_APART_NS / 1e9)
    second = _reading(read)
    if first is None or second is None:
        return None
    return round((second[1] - first[1]) * 1_000_000 / (second[0] - first[0]))


def _reading(read: "ctypes._FuncPointer") -> tuple[int, int] | None:
    """Return (nanoseconds, ticks) of one moment."""
    for _ in range(_ATTEMPTS):
        before = time.monotonic_ns()
        ticks = read()
        after = time.monotonic_ns()
        if after - before < _CLOSE_NS:
            return (before + after) // 2, int(ticks)
    return None
