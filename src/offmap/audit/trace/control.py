"""Set off mappings of known frames, which the probes must show: a positive control for what they do not show.

A BPF ring buffer (bpf(2), BPF_MAP_TYPE_RINGBUF) is vmap()ed by the kernel; its second page is given to us, so that its
frame is known. A read of /dev/mem where there is no RAM is an ioremap() for its length.
"""

import ctypes
import mmap
import os

from offmap.audit import pagemap
from offmap.audit.bpf import MAP_TYPE_RINGBUF, create_map
from offmap.errors import KernelError
from offmap.uapi.page import PAGE_SIZE

ROM = 0xF0000
"""Of every PC: the system's ROM, which is no RAM and may be read."""


def vmapped_frame() -> int:
    """Have the kernel vmap() pages, and unmap them again. Give the frame of one of them.

    Raises:
        KernelError: this kernel has no BPF ring buffers.
    """
    fd = create_map(MAP_TYPE_RINGBUF, 0, 0, PAGE_SIZE)
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
