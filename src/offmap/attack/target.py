"""What the attacker is after, and how it is known that it was got.

The attack is told a digest or a public key, never the secret: nothing of ours holds it, and what is found is verified.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offmap.attack.keys import PublicKey, begins_pem, ends_pem
from offmap.attack.linux import Leaf, Linux, Lost, Process
from offmap.attack.page_cache import find_files, pages_of
from offmap.attack.seeker import Seeker
from offmap.errors import OffmapError
from offmap.uapi.page import PAGE_SIZE

PLANTED = "OFFMAP-SECRET-"
"""What stands in front of a planted secret: 32 hexadecimal digits."""

_PLANTED = re.compile(PLANTED.encode() + rb"([0-9a-f]{32})")
_BEGINS = re.compile(PLANTED.encode() + rb"[0-9a-f]{0,31}\Z")
_SUFFIXES = "|".join(PLANTED[at:] for at in range(1, len(PLANTED)))
_ENDS = re.compile(f"(?:{_SUFFIXES})[0-9a-f]{{32}}|[0-9a-f]{{1,32}}".encode())
_LEAST_PART = 16  # fewer digits are no finding, as in a sweep
_PART = re.compile(rb"[0-9a-f]{16,}")
_MOST_PAIRS = 1 << 20
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
        overlap: bytes that are looked at together with the page after them: no less than the secret, in words; 0: it
            always begins with a page, and is no longer.
        digest: the secret's SHA-256; empty if it is not known by that.
    """

    name: str
    overlap: int
    digest = ""

    @abstractmethod
    def find(self, guest: Linux) -> Found | None:
        """Go for it in a guest whose kernel has been found; None if it is not where it should be."""

    @abstractmethod
    def within(self, data: bytes) -> int:
        """Where the secret stands in these bytes, a page or more; -1 if it does not."""

    def begins(self, page: bytes) -> bytes:
        """The end of this page, if a secret may begin there that goes on in another page; else nothing."""
        return b""

    def ends(self, page: bytes) -> bytes:
        """The start of this page, if a secret may end there that began in another page; else nothing."""
        return b""

    def across(self, begins: Sequence[bytes], ends: Sequence[bytes]) -> bool:
        """Whether the secret begins in one of the first, and goes on in one of the second.

        Raises:
            Lost: there are too many of them to tell; or one has what may be a part of it, and none has the rest.
        """
        if len(begins) * len(ends) > _MOST_PAIRS:
            raise Lost(f"{len(begins)} mapped pages may have the start of the secret: too many to try")
        return any(self.within(one + other) >= 0 for one in begins for other in ends)


class _InProcess(Target):
    """A secret in the memory of a process.

    Attributes:
        process: the name of the guest's processes that may have it.
        size: in bytes.
    """

    process: str
    size: int

    def find(self, guest: Linux) -> Found | None:
        for process in _named(guest, self.process):
            for area, leaves in _areas(guest, process):
                seeker = Seeker(self)
                for leaf in leaves:
                    for start in range(0, leaf.bytes, PAGE_SIZE):
                        va = seeker.look(leaf.va + start, guest.physical(leaf.pa + start, PAGE_SIZE))
                        if va is not None:
                            return Found(f"{process.name} ({process.pid}), {area}, {va:#x}", self.size)
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
        self.process, self.digest = process, digest
        self.name = f"the secret planted in {process}"

    def within(self, data: bytes) -> int:
        for match in _PLANTED.finditer(data):
            if self._is(match[1]):
                return match.start(1)
        return -1

    def begins(self, page: bytes) -> bytes:
        match = _BEGINS.search(page, len(page) - self.overlap)
        return match[0] if match else b""

    def ends(self, page: bytes) -> bytes:
        match = _ENDS.match(page)
        return match[0] if match else b""

    def across(self, begins: Sequence[bytes], ends: Sequence[bytes]) -> bool:
        # The mark may be in the page before, or a part of it.
        if super().across(begins, ends) or any(self._is(each[-self.size :]) for each in ends):
            return True
        least = len(PLANTED) + _LEAST_PART
        if any(len(each) >= least for each in begins) or any(_PART.match(each) for each in ends):
            raise Lost(f"a mapped page has what may be a part of {self.name}, and no other has the rest")
        return False

    def _is(self, digits: bytes) -> bool:
        return hashlib.sha256(digits).hexdigest() == self.digest


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
        self.overlap = PAGE_SIZE  # a key in PEM
        self._edge = key.prime_bytes - 8
        self.name = f"the TLS key of {process}"

    def within(self, data: bytes) -> int:
        at = self._key.prime_in(data)
        return at if at >= 0 else self._key.pem_in(data)

    def begins(self, page: bytes) -> bytes:
        return begins_pem(page) or (page[-self._edge :] if any(page[-8:]) else b"")

    def ends(self, page: bytes) -> bytes:
        return ends_pem(page) or (page[: self._edge] if any(page[:8]) else b"")

    def across(self, begins: Sequence[bytes], ends: Sequence[bytes]) -> bool:
        pem = [each for each in begins if begins_pem(each)], [each for each in ends if ends_pem(each)]
        if super().across(*pem):
            return True
        try:
            return self._key.prime_across(
                [each[-self._edge :] for each in begins], [each[: self._edge] for each in ends]
            )
        except ValueError as error:
            raise Lost(f"too many mapped pages may have a part of {self.name}: {error}") from None


class _InFile(Target):
    """A file, in the guest's page cache."""

    path: str
    overlap = 0

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
        self.path, self.digest, self._size = path, digest, int(size)
        self.name = f"the file {path}"

    def is_content(self, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() == self.digest

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

    overlap = PAGE_SIZE

    def __init__(self, path: str, key: PublicKey) -> None:
        self.path, self._key = path, key
        self.name = f"the key in {path}"

    def is_content(self, data: bytes) -> bool:
        return self.within(data) >= 0

    def within(self, data: bytes) -> int:
        return self._key.pem_in(data)

    def begins(self, page: bytes) -> bytes:
        return begins_pem(page)

    def ends(self, page: bytes) -> bytes:
        return ends_pem(page)


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
    """Processes of this name, the newest first. Raises Lost: there are none."""
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
