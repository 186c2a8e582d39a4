"""Which processes have a given address space: all tasks that the kernel has, by their ``mm``.

They are found in the IDR of the first PID namespace (``kernel/pid.c``), where each thread keeps its place for as long
as it lives. So none that lives throughout is missed, whatever starts and ends beside it. A kernel thread that borrows
an address space (``kthread_use_mm``) is none of its processes.
"""

import os
import struct
from dataclasses import dataclass

from offmap.audit import xarray
from offmap.audit.btf import Btf, Unknown
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects, symbol
from offmap.audit.regions import Layout

_INIT_PID_NAMESPACE = "pid:[4026531836]"  # include/linux/proc_ns.h, PROC_PID_INIT_INO
_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_ATTEMPTS = 8


@dataclass(frozen=True)
class Thread:
    """A task with an address space: its thread ID, its process, and the kernel address of its ``struct mm_struct``."""

    tid: int
    pid: int
    memory: int


class Tasks(KernelObjects):
    """Looks tasks up.

    Raises:
        Unknown: this auditor does not see PIDs as the kernel does.
    """

    def __init__(self, kcore: Kcore, layout: Layout, btf: Btf) -> None:
        try:
            namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
        except FileNotFoundError:
            namespace = _INIT_PID_NAMESPACE  # a kernel without PID namespaces (CONFIG_PID_NS) has none but that
        if namespace != _INIT_PID_NAMESPACE:
            raise Unknown("the auditor is in a PID namespace of its own")
        super().__init__(kcore, layout, btf)

    def threads(self) -> list[Thread]:
        """All threads with an address space of their own, by ID.

        Raises:
            Unknown: the kernel's list cannot be read.
        """
        table = symbol("init_pid_ns") + self._btf.offset("pid_namespace", "idr", "idr_rt")
        for attempt in range(_ATTEMPTS):
            try:
                numbers, _, entries = xarray.entries(self._read, self._btf, table)
                break
            except Unknown:
                if attempt == _ATTEMPTS - 1:
                    raise
        found = []
        for tid, entry in zip(numbers.tolist(), entries.tolist(), strict=True):
            try:
                thread = self._thread(tid, entry)
            except Unknown:  # it ended, and something else is there
                continue
            if thread is not None:
                found.append(thread)
        return found

    def _thread(self, tid: int, entry: int) -> Thread | None:
        node = self._field(entry, "pid", "tasks")  # of PIDTYPE_PID, the first
        if not node:
            return None
        task = node - self._btf.offset("task_struct", "pid_links")
        memory, number, pid = self._members(task)
        if number != tid or not memory:
            return None
        if self._field(task, "task_struct", "flags", size=4) & _PF_KTHREAD:
            return None
        return Thread(tid, pid, memory)

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

    def memory_of(self, tid: int) -> int:
        """Kernel address of the address space of a thread or process.

        Raises:
            Unknown: there is no such thread with one, or the kernel's list cannot be read.
        """
        for thread in self.threads():
            if thread.tid == tid:
                return thread.memory
        raise Unknown(f"the kernel has no process {tid} with an address space")
