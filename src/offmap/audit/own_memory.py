"""Memory of our own that must not be taken for a finding: buffers that are locked and wiped, and the frames behind."""

import ctypes
import mmap
import os
from contextlib import suppress

from offmap.audit import pagemap
from offmap.audit.maps import parse_maps
from offmap.owned import Owned
from offmap.uapi.page import PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_UNCOUNTED = {"[vsyscall]", "[vvar]", "[vvar_vclock]"}  # the kernel's pages, not ours


class LockedBuffer(Owned):
    """Private memory of our own that is locked, never inherited, and wiped when it is given back.

    What the scan has read or looks for stands only in such buffers: their frames are known, and no copy of them is left
    in pages that are about to be freed.
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._map = mmap.mmap(-1, size, flags=flags)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.size = size
        self.va = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Best effort: RLIMIT_MEMLOCK may forbid it.
        _libc.mlock(ctypes.c_void_p(self.va), ctypes.c_size_t(size))
        self.view = memoryview(self._map)

    def close(self) -> None:
        if not self._map.closed:
            ctypes.memset(self.va, 0, self.size)
            # A slice of the view that is still about keeps the memory, now of zeroes, until it goes.
            with suppress(BufferError):
                self.view.release()
                self._map.close()


def frames_at(va: int, pages: int) -> set[int]:
    """Frames of our own pages from ``va`` on, as far as they are present."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entries = pagemap.read_pagemap(fd, va, pages)
        return set(pagemap.pfn(entries[pagemap.present(entries)]).tolist())
    finally:
        os.close(fd)


def own_frames() -> set[int]:
    """Frames of all our own anonymous pages."""
    with open("/proc/self/maps", encoding="utf-8") as file:  # noqa: PTH123
        mappings = parse_maps(file.read())
    frames: set[int] = set()
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in mappings:
            if mapping.path in _UNCOUNTED or mapping.shared:
                continue
            entries = pagemap.read_pagemap(fd, mapping.start, mapping.size // PAGE_SIZE)
            frames.update(pagemap.pfn(entries[pagemap.private(entries)]).tolist())
    finally:
        os.close(fd)
    return frames
