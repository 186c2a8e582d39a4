"""A secret to scan for: given as text, hex digits, a file or standard input, and kept in one locked page of our own."""

import mmap
import os
import stat
from typing import Final

import numpy as np

from offmap.audit.own_memory import LockedBuffer, frames_at
from offmap.errors import KernelError, OffmapError
from offmap.owned import Owned
from offmap.uapi.page import PAGE_SIZE

SHORTEST: Final = 8  # by chance, fewer bytes stand somewhere in any few GiB
LONGEST: Final = PAGE_SIZE
_FORMS = "text:WORDS, hex:DIGITS, file:PATH, or - for standard input"
_DISTINCT = 4  # a row of zeroes stands everywhere


class Secret(Owned):
    """The bytes to scan for.

    Args:
        data: SHORTEST to LONGEST bytes.
        fd: the file that they were read from, whose own pages in the page cache are no finding; duplicated.

    Raises:
        OffmapError: too short, too long, or of too few different bytes to mean anything.
    """

    def __init__(self, data: bytes | bytearray | memoryview, fd: int | None = None) -> None:
        if not SHORTEST <= len(data) <= LONGEST:
            raise OffmapError(
                f"a secret of {len(data)} bytes cannot be scanned for",
                f"give {SHORTEST} to {LONGEST} bytes that stand nowhere else: shorter ones turn up by chance",
            )
        if len(set(data)) < _DISTINCT:
            what = f"a secret of fewer than {_DISTINCT} different bytes stands everywhere"
            raise OffmapError(what, "give bytes that are your own")
        self.length = len(data)
        self._fd = None if fd is None else os.dup(fd)
        self._buffer = LockedBuffer(PAGE_SIZE)
        self._buffer.view[: self.length] = data

    @property
    def va(self) -> int:
        """Where it stands in our own memory."""
        return self._buffer.va

    @property
    def view(self) -> memoryview:
        """Its bytes; valid until ``close``."""
        return self._buffer.view[: self.length]

    def file_frames(self) -> set[int]:
        """Frames in which the page cache has the file that the secret was read from."""
        if self._fd is None:
            return set()
        try:
            with mmap.mmap(self._fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as view:
                pages = -(-len(view) // PAGE_SIZE)
                for page in range(pages):
                    view[page * PAGE_SIZE]
                # A read-only mmap exports no writable buffer, so its address is asked of numpy, which does not keep it.
                return frames_at(int(np.frombuffer(view, dtype=np.uint8).ctypes.data), pages)
        except (OSError, ValueError):
            return set()  # a file system that cannot map files has no pages to tell

    def close(self) -> None:
        self._buffer.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def parse_secret(text: str) -> Secret:
    """Understand ``text:…``, ``hex:…``, ``file:PATH`` or ``-``; the caller owns the Secret.

    A file is taken as it is, a newline at its end included; of standard input one newline at the end is left out.

    Raises:
        OffmapError: of none of these forms, or nothing to scan for.
        KernelError: the file cannot be read.
    """
    form, colon, rest = text.partition(":")
    if text == "-":
        return _read(0, "standard input", typed=True)
    if not colon or form not in {"text", "hex", "file"}:
        raise OffmapError(f"cannot tell what to scan for: {text[:20]!r}", f"write {_FORMS}")
    if form == "text":
        return Secret(rest.encode("utf-8", "surrogateescape"))
    if form == "hex":
        try:
            return Secret(bytes.fromhex(rest))
        except ValueError:
            raise OffmapError("the secret after hex: is not made of pairs of hex digits", f"write {_FORMS}") from None
    try:
        fd = os.open(rest, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"opening {rest}", error, "name a file that holds the secret and nothing else") from None
    try:
        return _read(fd, rest, typed=False)
    finally:
        os.close(fd)


def _read(fd: int, name: str, *, typed: bool) -> Secret:
    """Read a secret into a locked buffer, and into no other.

    Args:
        typed: a newline at its end is no part of it.
    """
    status = os.fstat(fd)
    with LockedBuffer(LONGEST + PAGE_SIZE) as buffer:
        size = 0
        try:
            while size <= LONGEST + 1 and (got := os.readv(fd, [buffer.view[size : LONGEST + 2]])):
                size += got
        except OSError as error:
            raise KernelError(f"reading {name}", error) from None
        regular = stat.S_ISREG(status.st_mode)
        if typed and size and buffer.view[size - 1] == ord("\n"):
            size -= 1
        return Secret(buffer.view[:size], fd if regular else None)
