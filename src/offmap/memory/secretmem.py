"""memfd_secret straight into the memslot: pages that leave the direct map when they are first touched.

It works on a kernel whose GUP lets KVM have such pages. Stock kernels refuse them (check_vma_flags in mm/gup.c, since
commit 1507f51255c9). So a guest of one instruction is run from such a page before anything is promised.
"""

import ctypes
import errno
import os
import re
import resource
from pathlib import Path

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Vm
from offmap.memory.backend import ASK_FOR_LESS, Backend, check_host_has, refused
from offmap.memory.backing import Backing
from offmap.memory.populate import populate
from offmap.memory.probe import try_page
from offmap.uapi.mman import SYS_memfd_secret
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

_REMEDY = {
    errno.ENOSYS: "boot the host with secretmem.enable=1, on a kernel with CONFIG_SECRETMEM and an unbroken direct map"
}


class Secretmem(Backend):
    name = "secretmem"
    hides = True
    since = None
    page_by_page = True

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        with refused(ASK_FOR_LESS), secret_backing(size).closed_on_error() as backing:
            probe()
            populate(backing, progress=self.progress)
        return [backing]


def memfd_secret() -> int:
    """memfd_secret(2): a new fd, which the caller owns. Raises BackendRefused: this kernel has none, or not now."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(SYS_memfd_secret, os.O_CLOEXEC)
    if fd < 0:
        error = KernelError("memfd_secret", ctypes.get_errno())
        raise BackendRefused(error.what, error.why, _REMEDY.get(error.errno, ASK_FOR_LESS))
    return fd


def raise_memlock(size: int) -> None:
    """Let this process lock `size` bytes more than it has locked (RLIMIT_MEMLOCK is enforced when a page is touched).

    Raises:
        BackendRefused: the hard limit is lower and we may not raise it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = _locked_bytes() + size
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    enough = hard == resource.RLIM_INFINITY or hard >= needed
    wanted = hard if enough else needed
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (wanted, wanted))
    except (ValueError, OSError):
        raise BackendRefused(
            f"this process may not have {format_size(size)} of memfd_secret memory",
            f"it counts as locked, and RLIMIT_MEMLOCK allows {format_size(hard)}",
            f"run with CAP_SYS_RESOURCE (root), or allow more first: ulimit -l {-(-needed // 1024)}",
        ) from None


def _locked_bytes() -> int:
    """What this process has locked already (proc(5), VmLck)."""
    match = re.search(r"^VmLck:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def secret_file(size: int) -> int:
    """A memfd_secret file of `size` bytes, not yet populated: its fd, which the caller owns.

    Raises:
        BackendRefused: this host has none to give.
    """
    raise_memlock(size)
    fd = memfd_secret()
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        failed = KernelError("ftruncate of memfd_secret memory", error)
        raise BackendRefused(failed.what, failed.why, ASK_FOR_LESS) from None
    return fd


def map_secret(fd: int, size: int) -> Backing:
    """Map a memfd_secret file. Raises BackendRefused: it may not be."""
    with refused():
        return Backing("memfd_secret memory", fd, size, remedy="raise RLIMIT_MEMLOCK, or ask for less")


def secret_backing(size: int) -> Backing:
    """`size` bytes of memfd_secret memory, not yet populated. Raises BackendRefused: this host has none to give."""
    fd = secret_file(size)
    try:
        return map_secret(fd, size)
    finally:
        os.close(fd)


def probe() -> None:
    """Run one instruction of a guest from a page of memfd_secret memory.

    Raises:
        BackendRefused: this kernel's GUP refuses the page.
    """
    try:
        try_page(lambda _vm: secret_backing(PAGE_SIZE))
    except KernelError as error:
        if error.errno != errno.EFAULT:
            raise
        raise BackendRefused(
            "this kernel's GUP refuses memfd_secret pages to KVM",
            "KVM_RUN: EFAULT",
            "use --memory reserved, or a kernel patched to allow it",
        ) from None
