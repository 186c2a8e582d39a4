"""Helpers for files that need no ``pathlib`` (importing it takes a tenth of a guest's start), or that `os` has not."""

import ctypes
import errno
import os

FileName = str | os.PathLike[str]


def read_text(path: FileName) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text.
    """
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib's own would import it
        return file.read()


def text_of(path: FileName) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) with a mode; that of the os module has none.

    Raises:
        OSError: the file has not so much room, or does not know the mode.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    off_t = ctypes.c_long
    while libc.fallocate(fd, mode, off_t(offset), off_t(size)):
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
