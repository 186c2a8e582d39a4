"""The filter, run by an interpreter of classic BPF: what it reports, and what it lets through."""

import struct

import pytest

from offmap.uapi import kvm, seccomp
from offmap.uapi import ptrace as tracing
from offmap.uapi import seccomp_notify as uapi
from offmap.wrap.filter import REPORTED, program

I386, X32 = 0x40000003, uapi.X32_SYSCALL_BIT


def run(number: int, arch: int, *arguments: int) -> int:
    """What the filter answers to a system call."""
    padded = arguments + (0,) * (6 - len(arguments))
    data = struct.pack("<iIQ6Q", number, arch, 0, *(value & (1 << 64) - 1 for value in padded))
    instructions, at, loaded = program(), 0, 0
    while True:
        one = instructions[at]
        at += 1
        match one.code:
            case seccomp.BPF_LD_W_ABS:
                (loaded,) = struct.unpack_from("<I", data, one.k)
            case seccomp.BPF_JEQ_K:
                at += one.jt if loaded == one.k else one.jf
            case seccomp.BPF_RET_K:
                return int(one.k)
            case _:
                raise ValueError(one.code)


@pytest.mark.parametrize("command", REPORTED)
def test_what_matters_is_reported_by_every_abi(command: int) -> None:
    for number, arch in (
        (tracing.SYS_ioctl, seccomp.AUDIT_ARCH_X86_64),
        (X32 | tracing.SYS_ioctl_x32, seccomp.AUDIT_ARCH_X86_64),
        (tracing.SYS_ioctl_i386, I386),
    ):
        assert run(number, arch, 7, command) == uapi.SECCOMP_RET_USER_NOTIF
        # ioctl(2) takes 32 bits of it.
        assert run(number, arch, 7, command | 1 << 40) == uapi.SECCOMP_RET_USER_NOTIF


def test_all_else_runs() -> None:
    for number, arch in ((tracing.SYS_ioctl, seccomp.AUDIT_ARCH_X86_64), (tracing.SYS_ioctl_i386, I386)):
        assert run(number, arch, 7, kvm.KVM_RUN) == seccomp.SECCOMP_RET_ALLOW
    for number in (tracing.SYS_mmap, tracing.SYS_ioctl_i386, X32 | tracing.SYS_ioctl):
        assert run(number, seccomp.AUDIT_ARCH_X86_64, 7, REPORTED[0]) == seccomp.SECCOMP_RET_ALLOW
    assert run(tracing.SYS_ioctl, I386, 7, REPORTED[0]) == seccomp.SECCOMP_RET_ALLOW
