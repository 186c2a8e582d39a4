"""Pages that hold what everybody may read: those of the firmware files that this host has for its guests.

A VMM's firmware is memory that the kernel maps and the guest cannot write to. If a slot of its VM was ever changed,
such memory may have been RAM before. But a page that equals one of a public file holds nothing of the guest's.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from offmap.audit.intervals import Ints
from offmap.audit.kcore import Kcore
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

FOLDERS = (
    *("/usr/share/seabios", "/usr/share/qemu", "/usr/share/qemu-kvm", "/usr/share/OVMF", "/usr/share/ovmf"),
    *("/usr/share/edk2", "/usr/share/edk2-ovmf", "/usr/local/share/qemu"),
)
_LARGEST = 64 << 20  # bytes of a firmware; the largest is some 4 MiB
_MOST_PAGES = 1 << 14  # that are compared: 64 MiB


def public_pages(kcore: Kcore, frames: Ints) -> int:
    """How many of these frames hold now what a page of a public firmware file holds."""
    pa = np.sort(frames.astype(np.uint64) << np.uint64(PAGE_SHIFT))[:_MOST_PAGES]
    pa = pa[kcore.in_ram(pa)]
    pa = pa[~kcore.zero_filled(pa)]
    if not len(pa):
        return 0
    content = np.zeros((len(pa), PAGE_SIZE // 8), dtype=np.uint64)
    kcore.read_pages(pa, content)
    known = _known(FOLDERS)
    return sum(_digest(page.tobytes()) in known for page in content)


@lru_cache(maxsize=1)
def _known(folders: Iterable[str]) -> frozenset[bytes]:
    found = set()
    for path in (path for folder in folders for path in public_files(Path(folder))):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        found |= {_digest(content[at : at + PAGE_SIZE]) for at in range(0, len(content), PAGE_SIZE)}
    return frozenset(found)


def public_files(folder: Path) -> Iterator[Path]:
    """The files below a folder that everybody may read, and nobody but root may write."""
    if not _is_roots(folder, stat.S_IFDIR):
        return
    for path, folders, names in os.walk(folder):
        here = Path(path)
        folders[:] = [name for name in folders if _is_roots(here / name, stat.S_IFDIR)]
        yield from (here / name for name in sorted(names) if _is_roots(here / name, stat.S_IFREG))


def _is_roots(path: Path, kind: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    readable = stat.S_IROTH | (stat.S_IXOTH if kind == stat.S_IFDIR else 0)
    mode, others = status.st_mode, stat.S_IWGRP | stat.S_IWOTH
    return (stat.S_IFMT(mode), status.st_uid, mode & readable, mode & others) == (
        kind,
        0,
        readable,
        0,
    ) and status.st_size <= _LARGEST


def _digest(page: bytes) -> bytes:
    return hashlib.blake2b(page, digest_size=16).digest()
