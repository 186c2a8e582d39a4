"""A process as /proc shows it, held open so that a reused PID cannot take its place; and its mappings.

Source of the mappings: /proc/PID/maps (``fs/proc/task_mmu.c``, ``show_map_vma``).
"""

import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from offmap.audit.procfs import open_proc
from offmap.audit.status import Status, status_of
from offmap.errors import OffmapError, Undetermined
from offmap.owned import Owned

_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([-r][-w][-x][sp]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+)(?: +(.*))?", re.DOTALL
)
_AS_ROOT = "run the audit as root with CAP_SYS_PTRACE and CAP_SYS_ADMIN"


@dataclass(frozen=True)
class Mapping:
    """One line of maps: addresses [start, end), permissions, and what backs it from byte ``offset`` on."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        return self.perms.startswith("rw")

    @property
    def anonymous(self) -> bool:
        """Private memory of no file (the heap, a stack, an anonymous mmap)."""
        return self.inode == 0 and not self.shared


def parse_maps(text: str) -> list[Mapping]:
    """The mappings of a maps file, in order of address; lines of another form (none are known) are left out."""
    # The kernel escapes only the newline in a file's name: for splitlines() a carriage return in one would end the
    # line too, and a VMM could make up mappings.
    return [mapping for mapping in map(_parse_line, text.split("\n")) if mapping is not None]


@lru_cache(maxsize=1 << 14)
def _parse_line(line: str) -> Mapping | None:
    """One line; the same ones are read several times in an audit."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    start, end, perms, offset, device, inode, path = match.groups(default="")
    return Mapping(int(start, 16), int(end, 16), perms, int(offset, 16), device, int(inode), path)


def mappings_from(mappings: Sequence[Mapping], va: int) -> Iterator[Mapping]:
    """Those that end above this address, in their order: a VMM may have 65,530, and as many slots in each VM."""
    first = bisect_right(mappings, va, key=lambda mapping: mapping.end)
    return (mappings[index] for index in range(first, len(mappings)))


def find_mapping(mappings: Sequence[Mapping], va: int) -> Mapping | None:
    """The mapping that holds this address, or None."""
    mapping = next(mappings_from(mappings, va), None)
    return mapping if mapping is not None and mapping.start <= va else None


def process_ids() -> list[int]:
    """PIDs of all processes there are, ascending."""
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def own_start() -> int:
    """When this process was started, at the latest (CLOCK_MONOTONIC, nanoseconds): nobody could see it come before."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    # starttime: ticks since boot, with the time that the machine slept (Documentation/filesystems/proc.rst).
    ticks = int(fields[19]) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
    return ticks - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + time.monotonic_ns()


class NoSuchProcess(OffmapError):
    """There is no process with this PID."""


class ProcessEnded(Undetermined):
    """The audited process, or its address space, came to an end."""


class Process(Owned):
    """An open /proc/PID folder. It names the same process for as long as it is open, even if the PID is used again.

    Attributes:
        silent: one of its files did not answer, so that no other one is asked.

    Raises:
        NoSuchProcess: no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.silent = False
        self._pagemap: int | None = None
        try:
            self._fd = open_proc(str(pid), os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, ProcessLookupError):
            raise NoSuchProcess(f"there is no process {pid}", "give the PID of a running VMM") from None
        except OSError as error:
            raise Undetermined(f"cannot open /proc/{pid}: {error.strerror}", _AS_ROOT) from None

    def close(self) -> None:
        if self._pagemap is not None:
            os.close(self._pagemap)
            self._pagemap = None
        os.close(self._fd)

    @property
    def pagemap(self) -> int:
        """Its open pagemap; it is of the address space that the process had when this was first asked for.

        Raises:
            Undetermined: as ``open``.
        """
        if self._pagemap is not None:
            return self._pagemap
        try:
            fd = self.open("pagemap")
            if os.pread(fd, 8, 0):
                self._pagemap = fd
                return fd
            os.close(fd)
        except ProcessEnded:
            pass  # newer kernels refuse to open what has no address space
        if self.running() and not self.link("exe"):
            raise Undetermined(f"process {self.pid} has no address space of its own", "give the PID of a VMM")
        raise ProcessEnded(f"process {self.pid} has ended")

    def check_alive(self) -> None:
        """Make sure that the address space that was first looked at is still the process's.

        Raises:
            ProcessEnded: the process has ended, or runs another program (exec).
        """
        if os.pread(self.pagemap, 8, 0):  # nothing at all once the address space is gone (pagemap_read)
            return
        if self.running():
            raise ProcessEnded(f"process {self.pid} replaced its program during the audit")
        raise ProcessEnded(f"process {self.pid} ended during the audit")

    def renew_pagemap(self) -> None:
        """Make ``pagemap`` that of the address space which the process has now. Raises as ``check_alive``.

        An address space that another process has too (CLONE_VM) outlives an exec of this one: ``check_alive`` does not
        tell, and its pagemap goes on.
        """
        self.check_alive()
        old, self._pagemap = self._pagemap, None
        if old is not None:
            os.close(old)
        self.check_alive()

    def running(self) -> bool:
        """Whether it lives; a zombie does not."""
        try:
            with os.fdopen(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd), "rb") as file:
                # "PID (comm) STATE …"; the name may hold anything (Documentation/filesystems/proc.rst, table 1-4).
                return file.read().rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"], [])
        except OSError:
            return False

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a file below /proc/PID; the caller owns the fd.

        Raises:
            ProcessEnded: the process has ended.
            Undetermined: there is no such file, or it may not be opened.
        """
        try:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self._fd)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise self._gone(name, error) from None
        except OSError as error:
            raise Undetermined(f"cannot open /proc/{self.pid}/{name}: {error.strerror}", _AS_ROOT) from None

    def _gone(self, name: str, error: OSError) -> Undetermined:
        """Why a file or a folder below /proc/PID is not there."""
        # A process that is on its way out has lost its address space (ESRCH) before it is a zombie.
        if isinstance(error, ProcessLookupError) or not self.running():
            return ProcessEnded(f"process {self.pid} ended during the audit")
        return Undetermined(f"/proc/{self.pid}/{name} is not there any more: {error.strerror}")

    def read(self, name: str) -> bytes:
        """The whole of a file below /proc/PID (raises as ``open`` does)."""
        with os.fdopen(self.open(name), "rb") as file:
            try:
                return file.read()
            except (FileNotFoundError, ProcessLookupError) as error:  # fdinfo of what was closed since the opening
                raise self._gone(name, error) from None

    def link(self, name: str) -> str:
        """Where a link below /proc/PID says that it leads; empty where that cannot be told."""
        try:
            return os.readlink(name, dir_fd=self._fd)
        except OSError:
            return ""

    def maps(self) -> list[Mapping]:
        """Its mappings now."""
        return parse_maps(self.read("maps").decode("utf-8", "replace"))

    def name(self) -> str:
        """Its command name (comm)."""
        return self.read("comm").decode("utf-8", "replace").rstrip("\n")

    def threads(self) -> list[int]:
        """IDs of its threads; the main one is there too, even when it has ended before others."""
        with self._folder("task") as (_, names):
            return [int(name) for name in names]

    def descriptors(self, thread: int | None = None) -> dict[int, str]:
        """Its open file descriptors and what each link says; those closed meanwhile are left out.

        Args:
            thread: as this one has them; the main thread has none any more once it has ended.
        """
        links = {}
        with self._folder("fd" if thread is None else f"task/{thread}/fd") as (folder, names):
            for name in names:
                try:
                    links[int(name)] = os.readlink(name, dir_fd=folder)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                except PermissionError as error:
                    # The folder opens for its owner, its links take ptrace rights (proc_pid_readlink).
                    what = f"the descriptors of process {self.pid} cannot be read: {error.strerror}"
                    raise Undetermined(what, _AS_ROOT) from None
        return links

    @contextmanager
    def _folder(self, name: str) -> Iterator[tuple[int, list[str]]]:
        """An open folder below /proc/PID, and the names in it; raises as ``open``."""
        fd = self.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                names = os.listdir(fd)  # noqa: PTH208 (a Path cannot be made of an fd)
            except (FileNotFoundError, ProcessLookupError) as error:  # it ended since the folder was opened
                raise self._gone(name, error) from None
            yield fd, names
        finally:
            os.close(fd)

    def stat(self, name: str) -> Status | None:
        """stat() through a link below /proc/PID (``fd/3``, ``map_files/…``); None where it leads nowhere."""
        return status_of(name, self._fd)
