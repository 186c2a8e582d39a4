"""The supervisor's process: a copy of the one that becomes the VMM. It imports as little as it can."""

import _socket  # `socket` takes 0.3 MiB more
import ctypes
import gc
import os
import select
import sys
import time

from offmap import log
from offmap.wrap import signals as signal
from offmap.wrap.listener import Listener
from offmap.wrap.policy import Policy
from offmap.wrap.source import Source
from offmap.wrap.supervisor import Supervisor

_LEVELS = {log.DEBUG: "debug", log.INFO: "info", log.WARNING: "warning", log.ERROR: "error"}
_NAME = b"offmap wrap"
_PR_SET_NAME = 15  # linux/prctl.h
_ERRORS = 2  # standard error
_PATIENCE = 1000  # milliseconds with a reader who lets the pipe fill; a VMM's call may wait for us meanwhile
_ARG_START = 48 - 3  # arg_start and arg_end, of the fields behind the command's name (proc(5))


def serve(vmm: _socket.socket, source: Source, policy: Policy, *, verbose: bool, as_json: bool) -> None:
    """Serve the VMM that sends its listener by this socket, until it has ended; then end this process."""
    _take_name()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # for `stopped`
    log.set_up_with(None, log.DEBUG if verbose else log.INFO)
    log.forward_to(_lines(as_json))
    status = 1
    try:
        # An audit must not have it: while that runs, calls would wait for nobody if this process is killed.
        _, control, _, _ = vmm.recvmsg(1, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
        vmm.close()
        if control:
            listener = Listener(int.from_bytes(control[0][2], sys.byteorder))
            gc.freeze()
            gc.enable()
            Supervisor(listener, source, policy).serve()
        status = 0
    except BaseException as error:
        log.Logger("offmap.cli.wrap").log(log.ERROR, "the supervisor failed: %s", error, error=error)
    finally:
        os._exit(status)


def _take_name() -> None:
    """Have lists of processes show us by our own name: our command line is the VMM's."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - pathlib costs half a megabyte
        fields = file.read().rpartition(b")")[2].split()
    start, end = (int(field) for field in fields[_ARG_START : _ARG_START + 2])
    if end - start > len(_NAME):
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, _NAME, len(_NAME))
    ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)


def _lines(as_json: bool) -> log.Sink:
    """Log to standard error as `offmap wrap` itself does, without the modules that this takes there.

    What nobody reads is lost: a VMM that is exposed has to be ended all the same.
    """

    def write(level: int, logger: str, message: str) -> None:
        from offmap.units import printable  # a VMM's files have the names that it likes

        line = f"offmap wrap: {printable(message)}"
        if as_json:
            import json

            line = json.dumps(log.json_fields(time.time(), _LEVELS[level], logger, message))
        try:
            if errors.poll(_PATIENCE):
                os.write(_ERRORS, f"{line}\n".encode(errors="surrogateescape"))
        except OSError:
            pass  # its reader has gone; the VMM goes on

    errors = select.poll()
    errors.register(_ERRORS, select.POLLOUT)
    return write
