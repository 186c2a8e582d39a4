"""The start of a wrapped VMM: it takes the place of this process, so that its parent sees nothing but the VMM."""

import array
import ctypes
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import offmap
from offmap.errors import OffmapError
from offmap.log import ERROR, Logger
from offmap.memory.backend import parse_backend
from offmap.uapi import seccomp_notify
from offmap.wrap import filter as call_filter
from offmap.wrap.policy import Policy
from offmap.wrap.supervise import command

_log = Logger("offmap.cli.wrap")


def run(argv: Sequence[str], memory: str, policy: Policy, *, verbose: bool, as_json: bool) -> NoReturn:
    """Start a supervisor, put the filter on this process, and become `argv`.

    Args:
        memory: what is placed, as ``--memory`` names it.
        verbose: the supervisor says what it does, step by step.
        as_json: it does so in JSON, one object a line.

    Raises:
        OffmapError: this cannot be done here; nothing has been started.
    """
    if shutil.which(argv[0]) is None:
        raise OffmapError(f"there is no program {argv[0]}", "name the VMM by its path")
    words = [*parse_backend(memory).placed_from(), *policy.words()]
    folder = os.path.dirname(os.path.dirname(os.path.abspath(offmap.__file__)))  # noqa: PTH100, PTH120
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _supervise(ours, lambda fd: command(folder, fd, verbose=verbose, as_json=as_json, words=words))
    os.waitpid(pid, 0)
    ours.close()
    supervisor = theirs.recv(16)
    if not supervisor:
        raise OffmapError("the supervisor could not start", "see its message above")
    # For Yama, where it is: the supervisor may trace us, though it is no child of ours.
    ctypes.CDLL(None).prctl(seccomp_notify.PR_SET_PTRACER, ctypes.c_ulong(int(supervisor)), 0, 0, 0)
    listener = call_filter.install()
    theirs.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    if theirs.recv(1) != b"r":
        raise OffmapError("the supervisor ended", "see its message above")
    os.close(listener)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and an ignored signal stays so
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], list(argv))
    except OSError as error:
        raise OffmapError(f"cannot run {argv[0]}: {error.strerror}", "name a program") from None


def _supervise(ours: socket.socket, command: Callable[[int], list[str]]) -> NoReturn:
    """Become the supervisor: a small program in its own session, and no child of the VMM."""
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # they are for the VMM
        ours.send(str(os.getpid()).encode())
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        ours.set_inheritable(True)
        os.chdir("/")
        os.execv(sys.executable, command(ours.fileno()))
    except BaseException as error:
        _log.log(ERROR, "the supervisor failed: %s", error, error=error)
    finally:
        os._exit(1)
