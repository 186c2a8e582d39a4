"""Rules of system calls, and the filters made of them: a small interpreter of BPF judges what the kernel would."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.errors import OffmapError
from offmap.sandbox import policy
from offmap.sandbox.rules import Rule, allow, both, by_call, one_of, with_bit, without
from offmap.sandbox.seccomp import compiled
from offmap.uapi import seccomp as uapi
from offmap.uapi.syscall import NUMBERS, name_of


def judge(program: bytes, name: str, arguments: Sequence[int] = (), arch: int = uapi.AUDIT_ARCH_X86_64) -> bool:
    """Whether the filter allows a call (struct seccomp_data: nr, arch, instruction_pointer, args)."""
    data = struct.pack("<IIQ6Q", NUMBERS[name], arch, 0, *arguments, *(0,) * (6 - len(arguments)))
    instructions = list(uapi.SOCK_FILTER.iter_unpack(program))
    accumulator = at = 0
    while True:
        code, yes, no, k = instructions[at]
        at += 1
        if code == uapi.BPF_LD_W_ABS:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == uapi.BPF_JEQ_K:
            at += yes if accumulator == k else no
        elif code == uapi.BPF_JSET_K:
            at += yes if accumulator & k else no
        else:
            assert code == uapi.BPF_RET_K
            assert k in (uapi.SECCOMP_RET_ALLOW, uapi.SECCOMP_RET_TRAP, uapi.SECCOMP_RET_KILL_PROCESS)
            return bool(k == uapi.SECCOMP_RET_ALLOW)


def test_what_is_not_there_is_not_allowed() -> None:
    program = compiled(allow("read", "write"))
    assert judge(program, "read") and judge(program, "write")
    assert not any(judge(program, name) for name in NUMBERS if name not in ("read", "write"))
    assert not judge(program, "read", arch=0x40000003), "i386's numbers are others"


def test_arguments() -> None:
    program = compiled(
        [
            both(without("mmap", 2, 4), without("mmap", 3, 8)),
            with_bit("newfstatat", 3, 0x1000),
            one_of("ioctl", 1, [5, 0x80000007]),
        ]
    )
    assert judge(program, "mmap", [0, 4096, 3]) and not judge(program, "mmap", [0, 4096, 7])
    assert not judge(program, "mmap", [0, 4096, 3, 8])
    assert judge(program, "newfstatat", [3, 0, 0, 0x1000]) and not judge(program, "newfstatat", [3, 0, 0, 0x100])
    assert judge(program, "ioctl", [0, 5]) and judge(program, "ioctl", [9, 0x80000007])
    assert not judge(program, "ioctl", [5, 6])


@given(st.lists(st.sets(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=4), st.integers(0, 120))
def test_several_rules_of_a_call_allow_what_any_of_them_does(values: list[set[int]], argument: int) -> None:
    program = compiled([one_of("ioctl", 1, some) for some in values])
    assert judge(program, "ioctl", [0, argument]) == any(argument in some for some in values)


def test_a_rule_without_conditions_wins() -> None:
    assert by_call([one_of("ioctl", 1, [1]), *allow("ioctl"), one_of("ioctl", 1, [2])]) == {"ioctl": [()]}


def test_a_name_that_is_none() -> None:
    with pytest.raises(OffmapError, match="no system call nonesuch"):
        compiled(allow("nonesuch"))


KINDS = ("drive", "rng", "balloon", "tap", "vhost", "passt", "vsock", "console")
NEVER = (
    *("open", "openat", "openat2", "creat", "socket", "connect", "bind", "listen", "fork", "vfork", "clone", "clone3"),
    *("execve", "execveat", "ptrace", "kill", "mount", "bpf", "io_uring_setup", "userfaultfd", "process_vm_writev"),
    *("unlink", "rename", "chmod", "setresuid", "unshare", "seccomp", "prctl", "memfd_create", "pidfd_getfd"),
    *("sendmsg", "sendmmsg", "pidfd_send_signal", "tkill", "dup2", "dup3", "splice", "vmsplice", "shmat", "keyctl"),
)


@pytest.mark.parametrize(
    "rules",
    [policy.rules_of_main(KINDS), policy.rules_of_vcpu(), policy.rules_of_device(KINDS)],
    ids=["main", "vcpu", "device"],
)
def test_no_kind_of_thread_may_reach_the_host(rules: list[Rule]) -> None:
    program = compiled(rules)
    assert len(program) // uapi.SOCK_FILTER.size < 400
    assert not [name for name in NEVER if judge(program, name)]
    assert not judge(program, "mmap", [0, 4096, 7, 0x22])
    assert not judge(program, "mprotect", [0, 4096, 5])
    assert not judge(program, "ioctl", [3, 0xAE41]), "KVM_CREATE_VCPU"
    assert not judge(program, "ioctl", [3, 0x4020AE46]), "KVM_SET_USER_MEMORY_REGION"
    assert not judge(program, "ioctl", [0, 0x5412]), "TIOCSTI"

    assert not judge(program, "mmap", [0, 4096, 3, 0x40022]), "a huge page, which another guest waits for"
    assert not judge(program, "madvise", [0, 4096, 12]), "MADV_MERGEABLE: which pages others have"
    assert not judge(program, "futex", [0, 6]), "FUTEX_LOCK_PI"
    assert not judge(program, "fallocate", [3, 1, 1 << 40, 1 << 40]), "room behind a drive's end"


def test_only_a_vcpu_runs_the_guest() -> None:
    assert judge(compiled(policy.rules_of_vcpu()), "ioctl", [3, 0xAE80])
    assert not judge(compiled(policy.rules_of_main(KINDS)), "ioctl", [3, 0xAE80])


def test_names() -> None:
    assert name_of(0) == "read" and name_of(425) == "io_uring_setup" and name_of(9999) == "number 9999"
