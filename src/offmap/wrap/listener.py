"""The listener of a seccomp filter: the system calls that wait for an answer."""

import ctypes
import errno
import os
from fcntl import ioctl

from offmap.errors import KernelError
from offmap.owned import Owned
from offmap.uapi import ptrace as tracing
from offmap.uapi import seccomp_notify as uapi
from offmap.uapi.seccomp import AUDIT_ARCH_X86_64

_RESTART = tracing.ERESTARTSYS


class CallGone(Exception):  # a control flow between these modules; no user meets it
    """The call does not wait any more: its thread was killed, or a signal came before the call was received."""


class Call:
    """An ioctl that waits.

    Attributes:
        id: of the notification.
        tid: its thread, in our PID namespace.
        command: which ioctl.
        fd: on which file.
        argument: the address of its structure.
        native: it was called by the ABI of x86-64.
    """

    def __init__(self, notif: uapi.seccomp_notif) -> None:
        data = notif.data
        self.id = notif.id
        self.tid = notif.pid
        self.command = data.args[1] & 0xFFFFFFFF
        self.fd = data.args[0] & 0xFFFFFFFF
        self.argument = data.args[2]
        self.native = data.arch == AUDIT_ARCH_X86_64 and data.nr == tracing.SYS_ioctl


class Listener(Owned):
    """Receives calls one at a time and answers them. Poll `fd`: POLLIN for a call, POLLHUP when nobody can call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def receive(self) -> Call:
        """Take the next call; waits for one.

        From now on only a fatal signal ends its waiting.

        Raises:
            CallGone: it went away meanwhile.
        """
        notif = uapi.seccomp_notif()
        self._call("SECCOMP_IOCTL_NOTIF_RECV", uapi.SECCOMP_IOCTL_NOTIF_RECV, notif)
        return Call(notif)

    def check(self, call: Call) -> None:
        """Check that the call still waits: only then is its thread id still that thread's.

        Raises:
            CallGone: it does not.
        """
        self._call("SECCOMP_IOCTL_NOTIF_ID_VALID", uapi.SECCOMP_IOCTL_NOTIF_ID_VALID, ctypes.c_uint64(call.id))

    def give_file(self, call: Call, fd: int) -> int:
        """Open our `fd` in the caller's process too; returns its number there. It is closed on exec.

        Raises:
            CallGone: the call does not wait any more.
            KernelError: the process may open no more files.
        """
        request = uapi.seccomp_notif_addfd(call.id, 0, fd, 0, os.O_CLOEXEC)
        return self._call("SECCOMP_IOCTL_NOTIF_ADDFD", uapi.SECCOMP_IOCTL_NOTIF_ADDFD, request)

    def let_run(self, call: Call) -> None:
        """Have the kernel run the call. Raises CallGone."""
        self._send(call, 0, uapi.SECCOMP_USER_NOTIF_FLAG_CONTINUE)

    def fail(self, call: Call, error: int) -> None:
        """End the call with this errno. Raises CallGone."""
        self._send(call, -error, 0)

    def interrupt(self, call: Call) -> None:
        """End the call as if a signal had come; its thread must have a ptrace stop pending. Raises CallGone."""
        self._send(call, -_RESTART, 0)

    def _send(self, call: Call, error: int, flags: int) -> None:
        response = uapi.seccomp_notif_resp(call.id, 0, error, flags)
        self._call("SECCOMP_IOCTL_NOTIF_SEND", uapi.SECCOMP_IOCTL_NOTIF_SEND, response)

    def _call(self, name: str, request: int, argument: ctypes.Structure | ctypes.c_uint64) -> int:
        while True:
            try:
                result: int = ioctl(self.fd, request, argument)
                return result
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                if error.errno in {errno.ENOENT, errno.EINPROGRESS}:
                    raise CallGone from None
                raise KernelError(name, error) from None
