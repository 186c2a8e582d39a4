"""Tasks with an address space: every thread, no kernel thread, and none whose number is another's by now."""

import os

import pytest

from offmap.audit.btf import Unknown
from offmap.audit.tasks import Tasks, Thread

from .kernel_memory import OFFSETS, Memory, Types

NAMESPACE = 0x5000
KERNEL_THREAD = 0x0020_0000


class Kernel(Tasks):
    """Tasks in memory made here."""

    def __init__(self) -> None:
        self._btf = Types()  # type: ignore[assignment]
        self.memory = Memory()
        self.numbers: dict[int, int] = {}

    def _read(self, va: int, size: int) -> bytes:
        return self.memory.read(va, size)

    def task(self, tid: int, pid: int, mm: int, flags: int = 0) -> int:
        """One more task; the address of its ``struct task_struct``."""
        number, task = self.memory.make(), self.memory.make()
        self.memory.put(number, "pid", "tasks", value=task + OFFSETS["task_struct", "pid_links"])
        for name, value, size in (("flags", flags, 4), ("mm", mm, 8), ("pid", tid, 4), ("tgid", pid, 4)):
            self.memory.put(task, "task_struct", name, value=value, size=size)
        self.numbers[tid] = number
        self.memory.xarray(NAMESPACE, self.numbers)
        return task


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr("offmap.audit.tasks.symbol", lambda name: NAMESPACE)
    kernel = Kernel()
    kernel.task(1, 1, 0xA000)
    kernel.task(2, 2, 0, KERNEL_THREAD)
    kernel.task(3, 3, 0xB000, KERNEL_THREAD)  # kthread_use_mm
    kernel.task(70, 70, 0)  # the main thread has ended
    kernel.task(71, 70, 0xB000)
    return kernel


def test_threads_outlive_the_main_one_and_kernel_threads_are_no_processes(kernel: Kernel) -> None:
    assert kernel.threads() == [Thread(1, 1, 0xA000), Thread(71, 70, 0xB000)]
    assert kernel.memory_of(71) == 0xB000
    for tid, why in ((2, "no address space"), (70, "no address space"), (99, "no process")):
        with pytest.raises(Unknown, match=why):
            kernel.memory_of(tid)


def test_a_task_whose_memory_is_anothers_by_now_is_left_out(kernel: Kernel) -> None:
    task = kernel.task(72, 72, 0xC000)
    kernel.memory.put(task, "task_struct", "pid", value=5000, size=4)
    assert [thread.tid for thread in kernel.threads()] == [1, 71]


@pytest.mark.parametrize("kind", ["PID", "time"])
def test_an_auditor_with_pids_or_a_clock_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real = {"pid": "pid:[4026531836]", "time": "time:[4026531834]"}
    links = {f"/proc/self/ns/{each}": link for each, link in real.items()}
    monkeypatch.setattr(os, "readlink", links.__getitem__)
    with pytest.raises(AttributeError):  # it goes on, and there is no kernel here
        Tasks(None, None, None)  # type: ignore[arg-type]
    links[f"/proc/self/ns/{kind.lower()}"] = f"{kind.lower()}:[4026532000]"
    with pytest.raises(Unknown, match=f"{kind} namespace"):
        Tasks(None, None, None)  # type: ignore[arg-type]
