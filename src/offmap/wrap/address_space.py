"""The address space of a VMM that stands still: its mappings, and the bytes in them."""

import ctypes
import errno
import os

from offmap.errors import KernelError
from offmap.uapi.page import PAGE_SIZE

# The highest byte of a page's entry in pagemap: present, swapped out, of a file; and last, mapped by no other process
# (Documentation/admin-guide/mm/pagemap.rst). 32 values each have the first three in common.
_NO, _ALL, _NOT_EXCLUSIVE = bytes(32), b"\1" * 32, b"\1\0" * 16
THERE = _NO * 2 + _ALL * 6
"""Which pages have memory, by that byte."""
OWN = _NO * 2 + (_ALL + _NO) * 3
"""Those that are not a file's, but the process's own copy."""
SHARED = _NO * 4 + (_NOT_EXCLUSIVE + _NO) * 2
"""Of these, those that a child has too, until one of them writes, or KSM has merged; and the page of zeroes."""
_ENTRIES = 1 << 18  # bytes of pagemap that are read at a time
_CHUNK = 16 << 20  # bytes
_ZEROES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)


class _iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


class Area:
    """One mapping, or a part of one: addresses [start, end), its file, and the kernel's flags of it.

    Attributes:
        perms: permissions like ``rw-p``.
        offset: of its first byte in the file.
        whole: the addresses of all of the mapping.
    """

    def __init__(
        self, start: int, end: int, perms: str, offset: int, device: int, inode: int, path: str, flags: frozenset[str]
    ) -> None:
        self.start = start
        self.end = end
        self.whole = start, end
        self.perms = perms
        self.offset = offset
        self.device = device
        self.inode = inode
        self.path = path
        self.flags = flags

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    def cut(self, start: int, end: int) -> None:
        """Leave out what is not in [start, end)."""
        self.offset += max(0, start - self.start)
        self.start, self.end = max(self.start, start), min(self.end, end)


def areas(pid: int, start: int, end: int) -> list[Area]:
    """The mappings that have a byte in [start, end), in order (``/proc/PID/smaps``)."""
    found = []
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="surrogateescape", newline="\n") as file:  # noqa: PTH123
        head: list[str] = []
        for line in file:
            if line.startswith("VmFlags:"):
                first, last = (int(text, 16) for text in head[0].split("-"))
                if first >= end:
                    break
                if start < last:
                    major, minor = (int(text, 16) for text in head[3].split(":"))
                    path = head[5].strip() if len(head) > 5 else ""
                    device = os.makedev(major, minor)
                    flags = frozenset(line.split()[1:])
                    found.append(Area(first, last, head[1], int(head[2], 16), device, int(head[4]), path, flags))
            elif line[0] in "0123456789abcdef":
                head = line.split(maxsplit=5)
    return found


def populated(pid: int, start: int, end: int, wanted: bytes = THERE) -> list[tuple[int, int]]:
    """The runs [start, end) of addresses there whose pages are THERE, OWN or SHARED."""
    runs: list[tuple[int, int]] = []
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:  # noqa: PTH123
        file.seek(start // PAGE_SIZE * 8)
        while start < end:
            entries = file.read(min((end - start) // PAGE_SIZE * 8, _ENTRIES))
            if not entries:
                raise KernelError("read of the VMM's pagemap", errno.EIO)
            # The flags are in an entry's highest byte. Most pages of a VMM that begins are not there: found in C.
            flags = entries[7::8].translate(wanted)
            at = flags.find(1)
            while at >= 0:
                stop = flags.find(0, at)
                first, last = start + at * PAGE_SIZE, start + (len(flags) if stop < 0 else stop) * PAGE_SIZE
                if runs and runs[-1][1] == first:
                    first = runs.pop()[0]
                runs.append((first, last))
                at = -1 if stop < 0 else flags.find(1, stop)
            start += len(flags) * PAGE_SIZE
    return runs


def pinned(pid: int) -> int:
    """KiB of the process's memory that the kernel has pinned for long (VmPin of proc(5))."""
    with open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123
        return next((int(line.split()[1]) for line in file if line.startswith(b"VmPin:")), 0)


def has_data(pid: int, start: int, end: int) -> bool:
    """Whether a byte of these is not zero. (process_vm_readv would end that the pages are shared.)"""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        for at in range(start, end, _ZEROES):
            if os.pread(memory.fileno(), min(end - at, _ZEROES), at).strip(b"\0"):
                return True
    return False


def read_into(pid: int, address: int, target: int, size: int) -> None:
    """Copy `size` bytes of the process at `address` to our address `target`."""
    while size:
        part = min(size, _CHUNK)
        here, there = _iovec(target, part), _iovec(address, part)
        done = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if done <= 0:
            raise KernelError("process_vm_readv of the VMM", ctypes.get_errno())
        target, address, size = target + done, address + done, size - done


def write_from(pid: int, address: int, source: int, size: int) -> None:
    """Copy `size` bytes at our address `source` to the process at `address`, which it need not be able to write to."""
    with open(f"/proc/{pid}/mem", "wb", buffering=0) as memory:  # noqa: PTH123
        ours = memoryview((ctypes.c_char * size).from_address(source)).cast("B")
        _write(memory.fileno(), address, ours)


def zero(pid: int, start: int, end: int) -> None:
    """Overwrite these bytes of the process by zeroes."""
    zeroes = memoryview(bytes(min(_ZEROES, end - start)))
    with open(f"/proc/{pid}/mem", "wb", buffering=0) as memory:  # noqa: PTH123
        while start < end:
            size = min(len(zeroes), end - start)
            _write(memory.fileno(), start, zeroes[:size])
            start += size


def _write(fd: int, address: int, source: memoryview) -> None:
    done = 0
    try:
        while done < len(source):
            if not (written := os.pwrite(fd, source[done:], address + done)):
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))  # its memory has gone
            done += written
    except OSError as error:
        raise KernelError("write to the VMM's memory", error) from None
