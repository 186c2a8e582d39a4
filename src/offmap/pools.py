"""Pools of hidden memory on this host: mounted file systems of the offmap module (kernel/module/poolfs.c)."""

import re
from dataclasses import dataclass
from pathlib import Path

from offmap.uapi.offmap_module import POOLS

MOUNTINFO = Path("/proc/self/mountinfo")
FILE_SYSTEM = "offmapfs"


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool, in bytes.

    Attributes:
        device: ``MAJOR:MINOR`` of its files, as stat(2) has it.
        size: all of it.
        free: zeroed, and nobody's.
        cleaning: given back, and not zeroed yet.
        held: given back, and kept until nothing of the kernel's maps it any more.
        failed: never given out again, as memory in it has failed.
        files: how many there are.
        node: the NUMA node it was taken from; None: any.
        paths: where it is mounted, as far as this process sees.
    """

    device: str
    size: int
    free: int
    cleaning: int
    held: int
    failed: int
    files: int
    node: int | None
    paths: tuple[str, ...]


def pools() -> list[Pool]:
    """Every pool of this host; none where the module is not loaded."""
    try:
        lines = Path(POOLS).read_text().splitlines()
    except OSError:
        return []
    paths = _mount_points(MOUNTINFO.read_text())
    found = []
    for line in lines:
        device, *rest = line.split()
        size, free, cleaning, held, failed, files, node = map(int, rest)
        where = tuple(paths.get(device, ()))
        found.append(Pool(device, size, free, cleaning, held, failed, files, None if node < 0 else node, where))
    return found


def _mount_points(mountinfo: str) -> dict[str, list[str]]:
    """Where each pool is mounted, by its device (proc(5), /proc/PID/mountinfo)."""
    found: dict[str, list[str]] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after.partition(" ")[0] == FILE_SYSTEM:
            _, _, device, _, path, *_ = before.split()
            path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
            found.setdefault(device, []).append(path)
    return found
