"""A process as /proc shows it, held open so that a reused PID cannot take its place."""

import ctypes
import os

from offmap.audit.maps import Mapping, parse_maps
from offmap.errors import OffmapError, Undetermined
from offmap.owned import Owned

__all__ = ["NoSuchProcess", "Process"]

_libc = ctypes.CDLL(None, use_errno=True)


class NoSuchProcess(OffmapError):
    """There is no process with this PID."""


class Process(Owned):
    """An open /proc/PID folder. It names the same process for as long as it is open, even if the PID is used again.

    Raises:
        NoSuchProcess: no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise NoSuchProcess(f"there is no process {pid}", "give the PID of a running VMM") from None

    def close(self) -> None:
        os.close(self._fd)

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a file below /proc/PID; the caller owns the fd.

        Raises:
            Undetermined: the process has ended, or its file may not be opened.
        """
        try:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self._fd)
        except (FileNotFoundError, ProcessLookupError):
            raise Undetermined(f"process {self.pid} ended during the audit") from None
        except OSError as error:
            raise Undetermined(
                f"cannot open /proc/{self.pid}/{name}: {error.strerror}",
                "run the audit as root with CAP_SYS_PTRACE and CAP_SYS_ADMIN",
            ) from None

    def read(self, name: str) -> bytes:
        """The whole of a file below /proc/PID (raises as ``open`` does)."""
        with os.fdopen(self.open(name), "rb") as file:
            try:
                return file.read()
            except ProcessLookupError:
                raise Undetermined(f"process {self.pid} ended during the audit") from None

    def maps(self) -> list[Mapping]:
        """Its mappings now."""
        return parse_maps(self.read("maps").decode("utf-8", "replace"))

    def name(self) -> str:
        """Its command name (comm)."""
        return self.read("comm").decode("utf-8", "replace").rstrip("\n")

    def descriptors(self) -> dict[int, str]:
        """Its open file descriptors and what each link says; those closed meanwhile are left out."""
        folder = self.open("fd", os.O_RDONLY | os.O_DIRECTORY)
        try:
            links = {}
            for name in os.listdir(folder):  # noqa: PTH208 (a Path cannot be made of an fd)
                try:
                    links[int(name)] = os.readlink(name, dir_fd=folder)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                except PermissionError as error:
                    # The folder opens for its owner, its links take ptrace rights (proc_pid_readlink).
                    raise Undetermined(
                        f"the descriptors of process {self.pid} cannot be read: {error.strerror}",
                        "run the audit as root with CAP_SYS_PTRACE and CAP_SYS_ADMIN",
                    ) from None
            return links
        finally:
            os.close(folder)

    def file_system(self, name: str) -> int | None:
        """Magic number of the file system that a link below /proc/PID leads to; None where it leads nowhere."""
        # struct statfs begins with f_type, a long; 256 bytes are more than all of it.
        buffer = ctypes.create_string_buffer(256)
        if _libc.statfs(f"/proc/self/fd/{self._fd}/{name}".encode(), buffer):
            return None
        return int.from_bytes(buffer.raw[:8], "little")

    def stat(self, name: str) -> os.stat_result | None:
        """stat() through a link below /proc/PID (``fd/3``, ``map_files/…``); None where it leads nowhere."""
        try:
            return os.stat(name, dir_fd=self._fd)
        except OSError:
            return None
