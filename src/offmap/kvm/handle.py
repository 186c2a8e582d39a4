"""An owned file descriptor whose ioctls fail with the operation's own name."""

import ctypes
import os
from collections.abc import Mapping
from fcntl import ioctl

from offmap.errors import KernelError
from offmap.files import FileName
from offmap.owned import Owned
from offmap.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_INT_MAX = (1 << 31) - 1


def _ioctl_unsigned_long(fd: int, request: int, argument: int) -> int:
    """What fcntl.ioctl, which passes an int, cannot: an argument by value of more than 31 bits."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(argument))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Handle(Owned):
    """Owns `fd` and closes it on `close()` or at the end of a ``with`` block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def call(self, name: str, request: int, argument: "int | WriteableBuffer" = 0, remedy: str = "") -> int:
        """Issue the ioctl `request`; `argument` is an int, or a ctypes object that the kernel may write to.

        Raises:
            KernelError: with `name` as the operation.
        """
        try:
            if isinstance(argument, int) and argument > _INT_MAX:
                return _ioctl_unsigned_long(self.fd, request, argument)
            return ioctl(self.fd, request, argument)
        except OSError as error:
            raise KernelError(name, error, remedy) from None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_device(path: FileName, remedy: str | Mapping[int, str] = "", *, flags: int = 0) -> int:
    """Open `path` for reading and writing; its fd, which the caller owns.

    Args:
        remedy: what to do about it, for any error or by its errno.
        flags: beside O_RDWR and O_CLOEXEC.

    Raises:
        KernelError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    except OSError as error:
        if not isinstance(remedy, str):
            remedy = remedy.get(error.errno or 0, "")
        raise KernelError(f"open of {path}", error, remedy) from None
