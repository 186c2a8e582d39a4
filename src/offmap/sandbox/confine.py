"""What this process gives up beside system calls: its user, capabilities, namespaces, files, limits.

All of it is the calling thread's, and inherited by threads that it starts. So there must be no other thread yet. What a
kernel or a container does not allow is left out and named; without no_new_privs and without its capabilities a process
is not confined.
"""

import contextlib
import ctypes
import os

from offmap.errors import KernelError, OffmapError
from offmap.typed import NamedTuple
from offmap.uapi import seccomp as uapi
from offmap.uapi.syscall import NUMBERS

_UID_BASE = 0x7000_0000
"""User ids of VMs: this and the VMM's pid, which is unique while it runs. No tool gives such ids to people."""

_NOBODY = 65534
# asm-generic/resource.h
_RLIMIT_FSIZE, _RLIMIT_STACK, _RLIMIT_CORE, _RLIMIT_NOFILE, _RLIMIT_AS = 1, 3, 4, 7, 9
_LARGEST_STACK = 64 << 20  # of a thread that is still to come, where no limit says
_SPARE = 256 << 20  # bytes of memory that it may still take: what devices keep for others is counted, and far less
_NAMESPACES = (
    ("ipc", uapi.CLONE_NEWIPC),
    ("uts", uapi.CLONE_NEWUTS),
    ("net", uapi.CLONE_NEWNET),
    ("cgroup", uapi.CLONE_NEWCGROUP),
    ("mount", uapi.CLONE_NEWNS),
)


class Confined(NamedTuple):
    """What is in force.

    Attributes:
        uid: the process's user id.
        namespaces: those of its own, by name.
        root: "empty" where it sees no file by any path; else "the host's".
        landlock: the version of the ABI, or 0 where there is none.
        missing: what this host does not allow, with the reason.
    """

    uid: int
    namespaces: tuple[str, ...]
    root: str
    landlock: int
    missing: tuple[str, ...]


class Limits(NamedTuple):
    """What a process may have.

    Attributes:
        fds: descriptors.
        file: bytes of the longest file that it writes to; None: any number.
        memory: bytes that it has mapped already.
        threads: that it is still to start.
    """

    fds: int
    file: int | None
    memory: int
    threads: int


def confine(limits: Limits) -> Confined:
    """Give up all that can be. Raises OffmapError: the least is not to be had: no capabilities, and no new ones."""
    libc = ctypes.CDLL(None, use_errno=True)
    ends_with_parent = ctypes.c_int()  # a signal, which the kernel forgets when the user changes
    libc.prctl(uapi.PR_GET_PDEATHSIG, ctypes.byref(ends_with_parent), 0, 0, 0)
    missing: list[str] = []
    privileged = os.geteuid() == 0
    namespaces: list[str] = []
    if not privileged:
        if libc.unshare(uapi.CLONE_NEWUSER):
            missing.append(f"user namespace ({os.strerror(ctypes.get_errno())})")
        else:
            namespaces.append("user")
    for name, flag in _NAMESPACES:
        if libc.unshare(flag):
            missing.append(f"{name} namespace ({os.strerror(ctypes.get_errno())})")
        else:
            namespaces.append(name)
    root = "the host's"
    if "mount" in namespaces:
        try:
            _leave_files(libc)
            root = "empty"
        except KernelError as error:
            missing.append(f"empty root ({error.reason})")
    _limit(libc, _RLIMIT_CORE, 0)
    if limits.file is not None:
        _limit(libc, _RLIMIT_FSIZE, limits.file)
    stacks = limits.threads * min(_limits(libc, _RLIMIT_STACK)[0], _LARGEST_STACK)
    _limit(libc, _RLIMIT_AS, limits.memory + stacks + _SPARE)
    _limit(libc, _RLIMIT_NOFILE, limits.fds)
    if privileged:
        _become_nobody(missing)
    _drop_capabilities(libc)
    if libc.prctl(uapi.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise KernelError("PR_SET_NO_NEW_PRIVS", ctypes.get_errno(), "use --no-sandbox")
    libc.prctl(uapi.PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(uapi.PR_SET_PDEATHSIG, ends_with_parent.value, 0, 0, 0)
    landlock = _landlock(libc, missing)
    return Confined(os.geteuid(), tuple(namespaces), root, landlock, tuple(missing))


def _limit(libc: ctypes.CDLL, resource: int, most: int) -> None:
    """Let it have no more than this, or than it may have already. (Python's own module takes a while to import.)"""
    limits = _limits(libc, resource)
    limits[0] = limits[1] = min(most, limits[1])
    if libc.setrlimit(resource, limits):
        raise KernelError("setrlimit", ctypes.get_errno())


def _limits(libc: ctypes.CDLL, resource: int) -> "ctypes.Array[ctypes.c_ulong]":
    """What it may have, and could let itself have."""
    limits = (ctypes.c_ulong * 2)()
    libc.getrlimit(resource, limits)
    return limits


def _leave_files(libc: ctypes.CDLL) -> None:
    """Make an empty, read-only folder the root of this process. Raises KernelError: the kernel does not allow it."""

    def check(what: str, result: int) -> None:
        if result:
            raise KernelError(what, ctypes.get_errno())

    flags = uapi.MS_NOSUID | uapi.MS_NODEV | uapi.MS_NOEXEC
    check("mount", libc.mount(None, b"/", None, ctypes.c_ulong(uapi.MS_REC | uapi.MS_PRIVATE), None))
    where = b"/tmp" if os.path.isdir("/tmp") else b"/proc/self/task"  # noqa: PTH112
    check(
        "mount of tmpfs", libc.mount(b"none", where, b"tmpfs", ctypes.c_ulong(flags), b"size=4k,nr_inodes=2,mode=555")
    )
    os.chdir(where)
    if libc.syscall(NUMBERS["pivot_root"], b".", b".") == 0:
        check("umount", libc.umount2(b".", uapi.MNT_DETACH))
    else:  # the root of a chroot, or the kernel's own rootfs, cannot be put away
        check("chroot", libc.chroot(b"."))
    os.chdir("/")
    with contextlib.suppress(OSError):
        libc.mount(None, b"/", None, ctypes.c_ulong(flags | uapi.MS_RDONLY | 32), None)  # MS_REMOUNT


def _become_nobody(missing: list[str]) -> None:
    """Take a user id that no other process has. Raises KernelError: no id can be taken."""
    own = _UID_BASE + os.getpid()
    for uid in (own, _NOBODY):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            missing.append(f"user id {uid} ({error.strerror})")
        else:
            return
    raise OffmapError("this process may take no other user id", "run as an ordinary user, or with --no-sandbox")


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    libc.prctl(uapi.PR_CAP_AMBIENT, uapi.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(uapi.CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise KernelError("capset", ctypes.get_errno(), "use --no-sandbox")


def _landlock(libc: ctypes.CDLL, missing: list[str]) -> int:
    """Forbid all access to files by path, TCP ports and abstract sockets. Returns the ABI's version, or 0."""
    create, restrict = NUMBERS["landlock_create_ruleset"], NUMBERS["landlock_restrict_self"]
    version = int(libc.syscall(create, None, 0, uapi.LANDLOCK_CREATE_RULESET_VERSION))
    if version < 1:
        missing.append("Landlock")
        return 0
    rights = uapi.LANDLOCK_ACCESS_FS[max(known for known in uapi.LANDLOCK_ACCESS_FS if known <= version)]
    network = uapi.LANDLOCK_ACCESS_NET if version >= 4 else 0
    scoped = uapi.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET if version >= 6 else 0
    attribute = (ctypes.c_uint64 * 3)(rights, network, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    fd = int(libc.syscall(create, attribute, ctypes.c_size_t(size), 0))
    if fd < 0:
        missing.append(f"Landlock ({os.strerror(ctypes.get_errno())})")
        return 0
    try:
        if libc.syscall(restrict, fd, 0):
            missing.append(f"Landlock ({os.strerror(ctypes.get_errno())})")
            return 0
    finally:
        os.close(fd)
    return version
