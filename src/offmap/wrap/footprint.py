"""What a process that will sleep for long can give back of its memory without being slower than a fault later."""

import ctypes

_MADV_DONTNEED = 4  # asm-generic/mman-common.h

_libc = ctypes.CDLL(None, use_errno=True)


def trim() -> None:
    """Give back freed heap memory, and unmap program text until it runs again: it stays in the page cache."""
    _libc.malloc_trim(ctypes.c_size_t(0))
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
        for line in file:
            addresses, permissions, _, _, inode = line.split(maxsplit=5)[:5]
            # Only what cannot have been written to: the next access reads the same bytes from the file.
            if permissions == "r-xp" and inode != "0":
                start, end = (int(text, 16) for text in addresses.split("-"))
                _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
