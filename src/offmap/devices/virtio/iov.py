"""Lists of buffers (struct iovec's): what readv, writev and recvmsg take, here made of guest memory."""

from collections.abc import Iterable, Sequence
from ctypes import addressof, c_char


def address_of(buffer: memoryview) -> int:
    """Where a buffer is in this process's address space."""
    return addressof(c_char.from_buffer(buffer))


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


def scatter(data: bytes | memoryview, buffers: Sequence[memoryview]) -> int:
    """Copy `data` to the beginning of the buffers; as much as there is room for.

    Returns:
        How many bytes were copied.
    """
    done = 0
    for piece in part(buffers, 0, len(data)):
        piece[:] = data[done : done + len(piece)]
        done += len(piece)
    return done


def gather(buffers: Sequence[memoryview], room: memoryview) -> int:
    """Copy the buffers' first bytes into `room`; as many as fit.

    Returns:
        How many bytes were copied.
    """
    done = 0
    for piece in part(buffers, 0, len(room)):
        room[done : done + len(piece)] = piece
        done += len(piece)
    return done
