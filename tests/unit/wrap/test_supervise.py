"""What the supervisor's own process says, and to whom."""

import fcntl
import os
import subprocess
import sys

SAY = """
from offmap.wrap import supervise
supervise._PATIENCE = 0
supervise._lines(False)(40, "offmap.cli.wrap", "refused\\x1b")
print("and goes on")
"""

SERVE = """
import _socket, ctypes, os
from offmap.wrap import supervise

class Supervisor:
    def __init__(self, listener, *_):
        print(os.get_inheritable(listener.fd), flush=True)

    def serve(self):
        pass

supervise.Supervisor = Supervisor
ours, theirs = _socket.socketpair()
theirs.sendmsg([b"l"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, bytes(ctypes.c_int(1)))])
supervise.serve(ours, None, None, verbose=False, as_json=False)
"""


def say(errors: int) -> None:
    done = subprocess.run([sys.executable, "-c", SAY], stdout=subprocess.PIPE, stderr=errors, check=True)
    assert done.stdout == b"and goes on\n"


def test_a_pipe_that_nobody_reads_does_not_stop_it() -> None:
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    say(write)
    assert os.read(read, size) == b"offmap wrap: refused?\n"
    os.write(write, bytes(size))
    say(write)
    assert os.read(read, 2 * size) == bytes(size)
    os.close(read)
    say(write)
    os.close(write)


def test_an_audit_does_not_get_the_listener() -> None:
    done = subprocess.run([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"False\n"
