"""Set off mappings of known frames, which the probes must show: a positive control for what they do not show.

A BPF ring buffer (bpf(2), BPF_MAP_TYPE_RINGBUF) is vmap()ed by the kernel; its second page is given to us, so that its
frame is known. A read of /dev/mem where there is no RAM is an ioremap() for its length.
"""

import ctypes
import mmap
import os

from offmap.audit import pagemap
from offmap.errors import KernelError
from offmap.uapi.page import PAGE_SIZE

_SYS_BPF = 321  # asm/unistd_64.h
_BPF_MAP_CREATE = 0
_BPF_MAP_TYPE_RINGBUF = 27  # linux/bpf.h
ROM = 0xF0000
"""Of every PC: the system's ROM, which is no RAM and may be read."""


class _BpfAttr(ctypes.Structure):
    """The first members of ``union bpf_attr`` for BPF_MAP_CREATE; the rest is zero."""

    _fields_ = [
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 104),
    ]


def vmapped_frame() -> int:
    """Have the kernel vmap() pages, and unmap them again. Give the frame of one of them.

    Raises:
        KernelError: this kernel has no BPF ring buffers.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    attr = _BpfAttr(_BPF_MAP_TYPE_RINGBUF, 0, 0, PAGE_SIZE)
    fd = libc.syscall(_SYS_BPF, _BPF_MAP_CREATE, ctypes.byref(attr), ctypes.sizeof(attr))
    if fd < 0:
        raise KernelError("bpf(BPF_MAP_CREATE)", ctypes.get_errno())
    try:
        with mmap.mmap(fd, PAGE_SIZE) as page:
            held = ctypes.c_char.from_buffer(page)
            frame = int(pagemap.pfn(pagemap.own_entries(ctypes.addressof(held), 1))[0])
            del held
            return frame
    finally:
        os.close(fd)


def ioremapped_address() -> int:
    """Have the kernel ioremap() a page that is no RAM, and unmap it again. Give its physical address.

    Raises:
        KernelError: /dev/mem cannot be read there.
    """
    try:
        fd = os.open("/dev/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(fd, 4, ROM)
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError("reading /dev/mem", error) from None
    return ROM
