"""Memory of our own: buffers that are locked and wiped, the frames behind them, and the positive control.

A page of our own is certainly in the direct map. Before anything is called absent, the audit must see that page: its
frame in the same pagemap as the guest's, its mapping in the same walk, its content in the same /proc/kcore. A scan must
not take our own pages for a finding.
"""

import ctypes
import mmap
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from offmap.audit import pagemap
from offmap.audit.mappings import KernelMappings, covered
from offmap.audit.process import parse_maps
from offmap.errors import Undetermined
from offmap.owned import Owned
from offmap.uapi.page import PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_ATTEMPTS = 3  # our page may be migrated just then
_UNCOUNTED = {"[vsyscall]", "[vvar]", "[vvar_vclock]"}  # the kernel's pages, not ours


class LockedBuffer(Owned):
    """Private memory of our own that is locked, never inherited, and wiped when it is given back.

    What the scan has read or looks for stands only in such buffers. Their frames are known, and no copy is left in
    pages that are about to be freed.
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
            # A slice of the view that is still in use keeps the memory, now of zeroes, until it goes.
            with suppress(BufferError):
                self.view.release()
                self._map.close()


class OwnPage(LockedBuffer):
    """A page of our own memory whose frame can be asked for. One that moves in spite of the lock is asked for again."""

    def __init__(self) -> None:
        super().__init__(PAGE_SIZE)
        self.write(bytes(PAGE_SIZE))

    def write(self, data: bytes) -> None:
        """Put ``data`` at the page's start."""
        self.view[: len(data)] = data

    def pfn(self) -> int:
        """The page's frame number now. Raises Undetermined: pagemap cannot be opened or hides it."""
        entries = pagemap.own_entries(self.va, 1)
        frame = int(pagemap.pfn(entries)[0])
        if not pagemap.present(entries)[0] or frame == 0:
            raise Undetermined("/proc/PID/pagemap hides page frame numbers", "run the audit as root with CAP_SYS_ADMIN")
        return frame


def frames_at(va: int, pages: int) -> set[int]:
    """Frames of our own pages from ``va`` on, as far as they are present."""
    entries = pagemap.own_entries(va, pages)
    return set(pagemap.pfn(entries[pagemap.present(entries)]).tolist())


def own_frames() -> set[int]:
    """Frames of all our own anonymous pages."""
    frames: set[int] = set()
    for mapping in parse_maps(Path("/proc/self/maps").read_text(encoding="utf-8")):
        if mapping.path not in _UNCOUNTED and not mapping.shared:
            entries = pagemap.own_entries(mapping.start, mapping.size // PAGE_SIZE)
            frames.update(pagemap.pfn(entries[pagemap.private(entries)]).tolist())
    return frames


def check_control(
    page: OwnPage, read: Callable[[int, memoryview], None], mappings: KernelMappings, reader: str = "/proc/kcore"
) -> None:
    """Find our own page in the walk and read it through the kernel.

    Args:
        page: written to before the walk began.
        read: fills a buffer from a kernel address.
        reader: what reads, for people.

    Raises:
        Undetermined: the walk does not have it, or the reader reads something else there.
    """
    for _ in range(_ATTEMPTS):
        secret = secrets.token_bytes(64)
        page.write(secret)
        frame = page.pfn()
        seen = bytearray(len(secret))
        if not covered(mappings.direct, np.array([frame], dtype=np.uint64))[0]:
            failure = "the walk does not find the auditor's own page in the direct map"
            continue
        read(mappings.direct_map_base + frame * PAGE_SIZE, memoryview(seen))
        if seen == secret and page.pfn() == frame:
            return
        failure = f"{reader} does not show the auditor's own page"
    raise Undetermined(f"the positive control failed: {failure}", "run the audit again; if it persists, report it")
