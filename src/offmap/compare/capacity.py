"""How many disposable hosts this machine can run at a time, by its processors and memory."""

import os
import re
from pathlib import Path

from offmap.compare.job import FULL
from offmap.files import text_of
from offmap.lab.qemu import parse_size

CELL_MEMORY = parse_size(FULL.memory) + (512 << 20)
"""Bytes for one: its RAM, and what QEMU's emulation takes beside it (translated code, 9p)."""

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: str, limit: str = "max") -> int:
    """Bytes that may be had.

    Args:
        meminfo: text of /proc/meminfo.
        limit: text of our control group's memory.max (cgroup v2), where it has one. What it uses now says little: most
            of that is page cache.
    """
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(match[1]) << 10 if match else 0
    return min(free, int(limit)) if limit.strip().isdigit() else free


def cells_at_a_time() -> int:
    """One for each processor that we may use, as far as memory goes; at least one."""
    memory = available_memory(text_of("/proc/meminfo"), text_of(_CGROUP / "memory.max"))
    return max(1, min(len(os.sched_getaffinity(0)), memory // CELL_MEMORY))
