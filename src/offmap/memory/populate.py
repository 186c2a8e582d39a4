"""Giving every page of a mapping its frame, with several threads where the kernel can use them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from offmap.errors import KernelError
from offmap.memory.backing import Backing

__all__ = ["populate"]

PIECE = 4 << 20  # bytes that one thread asks for at a time: some milliseconds


def populate(backing: Backing, threads: int, progress: Callable[[float], None] = lambda _share: None) -> None:
    """Write zeroes to all of it. The kernel does the writing, and Python's lock is free meanwhile.

    `progress` is called with the share that is done, from 0 to 1, on this thread.

    From the end: the first pages that a young host hands out are those freed from its image, with a mapping there. They
    are kept from the guest, and low memory is where it can least do without.

    Raises:
        KernelError: EFAULT where the kernel could not give a page.
    """
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)

    def fill(start: int) -> None:
        end = min(start + PIECE, backing.size)
        while start < end:
            start += os.readv(fd, [backing.view[start:end]])

    try:
        progress(0.0)
        with ThreadPoolExecutor(threads) as pool:
            pieces = range(0, backing.size, PIECE)
            for done, _ in enumerate(pool.map(fill, reversed(pieces)), 1):
                progress(done / len(pieces))
    except OSError as error:
        raise KernelError("populating guest RAM", error) from None
    finally:
        os.close(fd)
