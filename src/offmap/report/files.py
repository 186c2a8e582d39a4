"""Write reports as files: whole or not at all. A reader sees the old report or the new one, never a mixture."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from offmap.errors import KernelError, OffmapError

PUBLIC = 0o644
"""The mode for files that others read: node_exporter runs as a user of its own."""

PRIVATE = 0o600
"""The mode for files with kernel addresses, which undo KASLR: only the owner may read them."""


def replace_file(path: Path, text: str, mode: int) -> None:
    """Replace the file at `path` with `text`: write a file beside it, then rename it.

    Raises:
        OffmapError: there is something else than a file.
        KernelError: it cannot be written; what was there before is untouched.
    """
    target, beside, fd = _beside(path)
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="replace", newline="") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave an empty file under the new name
        beside.rename(target)
    except OSError as error:
        raise KernelError(f"writing {path}", error) from None
    finally:
        beside.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Find out whether ``replace_file`` can write there, before the work whose result it is to be; raises as that."""
    _, beside, fd = _beside(path)
    os.close(fd)
    beside.unlink()


def _beside(path: Path) -> tuple[Path, Path, int]:
    """The file that `path` leads to, and a new one beside it with its open descriptor; raises as ``replace_file``."""
    target = Path(os.path.realpath(path))  # a symbolic link is kept, and its target is replaced
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(target.stat().st_mode):
            raise OffmapError(f"{path} is not a file", "name one to write or to replace")
    try:
        # Not *.prom, which node_exporter would read half written.
        fd, name = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise KernelError(f"making a file in {target.parent}", error, "name a folder that can be written") from None
    return target, Path(name), fd
