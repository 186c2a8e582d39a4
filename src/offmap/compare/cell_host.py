"""A disposable host in which cells are measured: one cell, or several in turn if their questions allow it.

The first cell of a host pays for its start, for Python's and for reading the kernel's types; the next ones do not.
"""

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from offmap.compare.job import Job
from offmap.compare.transcript import Transcript
from offmap.errors import BackendRefused
from offmap.kmod.lab_build import load
from offmap.lab.command import LabCommand
from offmap.lab.errors import LabTimeout
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.owned import Owned
from offmap.patience import scaled

FOLDER = "offmap-cell-"
"""How the names of the cells' temporary folders begin."""

_MODULE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class HostKind:
    """What a cell needs its host to be; cells that need the same can be measured in the same host.

    Attributes:
        kernel: what it runs.
        code: digest of offmap's code, which a host reads only once.
        program: Python's arguments for the measuring program.
        memory, cmdline, accel: as `LabHost.start` takes them.
    """

    kernel: HostKernel
    code: str
    program: tuple[str, ...]
    memory: str
    cmdline: str
    accel: str


class CellHost(Owned):
    """A host that runs, and the measuring program in it, which is started for the first cell.

    Args:
        host: ends with it.
        folder: the host's output folder, for the cells' files; removed with it.
        program: Python's arguments for the measuring program, which takes a job from each line of its input.
    """

    def __init__(self, host: LabHost, folder: "tempfile.TemporaryDirectory[str]", program: tuple[str, ...]) -> None:
        self.host = host
        self.folder = Path(folder.name)
        self._folder = folder
        self._argv = [sys.executable, *program]
        self._loaded: set[Path] = set()
        self._program: LabCommand | None = None
        self._transcript: Transcript | None = None
        self._errors = bytearray()
        self._changed = threading.Event()
        self._closed = False

    @classmethod
    def start(cls, kind: HostKind, seconds: float, on_launch: Callable[[LabHost], None], *, fresh: bool) -> "CellHost":
        """Start a host.

        Args:
            seconds: that its start may take.
            on_launch, fresh: as `LabHost.start` takes them.

        Raises:
            LabError: it does not start.
        """
        # guest RAM, files to read past the page cache: a disk, where /tmp is one
        folder = tempfile.TemporaryDirectory(prefix=FOLDER)
        try:
            host = LabHost.start(
                kind.kernel,
                memory=kind.memory,
                cmdline=kind.cmdline,
                out=Path(folder.name),
                accel=kind.accel,
                timeout=seconds,
                on_launch=on_launch,
                fresh=fresh,
            )
        except BaseException:
            folder.cleanup()
            raise
        return cls(host, folder, kind.program)

    @property
    def is_new(self) -> bool:
        """Whether no cell has been measured in it yet."""
        return self._program is None

    @property
    def usable(self) -> bool:
        """Whether another cell can be measured in it."""
        return not self._closed and (self._program is None or not self._program.ended)

    def load(self, module: Path) -> None:
        """Load a kernel module, unless that has been done.

        Raises:
            BackendRefused: the host's kernel does not take it.
        """
        if module in self._loaded:
            return
        if why := load(self.host, module, scaled(_MODULE_SECONDS)):
            raise BackendRefused("this host kernel does not load the offmap module", why, "see its log: dmesg")
        self._loaded.add(module)

    def measure(self, job: Job, transcript: Transcript, seconds: float, *, last: bool) -> tuple[int, str]:
        """Have a cell measured; return the measuring program's exit status and its standard error.

        Args:
            transcript: gets what the program says.
            seconds: that this may take.
            last: let the program end, and wait for that. Otherwise it is done when it has said the outcome.

        Raises:
            LabPanic, LabEnded: the host did not live to the end of it.
            LabTimeout: the time was up.
        """
        self._transcript = transcript
        self._errors.clear()
        self._changed.clear()
        if self._program is None:
            self._program = self.host.popen(self._argv, stdout=self._heard, stderr=self._errors.extend, keep_stdin=True)
            self._program.when_over(self._changed.set)
        program = self._program
        if program.ended:
            self._changed.set()
        program.write(msgspec.json.encode(job) + b"\n")
        if last:
            program.close_stdin()
            return program.wait(seconds), self._complaint()
        if not self._changed.wait(seconds):
            raise LabTimeout(f"the measuring program was not done after {seconds:g} s ({self.host.doing()})")
        if program.ended:
            return program.wait(), self._complaint()
        return 0, self._complaint()

    def close(self) -> None:
        """End the host."""
        self._closed = True
        self.host.close()
        self._folder.cleanup()

    def _heard(self, data: bytes) -> None:
        if self._transcript is not None:
            self._transcript.feed(data)
            if self._transcript.said().outcome is not None:
                self._changed.set()

    def _complaint(self) -> str:
        return self._errors.decode(errors="replace")


class CellHosts(Owned):
    """The hosts of a comparison whose cells may share them. Those that no cell uses now wait here for the next one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[HostKind, list[CellHost]] = {}

    @contextmanager
    def one(self, kind: HostKind, start: Callable[[], CellHost], *, new: bool = False) -> Iterator[CellHost]:
        """A host of a kind for one cell. It is closed if an exception ends that cell.

        Args:
            start: makes one, if none waits.
            new: it must be one in which no cell has been measured.
        """
        host = (None if new else self._waiting(kind)) or start()
        try:
            yield host
        except BaseException:
            host.close()
            raise
        with self._lock:
            self._idle.setdefault(kind, []).append(host)

    def _waiting(self, kind: HostKind) -> CellHost | None:
        with self._lock:
            hosts = self._idle.get(kind, [])
            while hosts:
                host = hosts.pop()
                if host.usable:
                    return host
                host.close()
        return None

    def close(self) -> None:
        """End the hosts that wait."""
        with self._lock:
            hosts = [host for waiting in self._idle.values() for host in waiting]
            self._idle.clear()
        for host in hosts:
            host.close()
