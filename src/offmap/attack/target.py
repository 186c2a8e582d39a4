"""What the attacker is after, and how it is known that it was got.

The attack is told a digest or a public key, never the secret: nothing of ours holds it, and what is found is verified.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offmap.attack.keys import PublicKey
from offmap.attack.linux import Leaf, Linux, Lost, Process
from offmap.attack.page_cache import find_files, pages_of
from offmap.errors import OffmapError
from offmap.uapi.page import PAGE_SIZE

PLANTED = "OFFMAP-SECRET-"
"""What stands in front of a planted secret: 32 hexadecimal digits."""

_PLANTED = re.compile(PLANTED.encode() + rb"([0-9a-f]{32})")
_DIGEST = re.compile("[0-9a-f]{64}")
_USER_HALF = 1 << 47
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Found:
    """The secret: where it stands, in words for people, and its bytes."""

    where: str
    bytes: int


class Target(ABC):
    """A secret.

    Attributes:
        name: for results.
    """

    name: str

    @abstractmethod
    def find(self, guest: Linux) -> Found | None:
        """Go for it in a guest whose kernel has been found; None if it is not where it should be."""

    @abstractmethod
    def within(self, data: bytes) -> int:
        """Where the secret stands in these bytes, a page or more; -1 if it does not."""


class _InProcess(Target):
    """A secret in the memory of a process.

    Attributes:
        process: the name of the guest's processes that may have it.
        size: in bytes.
        overlap: bytes that are looked at together with the page after them: no less than the secret, in words.
    """

    process: str
    size: int
    overlap: int

    def find(self, guest: Linux) -> Found | None:
        for process in _named(guest, self.process):
            for area, leaves in _areas(guest, process):
                rest, before = b"", 0
                for leaf in leaves:
                    if leaf.va != before:
                        rest = b""
                    before = leaf.va + leaf.bytes
                    for start in range(0, leaf.bytes, PAGE_SIZE):
                        data = rest + guest.physical(leaf.pa + start, PAGE_SIZE)
                        at = self.within(data)
                        if at >= 0:
                            va = leaf.va + start - len(rest) + at
                            return Found(f"{process.name} ({process.pid}), {area}, {va:#x}", self.size)
                        rest = data[-self.overlap :]
        return None


class PlantedSecret(_InProcess):
    """Thirty-two hexadecimal digits behind a mark, in the memory of a process.

    Args:
        process: its name.
        digest: the SHA-256 of the digits.
    """

    size, overlap = 32, 64

    def __init__(self, process: str, digest: str) -> None:
        if not _DIGEST.fullmatch(digest):
            raise OffmapError(f"{digest[:80]!r} is no SHA-256", "give the 64 hexadecimal digits that the guest printed")
        self.process, self._digest = process, digest
        self.name = f"the secret planted in {process}"

    def within(self, data: bytes) -> int:
        for match in _PLANTED.finditer(data):
            if hashlib.sha256(match[1]).hexdigest() == self._digest:
                return match.start(1)
        return -1


class TlsKey(_InProcess):
    """The RSA key of a server, in its memory: a prime of it as OpenSSL keeps it there, or the whole in PEM.

    Args:
        process: the server's name.
        key: the public one, of its certificate.
    """

    def __init__(self, process: str, key: PublicKey) -> None:
        if not key.modulus:
            raise OffmapError(
                "the certificate is of no RSA key", "give the certificate of one; others are not looked for"
            )
        self.process, self._key = process, key
        self.size = key.modulus.bit_length() // 8
        self.overlap = 4096  # a key in PEM
        self.name = f"the TLS key of {process}"

    def within(self, data: bytes) -> int:
        at = self._key.prime_in(data)
        return at if at >= 0 else self._key.pem_in(data)


class _InFile(Target):
    """A file, in the guest's page cache."""

    path: str

    @abstractmethod
    def is_content(self, data: bytes) -> bool:
        """Whether this is what the file has."""

    def find(self, guest: Linux) -> Found | None:
        for file_system, inode in find_files(guest, self.path):
            size = guest.field(inode, "inode", "i_size")
            if not 0 < size <= _LARGEST_FILE:
                continue
            data = bytearray(size)
            mapping = guest.pointer_in(inode, "inode", "i_mapping")
            for number, pa in pages_of(guest, mapping):
                start = number * PAGE_SIZE
                if start < size:
                    data[start : start + PAGE_SIZE] = guest.physical(pa, min(PAGE_SIZE, size - start))
            if self.is_content(bytes(data)):
                return Found(f"{self.path} ({file_system}), in the guest's page cache", size)
        return None


class FileContent(_InFile):
    """A file of a page at most.

    Args:
        path: in the guest.
        content: its SHA-256 and its size: ``DIGEST:BYTES``.
    """

    def __init__(self, path: str, content: str) -> None:
        digest, _, size = content.partition(":")
        if not _DIGEST.fullmatch(digest) or not size.isascii() or not size.isdigit() or not 0 < int(size) <= PAGE_SIZE:
            what = f"{content[:100]!r} does not describe a file's content"
            raise OffmapError(what, f"write SHA256:BYTES, of a file of at most {PAGE_SIZE} bytes")
        self.path, self._digest, self._size = path, digest, int(size)
        self.name = f"the file {path}"

    def is_content(self, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() == self._digest

    def within(self, data: bytes) -> int:
        # In a page cache it begins with a page.
        starts = range(0, len(data) - self._size + 1, PAGE_SIZE)
        return next((at for at in starts if self.is_content(data[at : at + self._size])), -1)


class KeyFile(_InFile):
    """A private key in a file, such as an SSH host key.

    Args:
        path: in the guest.
        key: the public one.
    """

    def __init__(self, path: str, key: PublicKey) -> None:
        self.path, self._key = path, key
        self.name = f"the key in {path}"

    def is_content(self, data: bytes) -> bool:
        return self.within(data) >= 0

    def within(self, data: bytes) -> int:
        return self._key.pem_in(data)


def parse_target(text: str, secret: str, process: str | None) -> Target:
    """The target that the command line names.

    Args:
        text: ``planted``, ``tls``, ``file:PATH`` or ``key:PATH``.
        secret: what it is known by: a digest, or a file that has the public key.
        process: the guest's process that has it.

    Raises:
        OffmapError: there is no such target.
    """
    kind, _, path = text.partition(":")
    if text == "planted":
        return PlantedSecret(process or "sh", secret)
    if text == "tls":
        return TlsKey(process or "nginx", PublicKey(Path(secret)))
    if kind == "file" and path:
        return FileContent(path, secret)
    if kind == "key" and path:
        return KeyFile(path, PublicKey(Path(secret)))
    raise OffmapError(f"there is no target {text[:80]!r}", "write planted, tls, file:PATH or key:PATH")


def _named(guest: Linux, name: str) -> list[Process]:
    """Processes of this name, the newest first.

    Raises:
        Lost: there are none.
    """
    found = [each for each in guest.processes() if each.name == name and each.memory]
    if not found:
        raise Lost(f"the guest has no process {name}")
    return found[::-1]


def _areas(guest: Linux, process: Process) -> Iterator[tuple[str, Iterator[Leaf]]]:
    """Where a process has secrets, the likeliest places first."""
    table = guest.top_table(process.memory)
    start, end = (guest.field(process.memory, "mm_struct", name) for name in ("start_brk", "brk"))
    if not 0 < start <= end < _USER_HALF:
        raise Lost("mm_struct.brk is not what it should be")
    yield "heap", guest.leaves(table, start & -PAGE_SIZE, end)
    yield "its other memory", (leaf for leaf in guest.leaves(table, 0, _USER_HALF) if leaf.writable)
