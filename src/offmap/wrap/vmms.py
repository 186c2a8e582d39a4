"""The processes under a wrapper whose guests have hidden memory, and when each is to be audited."""

import os
import time

from offmap.wrap import signals as signal
from offmap.wrap.address_space import Area
from offmap.wrap.clock import GuestRam, Waiting
from offmap.wrap.source import Piece

_SETTLED = 2.0  # seconds without a call, after which a VMM has settled
_NEVER = 60.0  # seconds after which nobody waits for a guest to begin any more
_VM_LINK = "anon_inode:kvm-vm"  # of its file in /proc/PID/fd
_GUEST_TIME = 43 - 3  # guest_time, of the fields behind the command's name
_LATEST = 10.0  # seconds: it is audited though it has not settled


def guest_ticks(pid: int) -> int:
    """How long virtual processors of a process have run, in hundredths of a second (proc(5)); 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib costs half a megabyte
            return int(file.read().rpartition(b")")[2].split()[_GUEST_TIME])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def program_of(pid: int) -> bytes:
    """What differs when a process has become another program by execve(2), whose memory is another: its auxv."""
    try:
        with open(f"/proc/{pid}/auxv", "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:  # it has just ended
        return b""


def _is_vm(pid: int, fd: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}") == _VM_LINK  # noqa: PTH115 - pathlib costs half a megabyte
    except OSError as error:
        return not isinstance(error, FileNotFoundError)  # or it is not ours to see


class Vmm:
    """One process that runs one program.

    Attributes:
        pid: its number, which is its own while ``alive``.
        ram: what was placed, until the first audit.
        program: of ``program_of``.
        waiting: its guest, if that waits to be told of its clock.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        self._first: float | None = None  # when the first call came that no audit has seen
        self._due = 0.0
        self.ram = GuestRam()
        self.program = program_of(pid)
        self._guarded: list[tuple[int, int]] = []  # addresses [start, end)
        self.waiting: Waiting | None = None
        self._ticks = 0
        self._patience = 0.0

    def placed(self, area: Area, piece: Piece) -> None:
        """Hidden memory that guards itself is mapped there now."""
        self.ram.add(area.start, piece)
        self._guarded.append((area.start, area.end))

    def guards(self, area: Area) -> bool:
        """Whether a mapping of hidden memory guards itself. Before Linux 6.10 the kernel does not say so."""
        return "sl" in area.flags or any(start <= area.start and area.end <= end for start, end in self._guarded)

    def makes_vm(self) -> None:
        """It is about to make a VM, which may get the descriptor of one that it has closed."""
        self.ram.forget({fd for fd in self.ram.vms() if not _is_vm(self.pid, fd)})
        if self.waiting is not None and not self.ram.vms():
            self.waiting.go_on()
            self.waiting = None

    def called(self) -> None:
        """It has changed a memory slot or a vCPU's CPUID."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        self._due = min(now + _SETTLED, self._first + _LATEST)

    def seconds_left(self) -> float | None:
        """The time until its audit; 0 if it is due, None if it is not to be audited."""
        return None if self._first is None else max(0.0, self._due - time.monotonic())

    def audit_begins(self) -> None:
        """An audit sees all that has happened until now."""
        self._first = None
        self.ram.close()

    def waits(self, waiting: Waiting) -> None:
        """Its guest waits at its first instruction."""
        self.waiting = waiting
        self._patience = time.monotonic() + _NEVER
        self._ticks = guest_ticks(self.pid)

    def guest_runs(self) -> bool:
        """Whether its guest has run since then; or so much time has passed that it may never run."""
        return guest_ticks(self.pid) > self._ticks or time.monotonic() > self._patience

    def alive(self) -> bool:
        """Whether the process is there."""
        return self._signal(0)

    def kill(self) -> None:
        """End it, if it is there."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Forget the process, which does not count as alive from now on."""
        self.ram.close()
        os.close(self._fd)
        self._fd = -1

    def _signal(self, number: int) -> bool:
        if self._fd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # it has changed its user
            return True
        return True


class Vmms:
    """All of them, by PID."""

    def __init__(self) -> None:
        self._all: dict[int, Vmm] = {}

    def of(self, pid: int) -> Vmm:
        """The process that waits for an answer. Its PID cannot be reused meanwhile."""
        known = self._all.get(pid)
        if known is not None and not (known.alive() and known.program == program_of(pid)):
            self._all.pop(pid).close()
            known = None
        if known is None:
            known = self._all[pid] = Vmm(pid)
        return known

    def waiting(self) -> list[Vmm]:
        """Those whose guests wait to be told of their clock."""
        return [vmm for vmm in self._all.values() if vmm.waiting is not None]

    def __contains__(self, pid: int) -> bool:
        return pid in self._all and self._all[pid].alive()

    def next(self) -> tuple[Vmm, float] | None:
        """The one whose audit is due first, and in how many seconds; None: no audit is to be made."""
        for pid in [pid for pid, vmm in self._all.items() if not vmm.alive()]:
            self._all.pop(pid).close()
        waiting = [(left, vmm) for vmm in self._all.values() if (left := vmm.seconds_left()) is not None]
        if not waiting:
            return None
        left, vmm = min(waiting, key=lambda pair: pair[0])
        return vmm, left
