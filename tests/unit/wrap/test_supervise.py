"""What the supervisor's own process says, and to whom."""

import fcntl
import os
import subprocess
import sys

SAY = """
from offmap.wrap import supervise
supervise._PATIENCE = 0
supervise._lines(False)(40, "offmap.cli.wrap", "refused")
print("and goes on")
"""


def say(errors: int) -> None:
    done = subprocess.run([sys.executable, "-c", SAY], stdout=subprocess.PIPE, stderr=errors, check=True)
    assert done.stdout == b"and goes on\n"


def test_a_pipe_that_nobody_reads_does_not_stop_it() -> None:
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    say(write)
    assert os.read(read, size) == b"offmap wrap: refused\n"
    os.write(write, bytes(size))
    say(write)
    assert os.read(read, 2 * size) == bytes(size)
    os.close(read)
    say(write)
    os.close(write)
