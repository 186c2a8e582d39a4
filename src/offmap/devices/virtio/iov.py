"""Lists of buffers (struct iovec's): what readv, writev and recvmsg take, here made of guest memory."""

from collections.abc import Iterable, Sequence

__all__ = ["length", "part"]


def length(buffers: Iterable[memoryview]) -> int:
    """Bytes in all of them."""
    return sum(map(len, buffers))


def part(buffers: Sequence[memoryview], start: int, size: int | None = None) -> list[memoryview]:
    """The buffers' bytes from `start` on, `size` of them (None: all), without a copy; fewer where they end before."""
    found = []
    left = length(buffers) if size is None else size
    for buffer in buffers:
        if left <= 0:
            break
        if start >= len(buffer):
            start -= len(buffer)
            continue
        piece = buffer[start : start + left]
        start = 0
        left -= len(piece)
        found.append(piece)
    return found
