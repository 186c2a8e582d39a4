"""A process whose threads all stand still while one of its calls is served, and system calls made in its name.

ptrace(2) is used with PTRACE_SEIZE, so the process sees no signal. Its blocking system calls may end with EINTR, as
after any signal. Between two calls nothing is traced.
"""

import ctypes
import errno
import os
import time
from _collections_abc import Callable  # os has it already; collections.abc would bring more

from offmap.errors import KernelError
from offmap.uapi import ptrace as uapi
from offmap.wrap import signals as signal
from offmap.wrap.listener import Call, CallGone, Listener

_OPTIONS = uapi.PTRACE_O_TRACESYSGOOD | uapi.PTRACE_O_EXITKILL  # if we end meanwhile, so does the VMM
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WORD = (1 << 64) - 1
_RED_ZONE = 128  # System V ABI, x86-64: below the stack pointer, and still in use

_FORKS = {str(number).encode() for number in (uapi.SYS_vfork, uapi.SYS_clone, uapi.SYS_clone3)}
_TOLD = {signal.SIGCHLD}  # which tells of a stop
_LOOK_AGAIN = 0.001  # second
_PATIENCE = 10.0  # seconds
_ENDED = {"", "Z", "X"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, tid: int, address: int = 0, data: object = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            raise CallGone
        remedies = {errno.EPERM: "end the debugger that traces it, and see kernel.yama.ptrace_scope (docs/wrap.md)"}
        raise KernelError("ptrace of the VMM", number, remedies.get(number, ""))


def process_of(tid: int) -> int:
    """The PID of a thread's process. Raises CallGone: there is no such thread."""
    try:
        with open(f"/proc/{tid}/status", "rb") as file:  # noqa: PTH123 - pathlib costs half a megabyte
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    raise CallGone


def _state(tid: int) -> str:
    """The state of a thread as proc(5) has it (``Z``: it has ended); empty if there is none."""
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:  # noqa: PTH123
            return chr(file.read().rpartition(b")")[2].split()[0][0])
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _ended(tid: int) -> bool:
    return _state(tid) in _ENDED


def _wait(tid: int, in_vain: Callable[[int], bool] = _ended) -> int:
    """Wait until a traced thread stops or ends; returns its wait status, 0 if it has ended.

    SIGCHLD, if it is blocked, ends each of our sleeps as soon as a thread stops. The end of a process's first thread is
    told neither by that nor by waitpid(2) before those of its others, which may wait for us.

    Args:
        in_vain: asked now and then about this thread: there is nothing to wait for any more; returns 0.
    """
    while True:
        try:
            done, status = os.waitpid(tid, uapi.WALL | os.WNOHANG)
        except ChildProcessError:
            return 0
        if done:
            return status if os.WIFSTOPPED(status) else 0
        if signal.sigtimedwait(_TOLD, _LOOK_AGAIN) is None and in_vain(tid):
            return 0


def _awaits_child(tid: int) -> bool:
    """Whether a thread waits until its child has left their common memory, which no stop ends (CLONE_VFORK)."""
    try:
        with open(f"/proc/{tid}/syscall", "rb") as file:  # noqa: PTH123
            words = file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return _state(tid) == "D" and words[0] in _FORKS


def _threads(pid: int) -> set[int]:
    try:
        return {int(name) for name in os.listdir(f"/proc/{pid}/task")}  # noqa: PTH208
    except (FileNotFoundError, ProcessLookupError):
        return set()


def _share_memory(pid: int, other: int) -> bool:
    """Whether two processes have one address space (clone(2) with CLONE_VM)."""
    if pid == other or not (result := _libc.syscall(uapi.SYS_kcmp, pid, other, uapi.KCMP_VM, 0, 0)):
        return True
    if result < 0 and ctypes.get_errno() == errno.ENOSYS:
        raise KernelError("kcmp of the VMM", errno.ENOSYS, "use a kernel with CONFIG_KCMP")
    return False


class Stopped:
    """A context in which every thread of the caller's address space stands still; at its end all go on.

    The calling thread waits until its call is answered by `let_run`, `interrupt` or `fail`: exactly one of them. Then
    it is in a stop where `inject` works. A call that is not answered by the end fails with EPERM.

    Raises:
        CallGone: the call does not wait any more.
        KernelError: we may not trace the process.

    Attributes:
        pid: the process.
    """

    def __init__(self, listener: Listener, call: Call) -> None:
        self._listener = listener
        self._call = call
        self.pid = process_of(call.tid)
        self._processes: dict[int, bool] = {}  # those that were there, and whether they have this address space
        self._others: dict[int, int] = {}  # threads that stand, and the signal that each was about to get
        self._late: set[int] = set()  # threads that will stand when their child goes on
        self._regs: uapi.user_regs_struct | None = None  # as the answered call left them
        self._mask = ctypes.c_uint64()
        self._result: int | None = None  # what the call is to return; None: it is made again
        self._held = 0

    def __enter__(self) -> "Stopped":
        self._listener.check(self._call)
        self._seize(self._call.tid)
        try:
            while new := self._new_threads():
                for tid in new:
                    self._others[tid] = 0
                    self._seize(tid)
                self._await_stops(new)
            self._listener.check(self._call)
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def let_run(self) -> int:
        """Have the kernel run the call while all others stand still; returns its result, or its negative errno."""
        self._listener.let_run(self._call)
        self._result = self._await_end()
        return self._result

    def interrupt(self) -> None:
        """Take the calling thread out of its call. It makes the call again afterwards, unless `result` is called."""
        self._listener.interrupt(self._call)
        self._await_end()
        self._result = None

    def fail(self, error: int) -> None:
        """End the call with this errno."""
        if self._regs is None:
            self._listener.fail(self._call, error)
            self._await_end()
        self._result = -error

    def inject(self, number: int, *arguments: int) -> int:
        """Make the calling thread do a system call; returns its result, or its negative errno.

        Raises:
            CallGone: the thread was killed, maybe by a seccomp filter of its own that does not allow the call.
        """
        if self._regs is None:
            raise ValueError("the call must be answered first")
        tid = self._call.tid
        regs = uapi.user_regs_struct.from_buffer_copy(self._regs)
        self._at_instruction(regs, number)
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        for name, value in zip(names, arguments + (0,) * (6 - len(arguments)), strict=True):
            setattr(regs, name, value & _WORD)
        _ptrace(uapi.PTRACE_SETREGS, tid, 0, ctypes.byref(regs))
        self._to_syscall_stop()  # its entry
        self._to_syscall_stop()  # its end
        _ptrace(uapi.PTRACE_GETREGS, tid, 0, ctypes.byref(regs))
        return ctypes.c_int64(regs.rax).value

    def room(self, size: int) -> int:
        """The address of `size` bytes below the calling thread's stack that nothing uses."""
        if self._regs is None:
            raise ValueError("the call must be answered first")
        return int(self._regs.rsp - _RED_ZONE - size) & ~63

    # --- its parts ---------------------------------------------------------------------------------------------------

    def _new_threads(self) -> set[int]:
        """The threads of the address space that do not stand still yet, but the calling one."""
        known = {self._call.tid, *self._others}
        for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - self._processes.keys():  # noqa: PTH208
            self._processes[pid] = _share_memory(self.pid, pid)
        return {tid for pid, shares in self._processes.items() if shares for tid in _threads(pid)} - known

    def _seize(self, tid: int) -> None:
        """Have a thread stop soon. Raises CallGone: the calling thread has ended. Others may."""
        try:
            _ptrace(uapi.PTRACE_SEIZE, tid, 0, _OPTIONS)
            _ptrace(uapi.PTRACE_INTERRUPT, tid)
        except CallGone:
            if tid == self._call.tid:
                raise
        except KernelError:
            if not _ended(tid):
                self._others.pop(tid, None)
                raise

    def _await_stops(self, tids: set[int]) -> None:
        """Wait until each of these threads stands, has ended, or waits for a child that stands."""
        for tid in tids:
            status = _wait(tid, self._stands_late)
            if status and not status >> 16:
                self._others[tid] = os.WSTOPSIG(status)  # it gets its signal when it goes on

    def _stands_late(self, tid: int) -> bool:
        if _awaits_child(tid):
            self._late.add(tid)
            return True
        return _ended(tid)

    def _await_end(self) -> int:
        """Wait until the calling thread stops at the end of its call; returns the call's result."""
        tid = self._call.tid
        status = _wait(tid)
        if not status:
            raise CallGone
        if not status >> 16:
            self._held = os.WSTOPSIG(status)  # a signal came first; it is delivered at the end
        regs = uapi.user_regs_struct()
        _ptrace(uapi.PTRACE_GETREGS, tid, 0, ctypes.byref(regs))
        _ptrace(uapi.PTRACE_GETSIGMASK, tid, 8, ctypes.byref(self._mask))
        # No handler may run in the middle of what is injected: signals wait.
        _ptrace(uapi.PTRACE_SETSIGMASK, tid, 8, ctypes.byref(ctypes.c_uint64(_WORD)))
        self._regs = regs
        return ctypes.c_int64(regs.rax).value

    @staticmethod
    def _at_instruction(regs: uapi.user_regs_struct, number: int) -> None:
        """Have these registers begin system call `number`, at the instruction that made the answered call."""
        regs.rip -= len(uapi.SYSCALL_INSTRUCTION)
        regs.rax, regs.orig_rax = number, _WORD  # no restart of the kernel's own

    def _to_syscall_stop(self) -> None:
        while True:
            _ptrace(uapi.PTRACE_SYSCALL, self._call.tid)
            status = _wait(self._call.tid)
            if not status:
                raise CallGone
            stopped = os.WSTOPSIG(status)
            if stopped == _SYSCALL_STOP:
                return
            if stopped != signal.SIGTRAP and status >> 16 == 0:
                self._held = stopped  # SIGSTOP cannot be blocked; it is delivered at the end

    def _let_go(self) -> None:
        """Answer the call if nobody has, and let every thread go on; take the ends of those that were killed."""
        left = set()
        try:
            if self._regs is None:
                self.fail(errno.EPERM)
            if self._regs is not None:
                regs = self._regs
                if self._result is None:
                    self._at_instruction(regs, uapi.SYS_ioctl)
                else:
                    regs.rax, regs.orig_rax = self._result & _WORD, _WORD
                _ptrace(uapi.PTRACE_SETREGS, self._call.tid, 0, ctypes.byref(regs))
                _ptrace(uapi.PTRACE_SETSIGMASK, self._call.tid, 8, ctypes.byref(self._mask))
                _ptrace(uapi.PTRACE_DETACH, self._call.tid, 0, self._held)
        except CallGone:
            left.add(self._call.tid)
        left |= {tid for tid, held in self._others.items() if tid not in self._late and not _detached(tid, held)}
        for tid in self._late:  # their children have gone on, and will exec or end
            if not _wait(tid) or not _detached(tid, 0):
                left.add(tid)
        self._others.clear()
        for tid in sorted(left, key=_is_first):
            _await_end(tid)


def _detached(tid: int, held: int) -> bool:
    """Let a thread go on, with this signal; returns whether it stood."""
    try:
        _ptrace(uapi.PTRACE_DETACH, tid, 0, held)
    except CallGone:
        return False
    return True


def _is_first(tid: int) -> bool:
    """Whether a thread is its process's first, whose end is reported after those of its others."""
    try:
        return process_of(tid) == tid
    except CallGone:
        return False


def _await_end(tid: int) -> None:
    """Wait for the end of a traced thread that did not stand: its process has no end for its parent before.

    If it stands after all, it goes on. A first thread that has ended by itself is left: its process may live on.
    """
    until = time.monotonic() + _PATIENCE

    def lives_on(_: int) -> bool:
        return time.monotonic() > until and bool(_threads(tid) - {tid})

    while status := _wait(tid, lives_on):
        if _detached(tid, 0 if status >> 16 else os.WSTOPSIG(status)):
            return
