"""Memory calls that Python's own modules do not spell (asm-generic/mman-common.h, linux/memfd.h); locks (fcntl.h)."""

from struct import Struct

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23  # Linux 5.14

MAP_NORESERVE = 0x4000

MFD_CLOEXEC = 0x0001
MFD_HUGETLB = 0x0004
MFD_HUGE_SHIFT = 26

SYS_memfd_secret = 447  # arch/x86/entry/syscalls/syscall_64.tbl

# fcntl.h: locks that belong to the open file description, so that they go with its last fd, whoever kills the process.
F_OFD_GETLK = 36
F_OFD_SETLK = 37
FLOCK = Struct("<hhxxxxqqixxxx")
"""struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid."""
