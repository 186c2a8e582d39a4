"""Which system calls each kind of thread may make. A call that is not here ends the VM."""

import fcntl
import os
import signal
import termios
from collections.abc import Collection, Iterable, Mapping

from offmap.sandbox.rules import Rule, allow, one_of, with_bit, without
from offmap.uapi import fs, if_tun, kvm, vhost

_PROT_EXEC = 4
_AT_EMPTY_PATH = 0x1000
_FIONBIO = 0x5421


def _all_threads() -> list[Rule]:
    """The interpreter's own: memory, locks, time, its end, and what is already open."""
    return [
        *allow("futex", "munmap", "mremap", "brk", "madvise", "read", "write", "close", "poll"),
        without("mmap", 2, _PROT_EXEC),
        without("mprotect", 2, _PROT_EXEC),
        *allow("rt_sigreturn", "rt_sigprocmask", "sigaltstack", "restart_syscall", "exit", "exit_group"),
        *allow("getpid", "gettid", "clock_gettime", "gettimeofday", "sched_yield", "getrandom"),
        *allow("rseq", "set_robust_list"),
        one_of("tgkill", 0, [os.getpid()]),  # kicks of vCPUs
    ]


def _main() -> list[Rule]:
    terminal = [termios.TCGETS, 0x5402, 0x5403, 0x5404, termios.TIOCGWINSZ]  # TCSETS, TCSETSW, TCSETSF
    return [
        one_of("ioctl", 1, [kvm.KVM_IRQ_LINE, kvm.KVM_GET_STATS_FD, _FIONBIO, *terminal]),
        one_of("rt_sigaction", 0, [n for n in range(1, 65) if n != signal.SIGSYS]),
        *allow("wait4", "waitid", "ftruncate", "lseek", "pread64", "shutdown", "clock_nanosleep", "select", "dup"),
        with_bit("newfstatat", 3, _AT_EMPTY_PATH),
        *allow("fstat", "epoll_ctl", "pwrite64"),
        one_of("fcntl", 1, [fcntl.F_GETFD, fcntl.F_GETFL, fcntl.F_SETFL]),
        # What a device does when its driver, or the machine, is ended.
        *allow("fallocate", "recvfrom"),
    ]


def _vcpu() -> list[Rule]:
    return [one_of("ioctl", 1, [kvm.KVM_RUN, kvm.KVM_IRQ_LINE, kvm.KVM_GET_REGS])]


_DEVICE = allow("epoll_wait", "epoll_ctl")
_SOCKET = [
    *allow("recvmsg", "sendmsg", "recvfrom", "sendto", "shutdown", "getsockname", "getsockopt", "accept4"),
    one_of("ioctl", 1, [_FIONBIO]),
    one_of("fcntl", 1, [fcntl.F_GETFL, fcntl.F_SETFL]),
]
_OFFLOADS = [if_tun.TUNGETIFF, if_tun.TUNSETOFFLOAD, if_tun.SIOCGIFFLAGS]
_VHOST = [
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

_OF_DEVICES: Mapping[str, list[Rule]] = {
    "drive": [
        *allow("preadv", "pwritev", "preadv2", "pwritev2", "pread64", "pwrite64", "fallocate", "fdatasync"),
        one_of("ioctl", 1, [fs.BLKDISCARD, fs.BLKZEROOUT]),
    ],
    "rng": allow("readv"),
    "balloon": allow("fallocate"),
    "tap": [*allow("readv", "writev", "recvfrom"), one_of("ioctl", 1, _OFFLOADS)],
    "vhost": [*allow("eventfd2"), one_of("ioctl", 1, _VHOST)],
    "passt": [*allow("recvmsg", "sendmsg", "sendto", "lseek", "wait4"), with_bit("newfstatat", 3, _AT_EMPTY_PATH)],
    "vsock": _SOCKET,
    "console": [
        *allow("readv", "writev", "dup"),
        *_SOCKET,
        one_of("ioctl", 1, [termios.TCGETS, termios.TIOCGWINSZ, _FIONBIO]),
        one_of("fcntl", 1, [fcntl.F_DUPFD_CLOEXEC]),
    ],
}


def rules_of_main(devices: Iterable[str], children: Collection[int] = ()) -> list[Rule]:
    """Of the thread that waits for the user and ends the machine.

    Args:
        devices: rows of the table, of all devices: their drivers are reset on this thread when the machine ends.
        children: processes that it may end.
    """
    rules = [*_all_threads(), *_main(), *(rule for name in devices for rule in _OF_DEVICES[name])]
    return [*rules, one_of("kill", 0, children)] if children else rules


def rules_of_vcpu() -> list[Rule]:
    """Of a thread that runs the guest, and answers its accesses to the machine's devices."""
    return [*_vcpu(), *_all_threads()]


def rules_of_device(names: Iterable[str]) -> list[Rule]:
    """Of a device's thread. `names`: rows of the table."""
    return [*_all_threads(), *_DEVICE, *(rule for name in names for rule in _OF_DEVICES[name])]
