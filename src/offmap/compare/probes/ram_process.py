"""A process that holds a little RAM of the kind in question: what its kernel does with such a mapping.

A child of ours by fork(2), so that it can crash, and starts at once. It does what a VMM would do on its guest's RAM:
read a file past the page cache, write it all to a file, dump core.
"""

import ctypes
import mmap
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from offmap.audit.canary import make_canary, new_key
from offmap.compare.probes.survey import no, undetermined, yes
from offmap.compare.questions import Answer
from offmap.errors import KernelError, OffmapError
from offmap.kvm import Kvm
from offmap.memory.backend import Backend
from offmap.uapi.page import PAGE_SIZE

SIZE = 4 << 20
"""Bytes of RAM: whole huge pages, and little enough for any host."""

QUESTIONS = ("breaks.o_direct", "works.ram_snapshot", "breaks.core_dump")

_PR_SET_DUMPABLE = 4  # linux/prctl.h
_SNAPSHOT_AT, _SECRET_AT = 1 << 20, 2 << 20
_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


@dataclass(frozen=True, slots=True)
class RamTask:
    """What the child is to work on.

    Attributes:
        backend: makes the RAM.
        direct: a file or disk to be read by direct I/O.
        folder: in memory; for its snapshot and its core.
        may_dump: whether it may have the kernel write a core into `folder` (which takes the host's core_pattern).
    """

    backend: Backend
    direct: Path
    folder: Path
    may_dump: bool


class Attempt(Struct):
    """How one thing went that the child did with its RAM.

    Attributes:
        same: whether the bytes came out as they went in.
        error: of the call; empty if it had none.
        control: whether the same call did it on plain memory.
    """

    same: bool = False
    error: str = ""
    control: bool = False


class Done(Struct):
    """What the child says; `refused` is why it did not get such RAM."""

    refused: str = ""
    direct: Attempt = msgspec.field(default_factory=Attempt)
    snapshot: Attempt = msgspec.field(default_factory=Attempt)


def hold_ram(task: RamTask) -> list[Answer]:
    """Fork the child, and judge what it did. Raises OffmapError: it did not get such RAM."""
    # Kept inverted, as a core of the child shows all of its memory: no whole secret is anywhere but in the RAM.
    key = new_key()
    secret, control = (bytes(byte ^ 0xFF for byte in make_canary(key, number)) for number in (0, 1))
    receive, send = os.pipe()
    with _cores_in(task):
        pid = os.fork()
        if pid == 0:
            _child(task, secret, control, send)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
    if not text:
        raise OffmapError("a process that was to hold such RAM died")
    done = msgspec.json.decode(text, type=Done)
    if done.refused:
        raise OffmapError(done.refused)
    return [_o_direct(done.direct), _snapshot(done.snapshot), _core(task, pid, status, secret, control)]


class _cores_in:
    """For as long as this lasts, cores go into the folder."""

    def __init__(self, task: RamTask) -> None:
        self._task = task
        self._before = ""

    def __enter__(self) -> None:
        if self._task.may_dump:
            self._before = _CORE_PATTERN.read_text()
            _CORE_PATTERN.write_text(f"{self._task.folder}/core.%p")

    def __exit__(self, *_: object) -> None:
        if self._task.may_dump:
            _CORE_PATTERN.write_text(self._before)


def _child(task: RamTask, secret: bytes, control: bytes, send: int) -> None:
    """Never returns."""
    try:
        with Kvm() as kvm, kvm.create_vm() as vm, task.backend.guest_memory(vm, SIZE) as memory:
            view = memory.view(0, SIZE)
            done = Done(direct=_attempt(_read_direct, task, view), snapshot=_attempt(_write_snapshot, task, view))
            plain = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for number, byte in enumerate(secret):  # byte by byte: no copy of it in between
                view[_SECRET_AT + number] = byte ^ 0xFF
            for number, byte in enumerate(control):
                plain[number] = byte ^ 0xFF
            with os.fdopen(send, "wb") as pipe:
                pipe.write(msgspec.json.encode(done))
            if task.may_dump:
                ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
                resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                signal.signal(signal.SIGABRT, signal.SIG_DFL)
                os.abort()
    except OffmapError as error:
        os.write(send, msgspec.json.encode(Done(refused=str(error))))
    except BaseException as error:
        os.write(2, f"offmap: the process that holds RAM failed: {error!r}\n".encode())
    finally:
        os._exit(0)


def _attempt(call: Callable[[RamTask, memoryview], Attempt], task: RamTask, view: memoryview) -> Attempt:
    try:
        return call(task, view)
    except OSError as error:
        return Attempt(error=str(KernelError(call.__name__.lstrip("_"), error)))


def _read_direct(task: RamTask, view: memoryview) -> Attempt:
    data = os.urandom(1 << 20)
    fd = os.open(task.direct, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    fd = os.open(task.direct, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, 1 << 20) as plain, memoryview(plain) as room:
            control = os.preadv(fd, [room], 0) == len(data) and room == data
        try:
            same = os.preadv(fd, [view[: len(data)]], 0) == len(data) and view[: len(data)] == data
            return Attempt(same, control=control)
        except OSError as error:
            why = str(KernelError("preadv with O_DIRECT into guest RAM", error))
            return Attempt(error=why, control=control)
    finally:
        os.close(fd)


def _write_snapshot(task: RamTask, view: memoryview) -> Attempt:
    """All of it by write(2), from the mapping that the VMM has."""
    view[_SNAPSHOT_AT : _SNAPSHOT_AT + (1 << 20)] = os.urandom(1 << 20)
    path = task.folder / "snapshot"
    try:
        with path.open("wb", buffering=0) as file:
            done = 0
            while done < len(view):
                done += file.write(view[done:]) or 0
        with path.open("rb") as file:
            same = all(file.read(1 << 20) == view[at : at + (1 << 20)] for at in range(0, len(view), 1 << 20))
    finally:
        path.unlink(missing_ok=True)
    return Attempt(same)


def _o_direct(result: Attempt) -> Answer:
    id = "breaks.o_direct"
    control = "the same call into plain memory of the same process works"
    if not result.control:
        return undetermined(id, f"the file does not take direct I/O into plain memory either: {result.error}")
    if result.error:
        return no(id, f"{result.error}; a VMM must bounce such I/O", control)
    return yes(id, control) if result.same else no(id, "what was read is not what is in the file", control)


def _snapshot(result: Attempt) -> Answer:
    id = "works.ram_snapshot"
    if result.error:
        return no(id, result.error)
    if not result.same:
        return no(id, "the file is not the same as the RAM")
    return yes(id, f"{SIZE >> 20} MiB of such RAM by write(2), which copies from the VMM's own mapping; compared")


def _core(task: RamTask, pid: int, status: int, secret: bytes, control: bytes) -> Answer:
    id = "breaks.core_dump"
    if not task.may_dump:
        return undetermined(id, "not measured: it would change where this host's cores go")
    path = task.folder / f"core.{pid}"
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as core:
            size = len(core)
            found, controlled = (core.find(bytes(byte ^ 0xFF for byte in each)) >= 0 for each in (secret, control))
    except (OSError, ValueError) as error:
        return undetermined(id, f"the kernel wrote no core ({error}; wait status {status:#x})")
    finally:
        path.unlink(missing_ok=True)
    detail = f"a core of {size >> 20} MiB with the default coredump_filter"
    if not controlled:
        return undetermined(id, "the core does not have the secret in plain memory either", detail)
    detail += "; it has the secret that was in plain memory of the same process"
    return yes(id, detail) if found else no(id, "it leaves the RAM out", detail)
