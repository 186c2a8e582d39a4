"""Which processes have given page frames in their page tables, and what they have them as (/proc/PID/pagemap)."""

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offmap.audit import pagemap
from offmap.audit.process import NoSuchProcess, Process
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

_STEP = 1 << 17  # pages looked at at once


@dataclass(frozen=True)
class MappedBy:
    """One process that has a page, at which address, in a mapping of which file (empty for none)."""

    pid: int
    process: str
    va: int
    path: str


def mapped_by(frames: Collection[int], leave_out: Collection[int] = ()) -> dict[int, list[MappedBy]]:
    """Find the processes that map each of these frames; those that end meanwhile or cannot be read are left out.

    Args:
        leave_out: PIDs that are not looked at.
    """
    found: dict[int, list[MappedBy]] = {}
    wanted = np.array(sorted(frames), dtype=np.uint64)
    for pid in _pids():
        if len(wanted) and pid not in leave_out:
            with suppress(NoSuchProcess, Undetermined, OSError), Process(pid) as process:
                for frame, va, path in _of_process(process, wanted):
                    found.setdefault(frame, []).append(MappedBy(pid, process.name(), va, path))
    return found


def _pids() -> list[int]:
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _of_process(
    process: Process, wanted: "np.ndarray[tuple[int], np.dtype[np.uint64]]"
) -> Iterator[tuple[int, int, str]]:
    mappings = [m for m in process.maps() if not m.perms.startswith("---")]
    if not mappings:
        return
    fd = process.open("pagemap")
    try:
        for mapping in mappings:
            for start in range(mapping.start, mapping.end, _STEP * PAGE_SIZE):
                if start >> 63:
                    break  # [vsyscall]
                pages = min(_STEP, (mapping.end - start) // PAGE_SIZE)
                entries = pagemap.read_pagemap(fd, start, pages)
                here = np.flatnonzero(pagemap.present(entries))
                frames = pagemap.pfn(entries[here])
                for index in np.flatnonzero(np.isin(frames, wanted)).tolist():
                    yield int(frames[index]), start + int(here[index]) * PAGE_SIZE, mapping.path
    finally:
        os.close(fd)
