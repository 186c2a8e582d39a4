"""/proc/PID/pagemap: which page frame stands behind a virtual page (Documentation/admin-guide/mm/pagemap.rst)."""

import ctypes
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from offmap.audit.procfs import open_path
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

_PFN = np.uint64((1 << 55) - 1)  # bits 0-54, if present
_FILE = np.uint64(1 << 61)
_SWAPPED = np.uint64(1 << 62)
_PRESENT = np.uint64(1 << 63)
_CHUNK = 1 << 17  # entries a read: 1 MiB


class PagemapEnds(Undetermined):
    """pagemap has nothing more to say."""


def present(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a page is mapped in the process's page tables."""
    return np.asarray(entries & _PRESENT != 0, dtype=np.bool_)


def private(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a page is present and neither a file's nor shared."""
    return np.asarray(present(entries) & (entries & _FILE == 0), dtype=np.bool_)


def swapped(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a page is swapped out, or under migration (the kernel reports both by this bit)."""
    return np.asarray((entries & _SWAPPED != 0) & ~present(entries), dtype=np.bool_)


def pfn(entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The page frame numbers; only meaningful where ``present``."""
    return entries & _PFN


def read_pagemap(fd: int, va: int, pages: int) -> NDArray[np.uint64]:
    """Entries of ``pages`` pages from page-aligned ``va`` on.

    Args:
        fd: an open /proc/PID/pagemap.

    Raises:
        PagemapEnds: the process has ended or lost its address space, or that address is beyond it.
        Undetermined: it cannot be read.
    """
    entries = np.zeros(pages, dtype=np.uint64)
    view = entries.view(np.uint8).data
    done = 0
    while done < pages:
        step = min(_CHUNK, pages - done)
        try:
            got = os.preadv(fd, [view[8 * done : 8 * (done + step)]], (va // PAGE_SIZE + done) * 8)
        except OSError as error:
            raise Undetermined(f"reading pagemap failed: {error.strerror}") from None
        if got < 8:
            raise PagemapEnds("its pagemap ends before its mappings do")
        done += got // 8
    return entries


def own_entries(va: int, pages: int) -> NDArray[np.uint64]:
    """The same of this process. Raises Undetermined: its pagemap cannot be opened or read."""
    try:
        file = os.fdopen(open_path("/proc/self/pagemap"), "rb", buffering=0)
    except OSError as error:
        raise Undetermined(
            f"cannot open /proc/self/pagemap: {error.strerror}", "audit on a kernel with CONFIG_PROC_PAGE_MONITOR"
        ) from None
    with file:
        return read_pagemap(file.fileno(), va, pages)


def zero_page_pfn() -> int:
    """Frame of the zeroes that stand behind anonymous memory read before it is written; 0 if it cannot be told."""
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0]
        entries = own_entries(ctypes.addressof(ctypes.c_char.from_buffer(page)), 1)
    return int(pfn(entries)[0]) if present(entries)[0] else 0
