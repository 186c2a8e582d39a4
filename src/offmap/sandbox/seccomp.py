"""Seccomp filters made of rules, put on the calling thread; and how a violation is told.

A system call that no rule allows is not made: the kernel sends SIGSYS instead. Its handler is a few bytes of machine
code, as an interpreter whose state somebody else has written to can tell nobody anything. It sends the siginfo, which
has the number of the call, to the broker, waits until that has said so, and ends the process.
"""

import ctypes
import mmap
import os
import signal
from collections.abc import Iterable

from offmap.errors import KernelError, OffmapError
from offmap.sandbox.rules import Argument, Rule, by_call
from offmap.uapi import seccomp as uapi
from offmap.uapi.page import PAGE_SIZE
from offmap.uapi.syscall import NUMBERS

SIGINFO_SIZE = 128
SIGINFO_SYSCALL_AT = 24  # si_syscall
EXIT_STATUS = 2  # offmap.errors.ExitStatus.FAILED

_HANDLER = (
    b"\xbf%b"  # mov edi, the fd (rsi is the siginfo already)
    b"\xba\x80\x00\x00\x00"  # mov edx, 128
    b"\xb8\x01\x00\x00\x00"  # mov eax, write
    b"\x0f\x05"  # syscall
    b"\xbf%b"  # mov edi, the fd
    b"\x48\x8d\x74\x24\x80"  # lea rsi, [rsp-128]: the red zone, of a frame that is never returned to
    b"\xba\x40\x00\x00\x00"  # mov edx, 64
    b"\xb8\x00\x00\x00\x00"  # mov eax, read
    b"\x0f\x05"  # syscall: until the broker has answered
    b"\xbf\x02\x00\x00\x00"  # mov edi, EXIT_STATUS
    b"\xb8\xe7\x00\x00\x00"  # mov eax, exit_group
    b"\x0f\x05"  # syscall
    b"\x0f\x0b"  # ud2
)


class _sigaction(ctypes.Structure):
    """struct sigaction of the C library on x86-64."""

    _fields_ = (
        ("sa_handler", ctypes.c_void_p),
        ("sa_mask", ctypes.c_ulong * 16),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    )


class _sock_fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def report_violations_to(fd: int) -> mmap.mmap:
    """Have each violation of this process written to `fd`; ends the process once something was read from there.

    Returns:
        The page that the handler is in, which the caller keeps.

    Raises:
        KernelError: the handler cannot be installed.
    """
    number = fd.to_bytes(4, "little")
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.mmap(-1, PAGE_SIZE)
    page.write(_HANDLER % (number, number))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, PAGE_SIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        raise KernelError("mprotect of the handler of violations", ctypes.get_errno())
    action = _sigaction(sa_handler=address, sa_flags=0x4 | 0x40000000)  # SA_SIGINFO | SA_NODEFER
    if libc.sigaction(int(signal.SIGSYS), ctypes.byref(action), None):
        raise KernelError("sigaction(SIGSYS)", ctypes.get_errno())
    return page


def compiled(rules: Iterable[Rule]) -> bytes:
    """The filter program of `rules`, as an array of struct sock_filter."""
    calls = by_call(rules)
    unknown = [name for name in calls if name not in NUMBERS]
    if unknown:
        raise OffmapError(f"there is no system call {unknown[0]}")
    program = [
        (uapi.BPF_LD_W_ABS, 0, 0, uapi.SECCOMP_DATA_ARCH),
        (uapi.BPF_JEQ_K, 1, 0, uapi.AUDIT_ARCH_X86_64),
        (uapi.BPF_RET_K, 0, 0, uapi.SECCOMP_RET_KILL_PROCESS),
        (uapi.BPF_LD_W_ABS, 0, 0, uapi.SECCOMP_DATA_NR),  # x32's numbers have a bit that none of ours has
    ]
    for name, alternatives in calls.items():
        body: list[tuple[int, int, int, int]] = []
        for arguments in alternatives:
            checks = [check for argument in arguments for check in _checks(argument)]
            allowed = [*checks, (uapi.BPF_RET_K, 0, 0, uapi.SECCOMP_RET_ALLOW)]
            # A jump to 255 is one to the end of this alternative.
            end = len(allowed)
            body += [
                (code, end - at - 1 if yes == 255 else yes, end - at - 1 if no == 255 else no, k)
                for at, (code, yes, no, k) in enumerate(allowed)
            ]
        body.append((uapi.BPF_RET_K, 0, 0, uapi.SECCOMP_RET_TRAP))
        program += [(uapi.BPF_JEQ_K, 0, len(body), NUMBERS[name]), *body]
    program.append((uapi.BPF_RET_K, 0, 0, uapi.SECCOMP_RET_TRAP))
    if len(program) > uapi.BPF_MAXINSNS or any(max(yes, no) > 255 for _, yes, no, _ in program):
        raise OffmapError("the sandbox's rules make too long a filter")
    return b"".join(uapi.SOCK_FILTER.pack(*instruction) for instruction in program)


def _checks(argument: Argument) -> list[tuple[int, int, int, int]]:
    load = (uapi.BPF_LD_W_ABS, 0, 0, uapi.SECCOMP_DATA_ARGS + 8 * argument.number)
    if argument.values is not None:
        values = sorted(argument.values)
        tests = [
            (uapi.BPF_JEQ_K, len(values) - number - 1, 255 if number == len(values) - 1 else 0, value)
            for number, value in enumerate(values)
        ]
        return [load, *tests]
    if argument.without:
        return [load, (uapi.BPF_JSET_K, 255, 0, argument.without)]
    return [load, (uapi.BPF_JSET_K, 0, 255, argument.with_)]


def install(program: bytes) -> None:
    """Put the filter on the calling thread, for good; it must have no_new_privs. Raises KernelError: it cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    prog = _sock_fprog(len(program) // uapi.SOCK_FILTER.size, program)
    if libc.syscall(NUMBERS["seccomp"], uapi.SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(prog)):
        raise KernelError("seccomp", ctypes.get_errno(), "use a kernel with CONFIG_SECCOMP_FILTER, or --no-sandbox")


def supported() -> bool:
    """Whether this kernel has filters: it then finds the program missing, not the operation."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(NUMBERS["seccomp"], uapi.SECCOMP_SET_MODE_FILTER, 0, None)
    return os.strerror(ctypes.get_errno()) == os.strerror(14)  # EFAULT
