"""The primitive: what a leak in the host kernel would give, and the only thing that the attack uses of the host.

It reads bytes at a kernel address if and only if the host's page tables map that address at that moment. It is counted
in words of eight bytes, as a leak of published speed would have to be asked for each of them.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from offmap.owned import Owned
from offmap.uapi.page import PAGE_SIZE

WORD = 8
KERNEL_HALF = 1 << 63
_LAST = (1 << 64) - 1
_BATCH = 256  # pages that are fetched in one go


class NotMapped(Exception):
    """The host kernel's page tables map no such address.

    Attributes:
        va: the first address that is not mapped.
    """

    def __init__(self, va: int) -> None:
        self.va = va
        super().__init__(f"{va:#x} is not mapped")


class Unreadable(Exception):
    """The address is mapped, and this primitive cannot read there: it is reached, and what it holds is not known here.

    Attributes:
        va: the address.
    """

    def __init__(self, va: int) -> None:
        self.va = va
        super().__init__(f"{va:#x} is mapped, but cannot be read by this primitive")


@dataclass
class Counts:
    """What was asked of a primitive: words of eight bytes, and how many were not mapped."""

    reads: int = 0
    bytes: int = 0
    failures: int = 0

    def since(self, before: "Counts") -> "Counts":
        return Counts(self.reads - before.reads, self.bytes - before.bytes, self.failures - before.failures)

    def copy(self) -> "Counts":
        return Counts(self.reads, self.bytes, self.failures)


class Primitive(Owned):
    """Reads the kernel's memory.

    Attributes:
        name: for results.
        counts: of all reads so far.
        by_kcore: it reads what /proc/kcore shows, and no more.
        exact: what it reads is what stands there. By one that errs, nothing can be said to be absent.
        user_memory: it may read the VMM's user memory too, as a leak in the VMM's process would.
    """

    name: str
    by_kcore = False
    exact = True
    user_memory = False

    def __init__(self) -> None:
        self.counts = Counts()

    @abstractmethod
    def _fetch(self, va: int, size: int) -> bytes:
        """The bytes there, within one page. Raises as ``read``."""

    @abstractmethod
    def _fetch_user(self, pid: int, va: int, size: int) -> bytes:
        """The bytes at a process's own address, within one page. Raises NotMapped."""

    @abstractmethod
    def fill(self, va: int, view: memoryview) -> None:
        """Fill a buffer with all that stands from a kernel address on. Uncounted: for the sweep, which is no attack.

        What is not mapped reads as zeroes: the plan of the sweep has only what was mapped when it was made.

        Raises:
            Unreadable: some of it is mapped and cannot be read.
        """

    def _fetch_pages(self, vas: Sequence[int]) -> "list[bytes | NotMapped | Unreadable]":
        """What ``_fetch`` gives of each of these whole pages, or raises."""
        found: list[bytes | NotMapped | Unreadable] = []
        for va in vas:
            try:
                found.append(self._fetch(va, PAGE_SIZE))
            except (NotMapped, Unreadable) as error:
                found.append(error)
        return found

    def read_pages(self, vas: Sequence[int]) -> Iterator[bytes | None]:
        """As ``read`` of each of these whole pages, in order, and counted so; None of one that is not mapped.

        Many are fetched in one go, so a page may be fetched some time before it is asked for.

        Raises:
            Unreadable: the page is mapped, and cannot be read.
        """
        for start in range(0, len(vas), _BATCH):
            batch = vas[start : start + _BATCH]
            fetched = iter(self._fetch_pages([va for va in batch if KERNEL_HALF <= va <= _LAST]))
            for va in batch:
                data = next(fetched) if KERNEL_HALF <= va <= _LAST else NotMapped(va)
                if isinstance(data, Unreadable):
                    raise data
                mapped = not isinstance(data, NotMapped)
                self.counts.reads += PAGE_SIZE // WORD if mapped else 1
                self.counts.bytes += PAGE_SIZE if mapped else 0
                self.counts.failures += not mapped
                yield None if isinstance(data, NotMapped) else data

    def read_user(self, pid: int, va: int, size: int = WORD) -> bytes:
        """The bytes at an address of a process's own, within one page, by its own mapping.

        Raises:
            NotMapped: the process has no page there now, or this primitive reads no user memory.
        """
        if not self.user_memory:
            raise NotMapped(va)
        words = (va % WORD + size + WORD - 1) // WORD
        try:
            data = self._fetch_user(pid, va, size)
        except NotMapped:
            self.counts.reads += 1
            self.counts.failures += 1
            raise
        self.counts.reads += words
        self.counts.bytes += size
        return data

    def read(self, va: int, size: int = WORD) -> bytes:
        """The bytes at a kernel address.

        Raises:
            NotMapped: one of them is not mapped.
            Unreadable: one of them is mapped, and cannot be read.
        """
        parts = []
        while size > 0:
            if not KERNEL_HALF <= va <= _LAST:
                self.counts.failures += 1
                raise NotMapped(va)
            step = min(size, PAGE_SIZE - va % PAGE_SIZE)
            words = (va % WORD + step + WORD - 1) // WORD
            try:
                parts.append(self._fetch(va, step))
            except NotMapped:
                self.counts.reads += 1
                self.counts.failures += 1
                raise
            self.counts.reads += words
            self.counts.bytes += step
            va, size = va + step, size - step
        return b"".join(parts)


def neighbours(vas: Sequence[int]) -> Iterator[tuple[int, int]]:
    """These pages as stretches of pages that follow each other: the first one's address, how many."""
    start = 0
    for at in range(1, len(vas) + 1):
        if at == len(vas) or vas[at] != vas[at - 1] + PAGE_SIZE:
            yield vas[start], at - start
            start = at


class Noisy(Primitive):
    """A primitive as a real leak is: slow, and wrong now and then.

    Args:
        of: the primitive; it is closed with this one.
        errors: the share of words that come wrong, 0 to 1.
        latency: seconds for each word.
        votes: how often each read is made; the answer is what comes most often.
        seed: for the errors.
    """

    def __init__(
        self,
        of: Primitive,
        errors: float = 0.0,
        latency: float = 0.0,
        votes: int = 1,
        seed: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__()
        self._of, self._errors, self._latency, self._votes = of, errors, latency, votes
        self._random, self._sleep = Random(seed), sleep
        self.name, self.counts = of.name, of.counts
        self.by_kcore, self.user_memory = of.by_kcore, of.user_memory
        self.exact = of.exact and not errors

    def _fetch(self, va: int, size: int) -> bytes:
        return self._voted(lambda: self._of._fetch(va, size), va, size)

    def _fetch_user(self, pid: int, va: int, size: int) -> bytes:
        return self._voted(lambda: self._of._fetch_user(pid, va, size), va, size)

    def fill(self, va: int, view: memoryview) -> None:
        self._of.fill(va, view)

    def _voted(self, fetch: Callable[[], bytes], va: int, size: int) -> bytes:
        words = (va % WORD + size + WORD - 1) // WORD
        seen: dict[bytes, int] = {}
        for vote in range(self._votes):
            if self._latency:
                self._sleep(self._latency * words)
            if vote:
                self.counts.reads += words
                self.counts.bytes += size
            data = self._wrong(fetch())
            seen[data] = seen.get(data, 0) + 1
        return max(seen, key=lambda each: seen[each])

    def _wrong(self, data: bytes) -> bytes:
        if not self._errors:
            return data
        found = bytearray(data)
        for at in range(0, len(found), WORD):
            if self._random.random() < self._errors:
                found[at] ^= 1 << self._random.randrange(8)
        return bytes(found)

    def close(self) -> None:
        self._of.close()
