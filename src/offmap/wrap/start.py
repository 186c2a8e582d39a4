"""The start of a wrapped VMM: it takes the place of this process, so that its parent sees nothing but the VMM.

It imports next to nothing. The VMM waits for that, and the supervisor is a copy of this process.
"""

import _socket  # `socket` takes as long to import as all of this
import ctypes
import os

from offmap.errors import OffmapError
from offmap.log import ERROR, Logger
from offmap.uapi import seccomp_notify
from offmap.wrap import filter as call_filter
from offmap.wrap import signals as signal
from offmap.wrap.policy import Policy
from offmap.wrap.source import Source, source_for

TYPE_CHECKING = False  # importing `typing` takes a fifth of the start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_log = Logger("offmap.cli.wrap")


def run(argv: "Sequence[str]", memory: str, policy: Policy, *, verbose: bool, as_json: bool) -> "NoReturn":
    """Start a supervisor, put the filter on this process, and become `argv`.

    The supervisor is not waited for: while it begins, so does the VMM, whose calls wait for it. If it fails, the kernel
    refuses these calls, and the VMM has no guest.

    Args:
        memory: what is placed, as ``--memory`` names it.
        verbose: the supervisor says what it does, step by step.
        as_json: it does so in JSON, one object a line.

    Raises:
        OffmapError: this cannot be done here; nothing has been started.
    """
    if not _is_program(argv[0]):
        raise OffmapError(f"there is no program {argv[0]}", "name the VMM by its path")
    source = source_for(memory)
    source.check()  # refused now, and not when the guest begins
    ours, theirs = _socket.socketpair()
    pid = os.fork()
    if pid == 0:
        theirs.close()
        _supervise(ours, source, policy, verbose=verbose, as_json=as_json)
    os.waitpid(pid, 0)
    ours.close()
    supervisor = theirs.recv(16)
    if not supervisor:
        raise OffmapError("the supervisor could not start", "see its message above")
    # For Yama, where it is: the supervisor may trace us, though it is no child of ours.
    ctypes.CDLL(None).prctl(seccomp_notify.PR_SET_PTRACER, ctypes.c_ulong(int(supervisor)), 0, 0, 0)
    listener = call_filter.install()
    theirs.sendmsg([b"l"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, bytes(ctypes.c_int(listener)))])
    os.close(listener)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and an ignored signal stays so
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], list(argv))
    except OSError as error:
        raise OffmapError(f"cannot run {argv[0]}: {error.strerror}", "name a program") from None


def _is_program(name: str) -> bool:
    """Whether execvp(3) would find it. (`shutil` would bring what unpacks archives.)"""
    folders = [""] if "/" in name else os.get_exec_path()
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in folders)  # noqa: PTH118


def _supervise(vmm: _socket.socket, source: Source, policy: Policy, *, verbose: bool, as_json: bool) -> "NoReturn":
    """Become the supervisor: in its own session, no child of the VMM, with none of the VMM's files but its errors."""
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # they are for the VMM
        vmm.send(str(os.getpid()).encode())
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.closerange(3, vmm.fileno())
        os.closerange(vmm.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        from offmap.wrap.supervise import serve

        serve(vmm, source, policy, verbose=verbose, as_json=as_json)
    except BaseException as error:
        _log.log(ERROR, "the supervisor failed: %s", error, error=error)
    finally:
        os._exit(1)
