"""/proc/kpageflags: what the kernel says a physical page is (Documentation/admin-guide/mm/pagemap.rst).

The audit asks two things of it: would /proc/kcore hand out zeroes for this page instead of its content; and, of a page
that something was found in, what it is.
"""

import os
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offmap.audit.pagemap import zero_page_pfn
from offmap.audit.procfs import open_path
from offmap.errors import Undetermined
from offmap.owned import Owned

# include/uapi/linux/kernel-page-flags.h
KPF_UPTODATE = 3
KPF_LRU = 5
KPF_SLAB = 7
KPF_BUDDY = 10
KPF_MMAP = 11
KPF_ANON = 12
KPF_COMPOUND_TAIL = 16
KPF_HUGE = 17
KPF_HWPOISON = 19
KPF_NOPAGE = 20
KPF_KSM = 21
KPF_OFFLINE = 23
KPF_ZERO_PAGE = 24
KPF_PGTABLE = 26
KPF_RESERVED = 32  # include/linux/kernel-page-flags.h: "hacking assistance", as stable as the rest

# read_kcore_iter() hands out zeroes for these.
_ZERO_FILLED = np.uint64(1 << KPF_HWPOISON | 1 << KPF_NOPAGE | 1 << KPF_OFFLINE)

_CHUNK = 1 << 17  # flags a read: 1 MiB


class PageFlags(Owned):
    """An open /proc/kpageflags.

    Raises:
        Undetermined: the file is missing or may not be read.
    """

    def __init__(self, path: str = "/proc/kpageflags") -> None:
        try:
            self._fd = open_path(path)
        except OSError as error:
            raise Undetermined(
                f"cannot open {path}: {error.strerror}",
                "run the audit as root on a kernel with CONFIG_PROC_PAGE_MONITOR",
            ) from None

    @cached_property
    def zero_page(self) -> int:
        """Frame of the page of zeroes that stands behind anonymous memory until it is written; -1 if it is not told."""
        frame = zero_page_pfn()
        return frame if int(self.of(np.array([frame], dtype=np.uint64))[0]) >> KPF_ZERO_PAGE & 1 else -1

    def close(self) -> None:
        os.close(self._fd)

    def range(self, first_pfn: int, count: int) -> NDArray[np.uint64]:
        """Flags of ``count`` pages from ``first_pfn`` on; pages past the end of all RAM read as KPF_NOPAGE."""
        flags = np.full(count, 1 << KPF_NOPAGE, dtype=np.uint64)
        view = flags.view(np.uint8).data
        done = 0
        while done < count:
            step = min(_CHUNK, count - done)
            got = os.preadv(self._fd, [view[8 * done : 8 * (done + step)]], 8 * (first_pfn + done))
            if got <= 0:
                break
            done += got // 8
        return flags

    def of(self, pfns: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Flags of each of these pages, in their order."""
        flags = np.empty(len(pfns), dtype=np.uint64)
        if not len(pfns):
            return flags
        order = np.argsort(pfns, kind="stable")
        ordered = pfns[order]
        # One read for each stretch of neighbours.
        breaks = np.flatnonzero(np.diff(ordered) > 1) + 1
        for part in np.split(np.arange(len(ordered)), breaks):
            first, last = int(ordered[part[0]]), int(ordered[part[-1]])
            stretch = self.range(first, last - first + 1)
            flags[order[part]] = stretch[(ordered[part] - np.uint64(first)).astype(np.intp)]
        return flags

    def zero_filled(self, pfns: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether /proc/kcore zero-fills each of these pages rather than reading it."""
        return np.asarray(self.of(pfns) & _ZERO_FILLED != 0, dtype=np.bool_)

    def is_zero_filled(self, pfn: int) -> bool:
        """The same of one page."""
        flags = os.pread(self._fd, 8, 8 * pfn)
        return len(flags) < 8 or int.from_bytes(flags, "little") & int(_ZERO_FILLED) != 0

    def zero_filled_range(self, first_pfn: int, count: int) -> NDArray[np.bool_]:
        """Whether /proc/kcore zero-fills each of ``count`` neighbouring pages."""
        return np.asarray(self.range(first_pfn, count) & _ZERO_FILLED != 0, dtype=np.bool_)
