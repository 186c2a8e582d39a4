"""Snapshots of booted hosts in the cache folder: RAM and device state, at the moment when a host waits for its GO.

A snapshot is used only if it is ours alone, whole, and of this boot of this machine; else it is made anew. Size, inode
and times of each file tell whether anybody wrote to it since; the device state has a digest too. RAM has none: reading
all of it would take longer than what a snapshot saves. A disk that gives back other bytes than it was given is not
noticed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from offmap.lab.cache import cache_folder, replace_folder, sha256_of, write_atomically
from offmap.lab.errors import LabError
from offmap.lab.initramfs import Initramfs
from offmap.lab.installed import boot_id
from offmap.lab.kernel import HostKernel
from offmap.lab.qemu import HostOptions, Ram, command_line, find_qemu, node_sizes, parse_size
from offmap.owned import Owned

FORMAT = 1
DEFAULT_LIMIT = "4G"  # a snapshot takes about 200 MiB
LIMIT_VARIABLE = "OFFMAP_SNAPSHOT_LIMIT"
_SPARE = 1 << 30  # bytes of the disk that stay free
_MANIFEST, _STATE, _CONSOLE, _USED = "manifest.json", "state", "console", "used"


class SnapshotUnusable(LabError):
    """There is no snapshot to go on from, or none can be kept; the host boots in full."""


@dataclass(frozen=True)
class Kind:
    """What hosts have in common that can start from one snapshot.

    Attributes:
        name: sixteen hexadecimal digits: of the kernel, the initramfs, QEMU and its arguments.
        description: for people.
    """

    name: str
    description: str


def kind_of(kernel: HostKernel, options: HostOptions, archive: Initramfs) -> Kind:
    """Return the kind of a host."""
    qemu = Path(find_qemu()).resolve()
    facts = qemu.stat()
    fds = tuple(range(options.nodes))
    argv = command_line(str(qemu), "", "", 0, replace(options, out=None), Ram(fds, shared=True), 0)
    digest = hashlib.sha256(json.dumps([FORMAT, argv, facts.st_size, facts.st_mtime_ns, facts.st_ino]).encode())
    digest.update(sha256_of(kernel.vmlinuz).encode())
    digest.update(archive.digest())
    words = [kernel.release, f"{options.memory >> 20}M"]
    words += [f"{options.nodes} nodes"] if options.nodes > 1 else []
    return Kind(digest.hexdigest()[:16], " ".join([*words, options.cmdline]).strip())


@dataclass(frozen=True)
class Listed:
    """A snapshot as ``offmap lab snapshot list`` shows it; sizes in bytes, times in seconds since 1970."""

    name: str
    description: str
    size: int
    used: float
    current: bool  # made since this machine was started


class Snapshot(Owned):
    """A snapshot that has been checked, with its files open; deleting it does not hurt who has it open."""

    def __init__(self, ram: tuple[int, ...], state: int, console: bytes, files: ExitStack) -> None:
        self.ram = Ram(ram, shared=False)
        self.state = state
        self.console = console
        self._files = files

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class Draft:
    """A snapshot in the making: files for the RAM and the state."""

    def __init__(self, folder: Path, kind: Kind, options: HostOptions, files: ExitStack) -> None:
        self.folder = folder
        self._kind = kind
        self._names = [f"node{node}" for node in range(options.nodes)]
        fds = []
        for name, size in zip(self._names, node_sizes(options), strict=True):
            fds.append(_create(folder / name, files))
            os.truncate(fds[-1], size)
        self.ram = Ram(tuple(fds), shared=True)
        self.state = _create(folder / _STATE, files)

    def finish(self, console: bytes) -> None:
        """Write the manifest; called once nobody writes to the files any more."""
        (self.folder / _CONSOLE).write_bytes(console)
        (self.folder / _USED).touch()
        manifest = {
            "format": FORMAT,
            "kind": self._kind.name,
            "description": self._kind.description,
            "boot": boot_id(),
            "state": sha256_of(self.folder / _STATE),
            "console": sha256_of(self.folder / _CONSOLE),
            "files": {name: _identity((self.folder / name).stat()) for name in (*self._names, _STATE, _CONSOLE)},
        }
        write_atomically(self.folder / _MANIFEST, json.dumps(manifest).encode())


class Snapshots:
    """The snapshots of one cache folder."""

    def __init__(self) -> None:
        self.folder = cache_folder("snapshots")
        self.folder.chmod(0o700)

    def open(self, kind: Kind) -> Snapshot:
        """Open a snapshot of ``kind``. Raises SnapshotUnusable: there is none, or it is not to be trusted."""
        folder = self.folder / kind.name
        try:
            _ours(folder.lstat(), stat.S_IFDIR)
        except OSError:
            raise SnapshotUnusable("there is no snapshot of this kind of host") from None
        with ExitStack() as files:
            try:
                manifest = json.loads(_read(_open(folder / _MANIFEST, os.O_RDONLY, files)))
                if (manifest["format"], manifest["kind"]) != (FORMAT, kind.name):
                    raise SnapshotUnusable("the snapshot is of another kind than its name says")
                if manifest["boot"] != boot_id():
                    raise SnapshotUnusable("the snapshot is older than this machine's last start")
                fds = {}
                for name, identity in manifest["files"].items():
                    # QEMU wants to be able to write to files of RAM, even where it maps them for itself.
                    flags = os.O_RDWR if name.startswith("node") else os.O_RDONLY
                    fds[name] = _open(folder / name, flags, files)
                    if _identity(os.fstat(fds[name])) != identity:
                        raise SnapshotUnusable(f"the snapshot's {name} was changed since it was made")
                for name in (_STATE, _CONSOLE):
                    if hashlib.sha256(_read(fds[name])).hexdigest() != manifest[name]:
                        raise SnapshotUnusable(f"the snapshot's {name} is damaged")
                ram = tuple(fds[f"node{node}"] for node in range(len(fds) - 2))
                console = _read(fds[_CONSOLE])
                os.utime(folder / _USED)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise SnapshotUnusable(f"the snapshot cannot be read: {error!r}") from error
            os.lseek(fds[_STATE], 0, os.SEEK_SET)
            return Snapshot(ram, fds[_STATE], console, files.pop_all())

    @contextmanager
    def making(self, kind: Kind, options: HostOptions) -> Iterator[Draft]:
        """Give a draft, which becomes the snapshot of ``kind`` if it is finished within.

        Raises:
            SnapshotUnusable: somebody else is making it, the disk is too full, or none are to be kept.
        """
        with ExitStack() as files:
            if not _lock(self._lock_file(kind.name), files):
                raise SnapshotUnusable("another process is making the snapshot of this kind of host")
            limit = _limit()
            self._make_room(limit)
            free = shutil.disk_usage(self.folder).free
            if limit == 0 or free < options.memory + _SPARE:
                raise SnapshotUnusable(
                    f"no snapshot is kept: {LIMIT_VARIABLE} is 0"
                    if limit == 0
                    else f"no snapshot is kept: the disk of {self.folder} has {free >> 20} MiB left"
                )
            folder = self.folder / f".{kind.name}"
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir(mode=0o700)
            try:
                yield Draft(folder, kind, options, files)
                if (folder / _MANIFEST).exists():
                    replace_folder(folder, self.folder / kind.name)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self._make_room(limit, keep=kind.name)

    def listed(self) -> list[Listed]:
        """List the snapshots, the last used first."""
        boot = boot_id()
        found = []
        for folder in self.folder.glob("[!.]*/"):
            if len(folder.name) != 16:
                continue
            size = used = 0.0
            description, current = "damaged", False
            with suppress(OSError):
                size = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
                used = (folder / _USED).stat().st_mtime
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((folder / _MANIFEST).read_bytes())
                description, current = str(manifest["description"]), manifest["boot"] == boot
            found.append(Listed(folder.name, description, int(size), used, current))
        return sorted(found, key=lambda entry: -entry.used)

    def drop(self, name: str) -> None:
        """Delete a snapshot; hosts that were started from it run on."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _make_room(self, limit: int, keep: str = "") -> None:
        """Delete what cannot be used any more, and the longest unused until the rest is below ``limit`` bytes."""
        for leftover in self.folder.glob(".*"):
            with ExitStack() as files:  # of a process that was killed, unless its lock is held
                if _lock(self._lock_file(leftover.name.removeprefix(".")), files):
                    shutil.rmtree(leftover, ignore_errors=True)
        total = 0
        for entry in self.listed():
            total += entry.size
            if entry.name != keep and (not entry.current or total > limit):
                self.drop(entry.name)

    def _lock_file(self, name: str) -> Path:
        folder = self.folder / "locks"
        folder.mkdir(exist_ok=True)
        return folder / name


def _limit() -> int:
    text = os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT)
    return 0 if text.strip() == "0" else parse_size(text)


def _lock(path: Path, files: ExitStack) -> bool:
    """Take an exclusive lock until ``files`` is closed; False if another process has it."""
    file = files.enter_context(path.open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create(path: Path, files: ExitStack) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    files.callback(os.close, fd)
    return fd


def _open(path: Path, flags: int, files: ExitStack) -> int:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    files.callback(os.close, fd)
    _ours(os.fstat(fd), stat.S_IFREG)
    return fd


def _ours(facts: os.stat_result, kind: int) -> None:
    if stat.S_IFMT(facts.st_mode) != kind or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise SnapshotUnusable("the snapshot is not this user's alone")


def _read(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0)


def _identity(facts: os.stat_result) -> list[int]:
    return [facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
