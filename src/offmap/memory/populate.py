"""Giving every page of a mapping its frame, with several threads where the kernel can use them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from offmap.errors import KernelError
from offmap.memory.backing import Backing

PIECE = 4 << 20  # bytes that one thread asks for at a time: some milliseconds


def populate(backing: Backing, threads: int, progress: Callable[[float], None] = lambda _share: None) -> None:
    """Write zeroes to all of it. The kernel writes; Python's lock is free meanwhile.

    It begins at the end. The first pages that a young host hands out were freed from its image and are still mapped
    there, so they are kept from the guest, which can least do without low memory.

    Args:
        progress: called on this thread with the share that is done, from 0 to 1.

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
