"""Open files of hidden memory: of a pool, or of blocks that the module takes off the running kernel.

A wrapped VMM's supervisor stays small by importing nothing else for its memory.
"""

import errno
import os
from fcntl import ioctl

from offmap.errors import BackendRefused, KernelError
from offmap.uapi import offmap_module as uapi

SEE_LOG = "see the kernel's log: dmesg"
DEFAULT_POOL = "/run/hidden"
"""Where a pool is mounted unless somebody says otherwise."""

_POOL_REMEDY = {
    errno.EACCES: "ask the administrator for the right to write to that folder",
    errno.ENOENT: "make a pool: offmap pool create SIZE",
}
_DEVICE_REMEDY = {
    errno.ENOENT: "load the module first: offmap module load",
    errno.EACCES: "run as root",
    errno.EPERM: "run with CAP_SYS_ADMIN (root)",
}


def is_of_a_pool(dev: int) -> bool:
    """Whether `dev`, the device number that stat(2) says of a file, is a pool's."""
    try:
        with open(uapi.POOLS, encoding="ascii") as file:  # noqa: PTH123 - pathlib costs half a megabyte
            return any(line.split()[0] == f"{os.major(dev)}:{os.minor(dev)}" for line in file)
    except OSError:
        return False


def pool_file(path: str, size: int) -> int:
    """A new file without a name that has `size` bytes of the pool at `path`; its fd, which the caller owns.

    Raises:
        BackendRefused: there is no pool, or it cannot give so much.
    """
    what = f"{path} cannot give hidden memory"
    try:
        # First: elsewhere, this would be a file on a disk.
        if not is_of_a_pool(os.stat(path).st_dev):  # noqa: PTH116
            raise BackendRefused(what, "it is in no pool of the offmap module", _POOL_REMEDY[errno.ENOENT])
        fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        remedy = _POOL_REMEDY.get(error.errno or 0, "see offmap pool status")
        raise BackendRefused(what, os.strerror(error.errno or 0), remedy) from None
    try:
        if not is_of_a_pool(os.fstat(fd).st_dev):
            raise BackendRefused(what, "it has just been unmounted", "try again")
        os.ftruncate(fd, size)
    except OSError as error:
        refusal = _pool_refusal(error, path, fd, size)
        os.close(fd)
        raise refusal from None
    except BackendRefused:
        os.close(fd)
        raise
    return fd


def _pool_refusal(error: OSError, path: str, fd: int, size: int) -> BackendRefused:
    from offmap.units import format_size

    what = f"{path} cannot give {format_size(size)}"
    if error.errno == errno.EDQUOT:
        return BackendRefused(what, "a user may not have so much of it", "ask for less, or end another guest of yours")
    if error.errno != errno.ENOSPC:
        return BackendRefused(what, os.strerror(error.errno or 0), SEE_LOG)
    there = os.fstatvfs(fd)
    return BackendRefused(
        what,
        f"{format_size(there.f_bavail * there.f_frsize)} of the pool are free",
        "ask for less, end another guest, or make the pool larger: offmap pool resize",
    )


def device_file() -> int:
    """A new open file of /dev/offmap, which the caller owns: what it is asked for stays with this file.

    Raises:
        BackendRefused: the module is not loaded, or we may not use it.
    """
    try:
        return os.open(uapi.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        failed = KernelError(f"open of {uapi.DEVICE}", error)
        raise BackendRefused(failed.what, failed.why, _DEVICE_REMEDY.get(failed.errno, SEE_LOG)) from None


def unplugged_file(size: int, node: int) -> tuple[int, int]:
    """An open file that has at least `size` bytes of memory blocks, and how many it has. The caller owns it.

    Args:
        node: the NUMA node to take from, or OFFMAP_ANY_NODE.

    Raises:
        BackendRefused: the host cannot give so much.
    """
    fd = device_file()
    request = uapi.offmap_unplug(size, node, 0)
    try:
        ioctl(fd, uapi.OFFMAP_UNPLUG, request)
    except OSError as error:
        os.close(fd)
        raise _unplug_refusal(error.errno or 0, size, request.size, node) from None
    return fd, int(request.size)


def _unplug_refusal(error: int, wanted: int, spare: int, node: int) -> BackendRefused:
    from offmap.units import format_size

    if error == errno.EINVAL and node != uapi.OFFMAP_ANY_NODE:
        return BackendRefused(
            "this host cannot give unplugged memory",
            f"it has no NUMA node {node}",
            "see /sys/devices/system/node",
        )
    if error == errno.ETIMEDOUT:
        return BackendRefused(
            f"the host could free {format_size(spare)} in time, not {format_size(wanted)}",
            "something holds pages in its memory blocks that cannot be moved now",
            "try again, end what pins memory, or raise timeout in /sys/module/offmap/parameters",
        )
    if error != errno.ENOMEM:
        failed = KernelError("OFFMAP_UNPLUG", error)
        return BackendRefused(failed.what, failed.why, SEE_LOG)
    where = "" if node == uapi.OFFMAP_ANY_NODE else f" on node {node}"
    return BackendRefused(
        f"the host could spare {format_size(spare)} in whole memory blocks{where}, not {format_size(wanted)}",
        "the rest is in use, is kept for the host, or holds pages that cannot be moved",
        "ask for less, free memory, or boot the host with movablecore=",
    )
