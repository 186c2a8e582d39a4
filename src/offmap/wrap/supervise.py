"""The supervisor's own program. It imports as little as it can: there is one for each wrapped VMM."""

import _socket  # `socket` takes 0.3 MiB more
import array
import gc
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing

from offmap import log
from offmap.wrap.listener import Listener
from offmap.wrap.policy import Policy
from offmap.wrap.source import source_from
from offmap.wrap.supervisor import Supervisor

_LEVELS = {log.DEBUG: "debug", log.INFO: "info", log.WARNING: "warning", log.ERROR: "error"}


def main(words: Sequence[str]) -> None:
    """Serve the VMM that sends its listener, until it has ended.

    Args:
        words: of `command`, from its socket on.
    """
    fd, verbose, log_format, kind, value, *policy = words
    log.set_up_with(None, log.DEBUG if verbose == "verbose" else log.INFO)
    log.forward_to(_lines(log_format == "json"))
    status = 1
    try:
        with closing(_socket.socket(fileno=int(fd))) as vmm:
            source = source_from((kind, value))
            _, control, _, _ = vmm.recvmsg(1, _socket.CMSG_SPACE(4))
            if control:
                listener = Listener(array.array("i", control[0][2])[0])
                vmm.send(b"r")
        if control:
            gc.freeze()
            Supervisor(listener, source, Policy.from_words(policy)).serve()
        status = 0
    except BaseException as error:
        log.Logger("offmap.cli.wrap").log(log.ERROR, "the supervisor failed: %s", error, error=error)
    finally:
        os._exit(status)


def command(folder: str, fd: int, *, verbose: bool, as_json: bool, words: Sequence[str]) -> list[str]:
    """The command line of a supervisor.

    Args:
        folder: where the package is.
        fd: the socket that the listener comes by.
        words: of the memory's source, then the policy's.
    """
    program = "import sys; sys.path.append(sys.argv[1]); from offmap.wrap.supervise import main; main(sys.argv[3:])"
    options = ["-I", "-S"]  # none of the user's modules, nor of the site's
    if sys.dont_write_bytecode:
        options += ["-B"]
    if sys.pycache_prefix is not None:
        options += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    how = ["verbose" if verbose else "quiet", "json" if as_json else "text"]
    return [sys.executable, *options, "-c", program, folder, "offmap wrap", str(fd), *how, *words]


def _lines(as_json: bool) -> log.Sink:
    """Log to standard error as `offmap wrap` itself does, without the modules that this takes there."""

    def write(level: int, logger: str, message: str) -> None:
        line = f"offmap wrap: {message}"
        if as_json:
            import json

            line = json.dumps(log.json_fields(time.time(), _LEVELS[level], logger, message))
        try:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except OSError:
            pass  # its reader has gone; the VMM goes on

    return write
