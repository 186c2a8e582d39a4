"""The start of a wrapped VMM: it takes the place of this process, so that its parent sees nothing but the VMM."""

import _socket  # `socket` takes as long to import as all of this
import array
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import offmap
from offmap.errors import OffmapError
from offmap.log import ERROR, Logger
from offmap.memory.backend import parse_backend
from offmap.uapi import seccomp_notify
from offmap.wrap import filter as call_filter
from offmap.wrap.policy import Policy

_log = Logger("offmap.cli.wrap")


def run(argv: Sequence[str], memory: str, policy: Policy, *, verbose: bool, as_json: bool) -> NoReturn:
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
    words = [*parse_backend(memory).placed_from(), *policy.words()]
    ours, theirs = _socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _supervise(ours, _command(ours.fileno(), verbose=verbose, as_json=as_json, words=words))
    os.waitpid(pid, 0)
    ours.close()
    supervisor = theirs.recv(16)
    if not supervisor:
        raise OffmapError("the supervisor could not start", "see its message above")
    # For Yama, where it is: the supervisor may trace us, though it is no child of ours.
    ctypes.CDLL(None).prctl(seccomp_notify.PR_SET_PTRACER, ctypes.c_ulong(int(supervisor)), 0, 0, 0)
    listener = call_filter.install()
    theirs.sendmsg([b"l"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [listener]))])
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


def _command(fd: int, *, verbose: bool, as_json: bool, words: Sequence[str]) -> list[str]:
    """The command line of a supervisor (``offmap.wrap.supervise.main``).

    Args:
        fd: the socket that the listener comes by.
        words: of the memory's source, then the policy's.
    """
    folder = os.path.dirname(os.path.dirname(os.path.abspath(offmap.__file__)))  # noqa: PTH100, PTH120
    program = "import sys; sys.path.append(sys.argv[1]); from offmap.wrap.supervise import main; main(sys.argv[3:])"
    options = ["-I", "-S"]  # none of the user's modules, nor of the site's
    if sys.dont_write_bytecode:
        options += ["-B"]
    if sys.pycache_prefix is not None:
        options += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    how = ["verbose" if verbose else "quiet", "json" if as_json else "text"]
    return [sys.executable, *options, "-c", program, folder, "offmap wrap", str(fd), *how, *words]


def _supervise(ours: _socket.socket, command: list[str]) -> NoReturn:
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
        os.set_inheritable(ours.fileno(), True)
        os.chdir("/")
        os.execv(sys.executable, command)
    except BaseException as error:
        _log.log(ERROR, "the supervisor failed: %s", error, error=error)
    finally:
        os._exit(1)
