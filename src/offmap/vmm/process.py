"""A VM's process, as the program that started it has it.

It is a fresh interpreter: nothing of the program is in it but what it is handed. So the filter of its sandbox falls on
nobody else, and a guest that takes it over finds no secret of the program's. The kernel ends it when the program ends.
"""

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import offmap
from offmap.errors import KernelError, OffmapError
from offmap.log import Logger
from offmap.owned import Owned
from offmap.units import printable
from offmap.vmm.records import MOST, FromVm, ToVm, decode_from_vm, encode

_log = Logger("offmap.vmm.process")
_GRACE = 60.0  # seconds that giving the memory back may take; a process that a guest has taken over may never end
_LONGEST_LINE = 4096
_KEPT_LINES = 2
_ENVIRONMENT = {"PATH", "HOME", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
_PREFIXES = ("LC_", "PYTHON", "XDG_", "OFFMAP_")
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from importlib import import_module; "
    "module, _, name = sys.argv.pop(1).partition(':'); getattr(import_module(module), name)()"
)


class VmProcess(Owned):
    """The process of one VM, and the thread that hears it.

    The thread starts the process, as the kernel ends it with the thread that did (PR_SET_PDEATHSIG).

    Args:
        entry: ``module:function`` that runs in it (served.py).
        order: what it is to do; goes there by pickle, which is safe in this direction only.
        heard: takes each record of it, on the thread.
        ended: called on the thread once the process and its broker have ended, with what was wrong if something was.
        fds: descriptors that `order` names by their numbers.

    Raises:
        OffmapError: it cannot be started.
    """

    def __init__(
        self,
        entry: str,
        order: object,
        heard: Callable[[FromVm], None],
        ended: Callable[[OffmapError | None], None],
        fds: Sequence[int] = (),
    ) -> None:
        self._heard = heard
        self._ended = ended
        try:
            pickled = pickle.dumps(order)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            what = "this machine's configuration cannot be handed to a process of its own"
            raise OffmapError(what, "leave out what is a function or an open file", why=str(error)) from None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._failed: OSError | None = None
        started = threading.Event()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = entry, pickled, theirs, fds, started
        self._thread = threading.Thread(target=self._live, args=arguments, name="offmap-vm", daemon=True)
        self._thread.start()
        started.wait()
        if self._failed is not None:
            self._thread.join()
            self._socket.close()
            raise KernelError("starting the process of a VM", self._failed)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def on_its_thread(self) -> bool:
        """Whether the caller is the thread that hears the process."""
        return threading.current_thread() is self._thread

    def send(self, record: ToVm) -> bool:
        """Send it a record. Never waits: returns False if it has ended, or does not read."""
        try:
            self._socket.send(encode(record), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _live(
        self, entry: str, pickled: bytes, theirs: socket.socket, fds: Sequence[int], started: threading.Event
    ) -> None:
        arguments = [str(Path(offmap.__file__).parents[1]), entry, str(theirs.fileno()), str(os.getpid())]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno(), *fds],
                    start_new_session=True,  # a Ctrl-C is for the program
                    # Programs are often handed their secrets there.
                    env={k: v for k, v in os.environ.items() if k in _ENVIRONMENT or k.startswith(_PREFIXES)},
                )
            except OSError as error:
                self._failed = error
                return
            finally:
                started.set()
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        process = self._process
        try:
            assert process.stdin is not None
            with contextlib.suppress(OSError), process.stdin:
                process.stdin.write(pickled)
            self._hear(process, lines)
        finally:
            if process.poll() is None and not self._closing:
                process.kill()  # a callback of the program's has failed, or what it said was no record
            with process:
                self._drain(process, lines)
            self._ended(self._why(process, lines))

    def _hear(self, process: subprocess.Popen[bytes], lines: deque[str]) -> None:
        """Take records and lines until it ends."""
        assert process.stderr is not None
        errors = process.stderr.fileno()
        poll = select.poll()
        for fd in (self._socket.fileno(), errors):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._socket.fileno() in ready:  # first: it may have ended since it said why
                try:
                    data = self._socket.recv(MOST + 1)
                except ConnectionError:  # it ended without having read all
                    data = b""
                if not data:
                    poll.unregister(self._socket.fileno())
                    continue
                try:
                    record = decode_from_vm(data)
                except (msgspec.MsgspecError, RecursionError) as error:
                    lines.append(f"it said what is no record: {printable(str(error))}")
                    return
                self._heard(record)
            elif errors in ready and not self._read_lines(errors, lines):
                return  # its broker has ended as well

    def _drain(self, process: subprocess.Popen[bytes], lines: deque[str]) -> None:
        """Wait until it and its broker have ended: the memory is given back then."""
        assert process.stderr is not None
        while self._read_lines(process.stderr.fileno(), lines):
            pass

    @staticmethod
    def _read_lines(fd: int, lines: deque[str]) -> bool:
        data = os.read(fd, _LONGEST_LINE)
        for line in data.decode(errors="replace").splitlines():
            if text := printable(line):
                lines.append(text)
                _log.info("%s", text)
        return bool(data)

    def _why(self, process: subprocess.Popen[bytes], lines: Sequence[str]) -> OffmapError | None:
        status = process.returncode
        if status == 0 or self._closing:
            return None
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return OffmapError(f"the VM's process {how}", why="; ".join(lines))

    def close(self) -> None:
        """End it, and wait until it has given back what it had."""
        if not self._closing:
            self._closing = True
            process = self._process
            assert process is not None
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)  # it may wait for a word
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        if not self.on_its_thread:
            self._thread.join()
            self._socket.close()
