"""Runs the measuring program on this machine's own kernel, without a disposable host."""

import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from offmap.compare.kinds import Vmm, kind_of
from offmap.compare.running import RunningCell
from offmap.compare.spec import CellSpec
from offmap.errors import OffmapError
from offmap.kmod.loaded import loaded_module
from offmap.lab.errors import LabTimeout
from offmap.patience import scaled

TERM_GRACE = 20.0  # seconds: a measuring program that is asked to end gives back memory, huge pages and swap first
_KEPT_LINES = 20


def refusal_here(spec: CellSpec) -> str:
    """Why this cell cannot run on the running kernel; empty if nothing speaks against a try.

    `reserved` needs a boot parameter: its backend refuses by itself, and names the parameter.
    """
    if os.geteuid() != 0:
        return "measuring on the running kernel needs root; run it with sudo"
    kind = kind_of(spec.backend)
    if kind.vmm is Vmm.LIBVIRT:
        return "libvirt is installed in a disposable host only; leave out --native"
    if kind.backend.needs_module and loaded_module() is None:
        return f"{spec.backend} needs the offmap module, which the running kernel has not loaded; offmap module load"
    return ""


def run_here(argv: Sequence[str], feed: Callable[[bytes], None], cell: RunningCell, seconds: float) -> tuple[int, str]:
    """Run `argv` to its end, in a session of its own. No process of that session is left.

    Args:
        feed: takes its standard output.
        seconds: the longest time it may take.

    Returns:
        Its exit status (128 and the number for a signal), and its last lines on standard error.

    Raises:
        LabTimeout: it did not end in time.
        OffmapError: it cannot be started.
    """
    # A kill -9 of this process ends it too (setpriv is in util-linux); its children see the end of their pipes.
    setpriv = shutil.which("setpriv")
    words = [setpriv, "--pdeathsig", "TERM", *argv] if setpriv else list(argv)
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise OffmapError(f"cannot start {argv[0]}: {error.strerror}") from None
    expired = threading.Event()
    ended = threading.Event()

    def kill_all() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        if not ended.wait(scaled(TERM_GRACE)):
            kill_all()

    def expire() -> None:
        expired.set()
        end()

    errors: deque[bytes] = deque(maxlen=_KEPT_LINES)
    timer = threading.Timer(seconds, expire)
    with process:
        listener = threading.Thread(
            target=lambda: errors.extend(process.stderr or ()), name="native-errors", daemon=True
        )
        try:
            timer.start()
            listener.start()
            cell.ends_by(end)
            while process.stdout is not None and (data := os.read(process.stdout.fileno(), 65536)):
                feed(data)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped, its number stays its own
        finally:
            timer.cancel()
            ended.set()
            kill_all()  # also the processes that it left behind
            process.wait()
            listener.join()
    cell.check()
    if expired.is_set():
        raise LabTimeout(f"{argv[-2] if len(argv) > 1 else argv[0]} did not end in {seconds:g} s and was killed")
    status = process.returncode
    return status if status >= 0 else 128 - status, b"".join(errors).decode(errors="replace")
