"""vsock's host side: Unix sockets, as in Firecracker.

A program that talks to the guest connects to PATH and writes ``CONNECT <port>\\n``. When the guest has accepted it, the
program reads ``OK <host port>\\n``, and the stream begins. A program that waits for the guest listens at PATH_<port>.
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

from offmap.devices.virtio.vsock_folder import SocketFolder, open_socket
from offmap.errors import OffmapError
from offmap.owned import Owned

_SUN_PATH = 108  # sizeof(sockaddr_un.sun_path), its final NUL included: linux/un.h
_LONGEST_PORT = len("_4294967295")
_BACKLOG = 128  # connections that wait to be accepted
_CONNECT = re.compile(rb"CONNECT (\d{1,10})\n")
_LONGEST_CONNECT = len("CONNECT 4294967295\n")
_PORT_ANY = 0xFFFFFFFF  # VMADDR_PORT_ANY, linux/vm_sockets.h


def check_path(path: Path) -> None:
    """Refuse a path that has no room for a port behind it in the address of a Unix socket.

    Raises:
        OffmapError: it is too long.
    """
    room = _SUN_PATH - 1 - _LONGEST_PORT
    if len(os.fsencode(path)) > room:
        raise OffmapError(
            f"the vsock path {path} is too long: a Unix socket's address has room for {room} bytes and a port",
            "give a shorter one",
        )


class Listener(Owned):
    """Listens at `path`, and removes the socket file at the end.

    Attributes:
        path: as given.
        fd: readable when somebody wants to connect.
        name: of the socket file.
        folder: it is in.

    Raises:
        OffmapError: the path is taken, cannot be made, or others may write to its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.folder = SocketFolder(path.parent)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(f"{self.folder.path}/{self.name}")
            self._file: os.stat_result | None = os.stat(self.name, dir_fd=self.folder.fd, follow_symlinks=False)
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            self.folder.close()
            if error.errno == errno.EADDRINUSE:
                raise OffmapError(
                    f"there is a file {path} already: another guest's, or left behind by one that was killed",
                    "give another path, or remove the file if no guest runs there",
                ) from None
            raise OffmapError(f"cannot listen at {path}: {error.strerror}", "give another path") from None
        self.fd = self._socket.fileno()
        self._connect: Callable[[int], socket.socket] = lambda port: connect_in(self.folder.fd, f"{self.name}_{port}")

    def accept(self) -> socket.socket:
        """The next connection, which does not block.

        Raises:
            BlockingIOError: there is none.
            OSError: EMFILE and others.
        """
        accepted, _ = self._socket.accept()
        accepted.setblocking(False)
        return accepted

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            now = os.stat(self.name, dir_fd=self.folder.fd, follow_symlinks=False)
            if (now.st_dev, now.st_ino) == (self._file.st_dev, self._file.st_ino):
                os.unlink(self.name, dir_fd=self.folder.fd)
        self.folder.close()

    def connect(self, port: int) -> socket.socket:
        """Connect to whoever waits for the guest at `port`. Raises OSError: nobody does, or too many are waiting."""
        return self._connect(port)

    def hand_over(self, connect: Callable[[int], socket.socket]) -> None:
        """Let `connect` do what `connect` did: its process has the folder now, and removes the socket file."""
        self._connect = connect
        self._file = None
        self.folder.close()


class Greeting:
    """The first line of a client. Nothing after its newline is read."""

    def __init__(self, client: socket.socket) -> None:
        self.socket = client

    def port(self) -> int | None:
        """The port that the client asks for, or None where its line is not complete yet.

        Raises:
            ValueError: it asks for none, or has gone.
        """
        try:
            said = self.socket.recv(_LONGEST_CONNECT, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ValueError from error
        line, newline, _ = said.partition(b"\n")
        if not newline:
            if len(said) < _LONGEST_CONNECT and said and b"CONNECT ".startswith(said[:8]):
                return None
            raise ValueError
        match = _CONNECT.fullmatch(line + newline)
        if match is None or int(match[1]) >= _PORT_ANY:
            raise ValueError
        self.socket.recv(len(line) + 1)
        return int(match[1])


def connect_in(folder: int, name: str) -> socket.socket:
    """Connect to the socket file `name` in the open folder `folder`, without waiting.

    Raises:
        OSError: nobody listens there, or too many are waiting.
    """
    file = open_socket(folder, name)
    try:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            client.connect(f"/proc/self/fd/{file}")
        except BaseException:
            client.close()
            raise
    finally:
        os.close(file)
    return client
