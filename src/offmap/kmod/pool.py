"""Making, resizing and ending a pool: mount(2) and umount2(2) of the module's file system."""

import ctypes
import errno
import grp
import os
import pwd
from contextlib import suppress
from pathlib import Path

from offmap.errors import KernelError, OffmapError
from offmap.pools import FILE_SYSTEM, Pool, pools
from offmap.units import format_size

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 2, 4, 8, 32  # include/uapi/linux/mount.h
_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC

_MOUNT_REMEDY = {
    errno.EPERM: "run as root",
    errno.ENODEV: "load the module first: offmap module load",
    errno.EOPNOTSUPP: "load kvm_amd or kvm_intel with nested=0 (a nested guest on such memory can crash this kernel), "
    "or use --allow-nested if you trust every user of the pool",
    errno.ENOMEM: "ask for less, free memory, or create the pool earlier after boot",
    errno.ETIMEDOUT: "try again, or create the pool earlier after boot",
}


def pool_at(path: str) -> Pool:
    """The pool that is mounted at `path`. Raises OffmapError: there is none."""
    real = os.path.realpath(path)
    for pool in pools():
        if real in pool.paths:
            return pool
    raise OffmapError(f"there is no pool at {path}", "see offmap pool status")


def create(
    path: str,
    size: int,
    *,
    node: int | None = None,
    user: str = "",
    group: str = "",
    mode: int = 0o1770,
    quota: int = 0,
    allow_nested: bool = False,
    allow_vfio: bool = False,
) -> Pool:
    """Take `size` bytes off the kernel, and mount them at `path`, which is made if need be.

    Args:
        node: NUMA node; None: any.
        user, group: who owns the pool's folder, by name or number; empty: root.
        mode: its permissions.
        quota: bytes that the files of one user may have; 0: any number.
        allow_nested: although guests of it could run guests, which can crash a kernel before 6.13.
        allow_vfio: pages go back to the pool although a device that user space drives may still write to them.

    Raises:
        OffmapError: there is one already, or the kernel cannot or must not give it.
    """
    options = [f"size={size}", f"mode={mode:o}"]
    options += [f"node={node}"] if node is not None else []
    options += [f"uid={_id(user, 'user')}"] if user else []
    options += [f"gid={_id(group, 'group')}"] if group else []
    options += [f"quota={quota}"] if quota else []
    options += ["allow_nested"] if allow_nested else []
    options += ["allow_vfio"] if allow_vfio else []
    if any(os.path.realpath(path) in pool.paths for pool in pools()):
        raise OffmapError(f"there is a pool at {path}", "resize it (offmap pool resize), or choose another --path")
    there = os.path.exists(path)  # noqa: PTH110
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"making the folder {path}", error, "choose another --path") from None
    try:
        _mount(f"creating a pool of {format_size(size)} at {path}", path, _FLAGS, ",".join(options))
    except KernelError:
        if not there:
            with suppress(OSError):
                Path(path).rmdir()
        raise
    return pool_at(path)


def resize(path: str, size: int) -> Pool:
    """Make the pool at `path` larger or smaller. Raises OffmapError: there is none, or it is too much, or in use."""
    before = pool_at(path)
    try:
        _mount(f"resizing {path} to {format_size(size)}", path, _FLAGS | _MS_REMOUNT, f"size={size}")
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        left = pool_at(path).size
        raise OffmapError(
            f"{path} has {format_size(left)} now, {format_size(before.size)} before",
            "end guests, or wait until what they had is zeroed, and try again",
            why="the rest is in use",
        ) from None
    return pool_at(path)


def destroy(path: str) -> None:
    """Unmount the pool at `path`: all goes back to the kernel, zeroed. Raises OffmapError: there is none, or in use."""
    pool = pool_at(path)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), 0) == 0:
        return
    remedy = "run as root" if ctypes.get_errno() == errno.EPERM else f"end who uses its files ({pool.files} there)"
    raise KernelError(f"unmounting {path}", ctypes.get_errno(), remedy)


def _mount(what: str, path: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    name = FILE_SYSTEM.encode()
    if libc.mount(b"offmap", os.fsencode(path), name, ctypes.c_ulong(flags), options.encode()) == 0:
        return
    error = ctypes.get_errno()
    raise KernelError(what, error, _MOUNT_REMEDY.get(error, "see the kernel's log: dmesg"))


def _id(name: str, kind: str) -> int:
    """The number of a user or group, by name or number. Raises OffmapError: there is none of that name."""
    if name.isascii() and name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
    except KeyError:
        raise OffmapError(f"there is no {kind} {name!r}", "write an existing name, or a number") from None
