"""The "newc" cpio archive, the format of an initramfs.

Source: Documentation/driver-api/early-userspace/buffer-format.rst in the Linux tree. Pure: entries in, bytes out, and
the same entries always give the same bytes (no times, no owner but root, inode numbers counted from 1).
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass

TRAILER = "TRAILER!!!"
_MAGIC = b"070701"
_ALIGN = 4


@dataclass(frozen=True)
class Entry:
    """One archive member.

    Attributes:
        path: name inside the archive, relative, without a leading slash.
        mode: ``st_mode``, file type included.
        data: content of a file, or the target of a symbolic link.
        rdev: (major, minor) of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def directory(path: str, mode: int = 0o755) -> Entry:
    """Make a directory; its parents must come before it in the archive."""
    return Entry(path, stat.S_IFDIR | mode)


def regular(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """Make a regular file of ``data``."""
    return Entry(path, stat.S_IFREG | mode, data)


def symlink(path: str, target: str) -> Entry:
    """Make a symbolic link at ``path`` that points to ``target``."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def char_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """Make a character device node."""
    return Entry(path, stat.S_IFCHR | mode, rdev=(major, minor))


def newc(entries: Iterable[Entry]) -> bytes:
    """Archive ``entries`` in their order, trailer included.

    Raises:
        ValueError: a path is absolute, empty, or named twice (a bug of the caller).
    """
    out = bytearray()
    seen: set[str] = set()
    for inode, entry in enumerate(entries, start=1):
        if not entry.path or entry.path.startswith("/") or entry.path in seen:
            raise ValueError(f"bad or repeated archive path {entry.path!r}")
        seen.add(entry.path)
        _append(out, inode, entry)
    _append(out, 0, Entry(TRAILER, 0))
    return bytes(out)


def _append(out: bytearray, inode: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    fields = (
        inode,
        entry.mode,
        0,  # c_uid
        0,  # c_gid
        2 if stat.S_ISDIR(entry.mode) else 1,  # c_nlink
        0,  # c_mtime
        len(entry.data),
        0,  # c_maj of the device it lies on
        0,  # c_min
        entry.rdev[0],
        entry.rdev[1],
        len(name),
        0,  # c_chksum: only used by the "070702" variant
    )
    out += _MAGIC + b"".join(b"%08x" % field for field in fields) + name
    out += bytes(-len(out) % _ALIGN)
    out += entry.data
    out += bytes(-len(out) % _ALIGN)
