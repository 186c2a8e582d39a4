"""A process that shares its address space with another one (CLONE_VM), until it runs a program of its own."""

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

VA = 0x2000_0000_0000  # where nothing is by itself

# posix_spawn(3) makes such a child; it opens the FIFO, which waits for a writer, before it runs its program.
_PROGRAM = f"""
import ctypes, mmap, os, sys
def page():
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    assert libc.mmap(ctypes.c_void_p({VA}), ctypes.c_size_t(4096), 3, flags, -1, ctypes.c_long(0)) == {VA}
def ready():
    os.write(1, b"x")
page()
"""
_MAKER = f"""{_PROGRAM}
ctypes.memset({VA}, 1, 1)
fifo, program = sys.argv[1:]
ready()
wait = [(os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)]
os.posix_spawn(sys.executable, [sys.executable, "-c", program], {{}}, file_actions=wait)
sys.stdin.read()
"""
_CHILD = f"{_PROGRAM}ready()\nsys.stdin.read()\n"


@contextmanager
def process_that_shares_memory(folder: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """Its PID, and what makes it run another program while the first address space stays.

    Both have a page at VA. In the first one it is populated.
    """
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-c", _MAKER, str(fifo), _CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        ready = maker.stdout.fileno()
        kept = [os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)]
        try:
            assert os.read(ready, 1) == b"x"
            yield _child_of(maker.pid), lambda: _let_run(fifo, kept, ready)
        finally:
            maker.kill()
            for fd in kept:
                os.close(fd)


def _let_run(fifo: Path, kept: list[int], ready: int) -> None:
    kept.append(os.open(fifo, os.O_WRONLY))
    assert select.select([ready], [], [], 30)[0] and os.read(ready, 1) == b"x"


def _child_of(pid: int) -> int:
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
