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
        words: what ``start`` says: the socket, how to log, where memory is from, and the policy.
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
        if control:
            gc.freeze()
            Supervisor(listener, source, Policy.from_words(policy)).serve()
        status = 0
    except BaseException as error:
        log.Logger("offmap.cli.wrap").log(log.ERROR, "the supervisor failed: %s", error, error=error)
    finally:
        os._exit(status)


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
