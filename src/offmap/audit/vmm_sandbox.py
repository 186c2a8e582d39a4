"""What confines a VMM, read from /proc. Nothing that the VMM opened is touched, but for a stat of local files.

A file of a VMM may be on a file system that it answers for itself (FUSE), and would never answer. So the mount of each
is looked up first (``fdinfo``, ``mountinfo``).
"""

import os
import re
import stat
from collections.abc import Mapping
from typing import NamedTuple

from offmap.audit.process import Process
from offmap.audit.procfs import read_path
from offmap.audit.sandbox_result import LISTED, NOT_LOOKED_AT, Descriptor, Seccomp, VmmSandbox
from offmap.errors import Undetermined
from offmap.report.typed import plain
from offmap.uapi.devices import MISC_MAJOR, PHYSICAL_MEMORY

# include/uapi/linux/capability.h, in order
# fmt: off
_CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)
# fmt: on
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_PF_USER_WORKER = 0x4000  # include/linux/sched.h: a thread of the kernel's own in a user's process
_O_PATH = 0o10000000
_MISC_OF_NOTE = ("kvm", "offmap")
# File systems whose files the kernel itself answers for.
_LOCAL = {"devtmpfs", "tmpfs", "ramfs", "rootfs", "proc", "sysfs", "devpts", "overlay", "hugetlbfs", "offmapfs"}
_LOCAL |= {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "erofs", "squashfs", "zfs", "bcachefs", "debugfs", "cgroup2"}
_ANONYMOUS = re.compile(r"anon_inode:\[?(userfaultfd|bpf|io_uring|perf_event|pidfd)|pidfd:()")


class _Thread(NamedTuple):
    uid: int
    capabilities: int
    no_new_privs: bool
    seccomp: int
    filters: int | None


def vmm_sandbox(process: Process) -> VmmSandbox | None:
    """What confines this process; None where that cannot be read, or it has ended."""
    try:
        return _read(process)
    except (OSError, ValueError, KeyError, Undetermined):
        return None


def _read(process: Process) -> VmmSandbox | None:
    threads, kernel_threads = _threads(process)
    if not threads:
        return None
    held = 0
    for thread in threads:
        held |= thread.capabilities
    modes = [thread.seccomp for thread in threads]
    filters = [thread.filters for thread in threads if thread.filters is not None]
    own, shared = _namespaces(process)
    mounts = _mounts(process.read("mountinfo"))
    root = next((mount for mount in mounts.values() if mount.point == "/"), None)
    found = _descriptors(process, mounts)
    owner = process.stat("status")
    uid = min(thread.uid for thread in threads)
    return VmmSandbox(
        uid=uid,
        threads=len(threads),
        kernel_threads=kernel_threads,
        capabilities=tuple(
            _CAPABILITIES[bit] if bit < len(_CAPABILITIES) else f"cap_{bit}" for bit in range(64) if held >> bit & 1
        ),
        no_new_privs=all(thread.no_new_privs for thread in threads),
        seccomp=(Seccomp.NONE if 0 in modes else Seccomp.FILTER if 2 in modes else Seccomp.STRICT).value,
        seccomp_filters=min(filters) if len(filters) == len(threads) else None,
        namespaces=own,
        shared_namespaces=shared,
        mounts=len(mounts) if mounts else None,
        root="" if root is None else plain(f"{root.kind}{', read-only' if root.readonly else ''}"),
        # Files of one that is not dumpable belong to root (task_dump_owner in fs/proc/base.c).
        dumpable=None if owner is None or uid == 0 else owner.st_uid == uid,
        descriptors=tuple(found[:LISTED]),
        descriptors_omitted=max(len(found) - LISTED, 0),
    )


def _threads(process: Process) -> tuple[list[_Thread], int]:
    """Its threads that run its program, and how many run in the kernel only."""
    threads, in_kernel = [], 0
    for tid in process.threads():
        try:
            fields = _fields(process.read(f"task/{tid}/status"))
            words = process.read(f"task/{tid}/stat").rpartition(b")")[2].split()
        except (OSError, Undetermined):  # it has ended
            continue
        if int(words[6]) & _PF_USER_WORKER:
            in_kernel += 1
            continue
        filters = fields.get("Seccomp_filters")
        threads.append(
            _Thread(
                int(fields["Uid"].split()[1]),
                int(fields["CapEff"], 16) | int(fields["CapPrm"], 16),
                fields["NoNewPrivs"].strip() == "1",
                int(fields["Seccomp"]),
                None if filters is None else int(filters),
            )
        )
    return threads, in_kernel


def _namespaces(process: Process) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that are other than ours, and those that are the same."""
    with Process(os.getpid()) as ourselves:
        links = {name: (process.link(f"ns/{name}"), ourselves.link(f"ns/{name}")) for name in _NAMESPACES}
    known = {name: theirs == ours for name, (theirs, ours) in links.items() if theirs and ours}
    return tuple(name for name, same in known.items() if not same), tuple(name for name, same in known.items() if same)


class _Mount(NamedTuple):
    point: str
    kind: str
    readonly: bool


def _mounts(mountinfo: bytes) -> dict[int, _Mount]:
    """Mounts by their id (Documentation/filesystems/proc.rst, 3.5); of several at one point the last one counts."""
    found = {}
    for line in mountinfo.decode("utf-8", "replace").split("\n"):
        first, separator, second = line.partition(" - ")
        words, more = first.split(" "), second.split(" ")
        if separator and len(words) >= 6:
            found[int(words[0])] = _Mount(words[4], more[0], "ro" in words[5].split(","))
    return found


def _descriptors(process: Process, mounts: Mapping[int, _Mount]) -> list[Descriptor]:
    """Those that lead further."""
    mounts = {**mounts, **_mounts(read_path("/proc/self/mountinfo"))}
    misc = dict(line.split()[:2] for line in read_path("/proc/misc").decode("ascii", "replace").splitlines())
    found = []
    for fd, link in sorted(process.descriptors().items()):
        anonymous = _ANONYMOUS.match(link)
        if anonymous is None and (not link.startswith("/") or link.startswith("/memfd:")):
            continue
        info = _fdinfo(process, fd)
        kind = _kind_of_file(process, fd, info, mounts, misc) if anonymous is None else anonymous[1] or "pidfd"
        if kind:
            found.append(Descriptor(fd, kind, plain(link), _access(info)))
    return found


def _fields(text: bytes) -> Mapping[str, str]:
    """The lines ``name:<tab>value`` of status and fdinfo."""
    lines = text.decode("utf-8", "replace").split("\n")
    return {name: value for name, colon, value in (line.partition(":\t") for line in lines) if colon}


def _fdinfo(process: Process, fd: int) -> Mapping[str, str]:
    try:
        return _fields(process.read(f"fdinfo/{fd}"))
    except Undetermined:  # closed meanwhile
        return {}


def _access(info: Mapping[str, str]) -> str:
    flags = int(info.get("flags", "3"), 8)
    return "path" if flags & _O_PATH else ("read", "write", "both", "")[flags & os.O_ACCMODE]


def _kind_of_file(
    process: Process, fd: int, info: Mapping[str, str], mounts: Mapping[int, _Mount], misc: Mapping[str, str]
) -> str:
    """What is of note about a file with a path; empty for nothing."""
    mount = mounts.get(int(info.get("mnt_id", "-1")))
    if mount is None or mount.kind not in _LOCAL:
        return NOT_LOOKED_AT
    opened = process.stat(f"fd/{fd}")
    if opened is None:
        return ""
    if stat.S_ISDIR(opened.st_mode):
        return "directory"
    if stat.S_ISCHR(opened.st_mode):
        major, minor = os.major(opened.st_rdev), os.minor(opened.st_rdev)
        if opened.st_rdev in PHYSICAL_MEMORY:
            return "physical memory"
        if major == MISC_MAJOR and (name := misc.get(str(minor))) in _MISC_OF_NOTE:
            return f"/dev/{name}"
    return ""
