"""The supervisor serves on, whatever becomes of one call."""

import errno
import os
from typing import cast

from offmap.uapi import kvm, seccomp
from offmap.uapi import ptrace as tracing
from offmap.uapi.seccomp_notify import seccomp_notif
from offmap.wrap.listener import Call, Listener
from offmap.wrap.policy import Policy
from offmap.wrap.source import DeviceFiles
from offmap.wrap.supervisor import Supervisor


class OneCall:
    """Has a call of this process, which cannot be looked at."""

    fd = -1

    def __init__(self) -> None:
        self.failed: list[int] = []

    def receive(self) -> Call:
        notified = seccomp_notif()
        notified.pid = os.getpid()
        notified.data.nr, notified.data.arch = tracing.SYS_ioctl, seccomp.AUDIT_ARCH_X86_64
        notified.data.args[1] = kvm.KVM_CREATE_VCPU
        return Call(notified)

    def check(self, call: Call) -> None:
        raise OSError(errno.EMFILE, "no more files")

    def fail(self, call: Call, error: int) -> None:
        self.failed.append(error)


def test_a_call_that_cannot_be_served_is_refused() -> None:
    listener = OneCall()
    Supervisor(cast("Listener", listener), DeviceFiles(0), Policy())._serve_one()
    assert listener.failed == [errno.EPERM]
