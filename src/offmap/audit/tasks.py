"""Which processes have a given address space: all tasks that the kernel has, by their ``mm``.

They are found in the IDR of the first PID namespace (``kernel/pid.c``), where each thread keeps its place for as long
as it lives. So none that lives throughout is missed, whatever starts and ends beside it. A kernel thread that borrows
an address space (``kthread_use_mm``) is none of its processes.
"""

import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field

from offmap.audit import xarray
from offmap.audit.btf import Btf, Unknown
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects, symbol
from offmap.audit.regions import Layout

# include/linux/proc_ns.h, PROC_PID_INIT_INO and PROC_TIME_INIT_INO. An auditor with a clock of its own would take a
# slot that was replaced just now for an old one.
_NAMESPACES = {"PID": "pid:[4026531836]", "time": "time:[4026531834]"}
_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_ATTEMPTS = 8


@dataclass(frozen=True)
class Thread:
    """A task with an address space: its thread ID, its process, and the kernel addresses of its ``struct mm_struct``
    and ``struct task_struct``."""

    tid: int
    pid: int
    memory: int
    task: int = field(default=0, compare=False)


class Tasks(KernelObjects):
    """Looks tasks up.

    Raises:
        Unknown: this auditor does not see PIDs, or the time, as the kernel does.
    """

    def __init__(self, kcore: Kcore, layout: Layout, btf: Btf) -> None:
        for kind, first in _NAMESPACES.items():
            with suppress(FileNotFoundError):  # a kernel without such namespaces (CONFIG_PID_NS) has none but that
                if os.readlink(f"/proc/self/ns/{kind.lower()}") != first:  # noqa: PTH115
                    raise Unknown(f"the auditor is in a {kind} namespace of its own")
        super().__init__(kcore, layout, btf)

    def threads(self) -> list[Thread]:
        """All threads with an address space of their own, by ID. Raises Unknown: the kernel's list cannot be read."""
        found = []
        for tid, entry in self._pids():
            try:
                memory, number, pid = self._members(task := self._task_at(entry))
                if number == tid and memory and not self._field(task, "task_struct", "flags", size=4) & _PF_KTHREAD:
                    found.append(Thread(tid, pid, memory, task))
            except Unknown:  # it ended, and something else is there
                continue
        return found

    def is_there(self, thread: Thread) -> bool:
        """Whether a thread still is what it was; takes one read."""
        try:
            return self._members(thread.task) == (thread.memory, thread.tid, thread.pid)
        except Unknown:
            return False

    def task_of(self, tid: int) -> int:
        """Address of a thread's ``struct task_struct``.

        Raises:
            Unknown: there is no such thread, or the kernel's list cannot be read.
        """
        for number, entry in self._pids(tid):
            if number == tid and self._members(task := self._task_at(entry))[1] == tid:
                return task
        raise Unknown(f"the kernel has no process {tid}")

    def memory_of(self, tid: int) -> int:
        """Kernel address of the address space of a thread; raises as ``task_of``, or if it has none."""
        memory = self._members(self.task_of(tid))[0]
        if not memory:
            raise Unknown(f"process {tid} has no address space")
        return memory

    def _pids(self, only: int | None = None) -> list[tuple[int, int]]:
        """(thread ID, address of its ``struct pid``) of each thread; with `only`, at least of that one."""
        table = symbol("init_pid_ns") + self._btf.offset("pid_namespace", "idr", "idr_rt")
        for _ in range(_ATTEMPTS - 1):
            with suppress(Unknown):
                return self._look(table, only)
        return self._look(table, only)

    def _look(self, table: int, only: int | None) -> list[tuple[int, int]]:
        numbers, _, entries = xarray.entries(self._read, self._btf, table, only)
        return list(zip(numbers.tolist(), entries.tolist(), strict=True))

    def _task_at(self, pid: int) -> int:
        node = self._field(pid, "pid", "tasks")  # of PIDTYPE_PID, the first
        if not node:
            raise Unknown("it has ended")
        return node - self._btf.offset("task_struct", "pid_links")

    def _members(self, task: int) -> tuple[int, int, int]:
        """Address space, thread ID and process of a task, in one read."""
        mm, pid, tgid = (self._btf.offset("task_struct", name) for name in ("mm", "pid", "tgid"))
        first, last = min(mm, pid, tgid), max(mm, pid, tgid) + 8
        data = self._read(task + first, last - first)
        return (
            struct.unpack_from("<Q", data, mm - first)[0],
            struct.unpack_from("<i", data, pid - first)[0],
            struct.unpack_from("<i", data, tgid - first)[0],
        )
