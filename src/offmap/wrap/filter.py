"""The seccomp filter of a wrapped VMM: it reports the KVM calls that matter and lets all else run at full speed.

A system call by another ABI (int 0x80, x32) could set a slot as well. The filter reports these calls too, by their
command only, and the supervisor refuses them.
"""

import ctypes
import errno
import os
from _collections_abc import Sequence  # os has it already; collections.abc would bring more

from offmap.errors import KernelError
from offmap.uapi import kvm, seccomp
from offmap.uapi import ptrace as tracing
from offmap.uapi import seccomp_notify as uapi

REPORTED: tuple[int, ...] = (
    kvm.KVM_SET_USER_MEMORY_REGION,
    kvm.KVM_SET_USER_MEMORY_REGION2,
    kvm.KVM_CREATE_VM,
    kvm.KVM_CREATE_VCPU,
    kvm.KVM_SET_CPUID,
    kvm.KVM_SET_CPUID2,
    kvm.KVM_GET_SUPPORTED_CPUID,
    kvm.KVM_SET_REGS,
    kvm.KVM_XEN_HVM_CONFIG,
    kvm.KVM_XEN_HVM_SET_ATTR,
    kvm.KVM_XEN_VCPU_SET_ATTR,
)
"""Commands of ioctl(2)."""

_NR = uapi.seccomp_data.nr.offset
_ARCH = uapi.seccomp_data.arch.offset
_COMMAND = uapi.seccomp_data.args.offset + 8  # the low half of args[1]: ioctl(2) takes 32 bits


def program(commands: Sequence[int] = REPORTED) -> list[uapi.sock_filter]:
    """The filter in classic BPF. A jump counts the instructions it skips."""
    tail = len(commands)
    instructions = [
        (seccomp.BPF_LD_W_ABS, 0, 0, _ARCH),
        (seccomp.BPF_JEQ_K, 3, 0, seccomp.AUDIT_ARCH_X86_64),
        (seccomp.BPF_LD_W_ABS, 0, 0, _NR),
        (seccomp.BPF_JEQ_K, 4, 0, tracing.SYS_ioctl_i386),
        (seccomp.BPF_RET_K, 0, 0, seccomp.SECCOMP_RET_ALLOW),
        (seccomp.BPF_LD_W_ABS, 0, 0, _NR),
        (seccomp.BPF_JEQ_K, 1, 0, tracing.SYS_ioctl),
        (seccomp.BPF_JEQ_K, 0, tail + 1, uapi.X32_SYSCALL_BIT | tracing.SYS_ioctl_x32),
        (seccomp.BPF_LD_W_ABS, 0, 0, _COMMAND),
        *((seccomp.BPF_JEQ_K, tail - n, 0, command) for n, command in enumerate(commands)),
        (seccomp.BPF_RET_K, 0, 0, seccomp.SECCOMP_RET_ALLOW),
        (seccomp.BPF_RET_K, 0, 0, uapi.SECCOMP_RET_USER_NOTIF),
    ]
    return [uapi.sock_filter(*instruction) for instruction in instructions]


def install() -> int:
    """Put the filter on this thread and on all that come of it; returns the listener, which is closed on exec.

    Without CAP_SYS_ADMIN this process and its children can gain no rights by exec any more (no_new_privs).

    Raises:
        KernelError: a filter with a listener is there already, or the kernel cannot do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    instructions = program()
    array = (uapi.sock_filter * len(instructions))(*instructions)
    fprog = uapi.sock_fprog(len(instructions), ctypes.addressof(array))
    flags = uapi.SECCOMP_FILTER_FLAG_NEW_LISTENER | uapi.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV

    def put_on() -> int:
        result: int = libc.syscall(tracing.SYS_seccomp, seccomp.SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog))
        return result

    fd = put_on()
    if fd < 0 and ctypes.get_errno() == errno.EACCES:  # no CAP_SYS_ADMIN here
        libc.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        fd = put_on()
    if fd < 0:
        remedies = {
            errno.EBUSY: "start it outside what has the one listener: this container, or another offmap wrap",
            errno.EINVAL: "use Linux 5.19 or newer",
        }
        number = ctypes.get_errno()
        raise KernelError("seccomp(SECCOMP_SET_MODE_FILTER)", number, remedies.get(number, ""))
    os.set_inheritable(fd, False)
    return fd
