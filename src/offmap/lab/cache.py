"""The cache folder: where it is, and how two processes share it without seeing each other's half-made files."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offmap.lab.errors import LabError


def cache_folder(*parts: str) -> Path:
    """Return (and make) a folder of the cache.

    The cache is ``$OFFMAP_CACHE``, else ``$XDG_CACHE_HOME/offmap``, else ``~/.cache/offmap``.

    Raises:
        LabError: it cannot be made.
    """
    if own := os.environ.get("OFFMAP_CACHE"):
        root = Path(own).absolute()
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        root = (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "offmap"
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"cannot make the cache folder {folder}: {error.strerror}", "set OFFMAP_CACHE to a writable folder"
        ) from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``; the kernel drops it however the holder ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield a new folder on the same file system as ``beside``, removed at the end unless it was renamed away."""
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, final: Path) -> None:
    """Move ``new`` to ``final``; what was there before is removed."""
    if final.exists():
        with scratch_folder(final) as grave:
            final.rename(grave / "old")
            new.rename(final)
    else:
        new.rename(final)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader sees the old content or the new, never a part."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_digests: dict[tuple[int, ...], str] = {}
_SETTLED_NS = 1_000_000_000  # since its last change: another one may have the same time, by a kernel's coarse clock


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. A file that did not change since is not read again."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        identity = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
        if (known := _digests.get(identity)) is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if abs(time.time_ns() - facts.st_ctime_ns) > _SETTLED_NS:
        _digests[identity] = digest
    return digest
