"""bpf(2), as much of it as the audit needs: maps with pages for us, and a read of kernel addresses.

Sources: include/uapi/linux/bpf.h; Documentation/bpf/standardization/instruction-set.rst.
"""

import ctypes
import errno
import mmap
import os
import struct
import threading

from offmap.errors import KernelError, Undetermined
from offmap.owned import Owned
from offmap.uapi.page import PAGE_MASK, PAGE_SIZE

_SYS_BPF = 321  # asm/unistd_64.h
_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN = 0, 5, 10
_MAP_TYPE_ARRAY = 2
MAP_TYPE_RINGBUF = 27
_F_MMAPABLE = 1 << 10
_PROG_TYPE_RAW_TRACEPOINT = 17  # of those that can be run by hand (since 5.10), and that may read all of the kernel
_PSEUDO_MAP_VALUE = 2
_FUNC_PROBE_READ_KERNEL = 113
_INSTRUCTION = struct.Struct("<BBhi")
_ATTR_SIZE = 128  # what is not named is zero

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(what: str, command: int, attr: bytes) -> tuple[int, bytes]:
    """The call's result, and what the kernel made of `attr`. Raises KernelError: it fails."""
    room = ctypes.create_string_buffer(attr.ljust(_ATTR_SIZE, b"\0"), _ATTR_SIZE)
    result = _libc.syscall(_SYS_BPF, command, room, _ATTR_SIZE)
    if result < 0:
        raise KernelError(f"bpf({what})", ctypes.get_errno())
    return int(result), room.raw


def create_map(kind: int, key: int, value: int, entries: int, flags: int = 0) -> int:
    """BPF_MAP_CREATE: a new map's fd, which the caller owns. Raises KernelError: there is none, or not for us."""
    return _bpf("BPF_MAP_CREATE", _MAP_CREATE, struct.pack("<5I", kind, key, value, entries, flags))[0]


class KernelReader(Owned):
    """Reads kernel addresses by bpf_probe_read_kernel(), which reads what the page tables map, and never faults.

    For memory only: a device's registers would be read too.

    Raises:
        KernelError: this kernel has no such BPF, or not for us.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        map_fd = create_map(_MAP_TYPE_ARRAY, 4, PAGE_SIZE, 1, _F_MMAPABLE)
        try:
            self._page = mmap.mmap(map_fd, PAGE_SIZE)
            try:
                self._program = _load(map_fd)
            except BaseException:
                self._page.close()
                raise
        finally:
            os.close(map_fd)

    def close(self) -> None:
        os.close(self._program)
        self._page.close()

    def read(self, va: int, buffer: memoryview) -> None:
        """Fill `buffer` with what stands at a kernel address.

        Raises:
            Undetermined: no memory is mapped there.
        """
        done = 0
        while done < len(buffer):
            at = va + done
            step = min(len(buffer) - done, PAGE_SIZE - at % PAGE_SIZE)
            with self._lock:
                self._fetch(at & PAGE_MASK)
                start = at % PAGE_SIZE
                buffer[done : done + step] = memoryview(self._page)[start : start + step]
                self._page[:] = bytes(PAGE_SIZE)  # a page of the kernel's, in which a scan would find a copy
            done += step

    def _fetch(self, page: int) -> None:
        arguments = ctypes.create_string_buffer(struct.pack("<Q", page), 8)
        attr = struct.pack("<IIIIQQIIIIQ", self._program, 0, 0, 0, 0, 0, 0, 0, 8, 0, ctypes.addressof(arguments))
        try:
            _, attr = _bpf("BPF_PROG_TEST_RUN", _PROG_TEST_RUN, attr)
            (status,) = struct.unpack_from("<i", attr, 4)
        except KernelError as error:
            status = -(error.errno or errno.EINVAL)
        if status:
            raise Undetermined(
                f"reading kernel memory at {page:#x} failed: {os.strerror(-status)}", "run the audit again"
            )


def _load(map_fd: int) -> int:
    """The program: read a page at the address that is its first argument into the map's only value."""

    def instruction(code: int, registers: int = 0, immediate: int = 0) -> bytes:
        return _INSTRUCTION.pack(code, registers, 0, immediate)

    program = ctypes.create_string_buffer(
        instruction(0x79, 0x13)  # r3 = *(u64 *)(r1 + 0)
        + instruction(0x18, _PSEUDO_MAP_VALUE << 4 | 1, map_fd)  # r1 = the map's value, in two instructions
        + instruction(0)
        + instruction(0xB7, 2, PAGE_SIZE)  # r2 = PAGE_SIZE
        + instruction(0x85, 0, _FUNC_PROBE_READ_KERNEL)
        + instruction(0x95)  # return r0
    )
    # The kernel gives this function to no other program. Only these instructions are meant.
    license = ctypes.create_string_buffer(b"GPL")
    count = (len(program) - 1) // _INSTRUCTION.size
    where = ctypes.addressof(program), ctypes.addressof(license)
    return _bpf("BPF_PROG_LOAD", _PROG_LOAD, struct.pack("<IIQQ", _PROG_TYPE_RAW_TRACEPOINT, count, *where))[0]
