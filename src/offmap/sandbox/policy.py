"""Which system calls each kind of thread may make. A call that is not here ends the VM."""

import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterable, Mapping

from offmap.sandbox.rules import Rule, allow, both, one_of, with_bit, without
from offmap.uapi import fs, kvm

_MAP_HOST_POOLS = 0x2000 | 0x40000  # MAP_LOCKED, MAP_HUGETLB: what other guests live on
# linux/futex.h: FUTEX_WAIT, _WAKE, _WAIT_BITSET, _WAKE_BITSET; each with _PRIVATE_FLAG and _CLOCK_REALTIME, or without.
_FUTEX_OPS = [op | private | clock for op in (0, 1, 9, 10) for private in (0, 128) for clock in (0, 256)]
_PUNCH_HOLE = fs.FALLOC_FL_PUNCH_HOLE | fs.FALLOC_FL_KEEP_SIZE
_AT_EMPTY_PATH = 0x1000
_FIONBIO = 0x5421
# asm-generic/ioctls.h. (A guest without a terminal need not wait for the module termios.)
_TCGETS, _TCSETS, _TCSETSW, _TCSETSF, _TIOCGWINSZ = 0x5401, 0x5402, 0x5403, 0x5404, 0x5413


def _all_threads() -> list[Rule]:
    """The interpreter's own: memory, locks, time, its end, and what is already open."""
    return [
        *allow("munmap", "mremap", "brk", "read", "write", "close", "poll"),
        one_of("futex", 1, _FUTEX_OPS),
        one_of("madvise", 2, [mmap.MADV_DONTNEED, mmap.MADV_FREE, mmap.MADV_REMOVE]),
        both(without("mmap", 2, mmap.PROT_EXEC), without("mmap", 3, _MAP_HOST_POOLS)),
        without("mprotect", 2, mmap.PROT_EXEC),
        *allow("rt_sigreturn", "rt_sigprocmask", "sigaltstack", "restart_syscall", "exit", "exit_group"),
        *allow("getpid", "gettid", "clock_gettime", "gettimeofday", "sched_yield", "getrandom"),
        *allow("rseq", "set_robust_list"),
        one_of("tgkill", 0, [os.getpid()]),  # kicks of vCPUs
    ]


def _main() -> list[Rule]:
    terminal = [_TCGETS, _TCSETS, _TCSETSW, _TCSETSF, _TIOCGWINSZ]
    return [
        one_of("ioctl", 1, [kvm.KVM_IRQ_LINE, kvm.KVM_GET_STATS_FD, _FIONBIO, *terminal]),
        one_of("rt_sigaction", 0, [n for n in range(1, 65) if n != signal.SIGSYS]),
        *allow("wait4", "waitid", "ftruncate", "lseek", "pread64", "shutdown", "clock_nanosleep", "select", "dup"),
        with_bit("newfstatat", 3, _AT_EMPTY_PATH),
        *allow("fstat", "epoll_ctl", "pwrite64"),
        one_of("fcntl", 1, [fcntl.F_GETFD, fcntl.F_GETFL, fcntl.F_SETFL]),
        # What a device does when its driver, or the machine, is ended.
        one_of("fallocate", 1, [_PUNCH_HOLE, fs.FALLOC_FL_ZERO_RANGE]),
        *allow("recvfrom"),
    ]


def _vcpu() -> list[Rule]:
    return [one_of("ioctl", 1, [kvm.KVM_RUN, kvm.KVM_IRQ_LINE, kvm.KVM_GET_REGS])]


def _vsock() -> list[Rule]:
    return [
        *allow("writev", "recvmsg", "recvfrom", "shutdown", "getsockname", "getsockopt", "accept4"),
        one_of("ioctl", 1, [_FIONBIO]),
        one_of("fcntl", 1, [fcntl.F_GETFL, fcntl.F_SETFL]),
    ]


def _drive() -> list[Rule]:
    return [
        *allow("preadv", "pwritev", "preadv2", "pwritev2", "pread64", "pwrite64", "fdatasync"),
        one_of("fallocate", 1, [_PUNCH_HOLE, fs.FALLOC_FL_ZERO_RANGE]),
        one_of("ioctl", 1, [fs.BLKDISCARD, fs.BLKZEROOUT]),
    ]


def _tap() -> list[Rule]:
    from offmap.uapi import if_tun

    offloads = [if_tun.TUNGETIFF, if_tun.TUNSETOFFLOAD, if_tun.SIOCGIFFLAGS]
    return [*allow("readv", "writev", "recvfrom"), one_of("ioctl", 1, offloads)]


def _vhost() -> list[Rule]:
    from offmap.uapi import vhost

    requests = [
        vhost.VHOST_SET_FEATURES,
        vhost.VHOST_SET_MEM_TABLE,
        vhost.VHOST_SET_VRING_NUM,
        vhost.VHOST_SET_VRING_BASE,
        vhost.VHOST_SET_VRING_ADDR,
        vhost.VHOST_SET_VRING_ERR,
        vhost.VHOST_SET_VRING_CALL,
        vhost.VHOST_SET_VRING_KICK,
        vhost.VHOST_NET_SET_BACKEND,
    ]
    return [*allow("eventfd2"), one_of("ioctl", 1, requests)]


def _passt() -> list[Rule]:
    status = with_bit("newfstatat", 3, _AT_EMPTY_PATH)
    return [*allow("readv", "writev", "lseek", "wait4"), status]


def _console() -> list[Rule]:
    return [
        *allow("readv", "writev", "sendto"),
        one_of("ioctl", 1, [_TCGETS, _TIOCGWINSZ]),
        one_of("fcntl", 1, [fcntl.F_GETFL]),
    ]


# Of devices, by `VirtioDevice.kinds`. Functions, as few guests have all of them.
_OF_DEVICES: Mapping[str, Callable[[], list[Rule]]] = {
    "drive": _drive,
    "rng": lambda: allow("readv"),
    "balloon": lambda: [one_of("fallocate", 1, [_PUNCH_HOLE])],
    "tap": _tap,
    "vhost": _vhost,
    "passt": _passt,
    "vsock": _vsock,
    "console": _console,
}


def rules_of_main(devices: Iterable[str]) -> list[Rule]:
    """Of the thread that waits for the user and ends the machine.

    Args:
        devices: rows of the table, of all devices: their drivers are reset on this thread when the machine ends.
    """
    return [*_all_threads(), *_main(), *(rule for name in devices for rule in _OF_DEVICES[name]())]


def rules_of_vcpu() -> list[Rule]:
    """Of a thread that runs the guest, and answers its accesses to the machine's devices."""
    return [*_vcpu(), *_all_threads()]


def rules_of_device(names: Iterable[str]) -> list[Rule]:
    """Of a device's thread. `names`: rows of the table."""
    waits = allow("epoll_wait", "epoll_ctl")
    return [*_all_threads(), *waits, *(rule for name in names for rule in _OF_DEVICES[name]())]
