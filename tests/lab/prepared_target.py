"""Programs run one after the other by a process that has imported what they import, in a disposable host.

Each line of its input is JSON: ``[MODULE, ARGUMENTS…]``, to be run as ``python -m MODULE ARGUMENTS…`` would. Each is a
process of its own, forked off, without input. Its answer is a line of JSON: status, output and errors.

A program may have another one run, which is no child of its own and prints where it prints: it writes the same JSON to
one descriptor, and reads from another one byte, its status. VARIABLE in its environment has both.
"""

import json
import os
import runpy
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

VARIABLE = "OFFMAP_PREPARED"


def prepare(module: str, arguments: Sequence[str]) -> None:
    """Import what a program will import."""
    names = ["offmap.cli.entry", f"offmap.cli.{arguments[0]}"] if module == "offmap" else [module]
    if module == "offmap" and arguments[0] == "audit":
        names += ["offmap.audit.audit", *(["drgn"] if "--oracle" in arguments else [])]
    for name in names:
        with suppress(ImportError):  # what is wrong with it, it says itself
            import_module(name)


def status_of(module: str, arguments: Sequence[str]) -> int:
    """Run a program in this process."""
    sys.argv = ["", *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(module: str, arguments: Sequence[str], fds: Sequence[int]) -> int:
    """Start a program with these as its descriptors from 1 on; its process."""
    prepare(module, arguments)
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        high = [os.dup(fd) for fd in fds]  # behind all that they become
        for place, fd in enumerate(high, 1):
            os.dup2(fd, place)
        os.closerange(1 + len(fds), 1 << 10)
        if len(fds) > 2:
            os.environ[VARIABLE] = "3 4"
        status = status_of(module, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The status of a program, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(module: str, *arguments: str) -> tuple[int, str, str]:
    """Run a program; its status, its output and its errors."""
    files = [os.memfd_create(name) for name in ("output", "errors")]
    (asked, ask), (answer, say) = os.pipe(), os.pipe()
    child = start(module, arguments, (*files, ask, answer))
    ended = os.pidfd_open(child)
    while asked in select.select([asked, ended], [], [])[0]:
        other, *words = json.loads(os.read(asked, 1 << 16))
        os.write(say, bytes([wait(start(other, words, files)) & 0xFF]))
    status = wait(child)
    output, errors = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in files)
    for fd in (*files, asked, ask, answer, say, ended):
        os.close(fd)
    return status, output, errors


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of what was imported before
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(*json.loads(line))) + "\n")
        sys.stdout.flush()
