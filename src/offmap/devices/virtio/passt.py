"""User-mode networking: frames between a guest and passt(1), which turns them into sockets of an ordinary user.

The frames go over a stream socket. Each follows its length, 32 bits in network order, as in QEMU's "-netdev stream".
passt ends when the other end of the socket is closed: it never outlives this process.
"""

import contextlib
import errno
import fcntl
import os
import re
import select
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from ctypes import sizeof

from offmap.devices.virtio.iov import length, part, scatter
from offmap.errors import OffmapError
from offmap.owned import Owned
from offmap.uapi.virtio.net import virtio_net_hdr_v1
from offmap.units import printable

_LENGTH = struct.Struct("!I")
_HEADER = bytes(sizeof(virtio_net_hdr_v1))
_NO_HEADER = (1).to_bytes(2, "little").rjust(sizeof(virtio_net_hdr_v1), b"\0")  # all 0 but num_buffers, which is 1
MAX_FRAME = 65535 + 18  # an IP packet, and its Ethernet header with a VLAN tag
_MOST_SAID = 256 << 10  # bytes of passt's messages that are kept
_LONGEST_LINE = 300  # characters of a message that a user is shown
_END_SECONDS = 2.0  # passt takes milliseconds to end


class FrameStream(Owned):
    """Frames over a stream socket, read and written without a copy.

    Attributes:
        fd: readable when at least part of a frame is there.
    """

    has_vnet_hdr = False
    kind = "passt"

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self._stream = stream
        self.fd = stream.fileno()
        self._prefix = bytearray(_LENGTH.size)  # of the next frame
        self._prefix_done = 0
        self._size = 0  # of the frame that comes; 0: not known yet
        self._done = 0  # bytes of it that were read
        self._dropping = False
        self._unsent: list[memoryview] = []

    def set_offload(self, flags: int) -> None:
        """Do nothing: frames without a header have all their work done."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Read one frame, and put an empty header before it. A frame that does not fit is dropped.

        After a BlockingIOError, `buffers` may have the start of a frame: call again with the same, or `forget`.

        Returns:
            Its length in bytes, with the header.

        Raises:
            BlockingIOError: there is no frame, or not all of it yet.
            OSError: ECONNRESET if the other end has gone.
        """
        while True:
            size = self._next_size()
            self._dropping = self._dropping or len(_HEADER) + size > length(buffers)
            while self._done < size:
                left = size - self._done
                if self._dropping:
                    room = [memoryview(bytearray(left))]
                else:
                    room = part(buffers, len(_HEADER) + self._done, left)
                # The same call reads the size of the next frame.
                got = self._read([*room, memoryview(self._prefix)])
                self._done += min(got, left)
                self._prefix_done = max(got - left, 0)
            self._size = self._done = 0
            if not self._dropping:
                scatter(_NO_HEADER, buffers)
                return len(_HEADER) + size
            self._dropping = False

    def _next_size(self) -> int:
        """The size in bytes of the next frame, or of the one that was read in part."""
        if not self._size:
            while self._prefix_done < _LENGTH.size:
                self._prefix_done += self._read([memoryview(self._prefix)[self._prefix_done :]])
            (self._size,) = _LENGTH.unpack(self._prefix)
            self._prefix_done = 0
            if not 0 < self._size <= MAX_FRAME:
                raise ConnectionResetError(errno.ECONNRESET, "that is not the protocol")
        return self._size

    def _read(self, buffers: Sequence[memoryview]) -> int:
        got = os.readv(self.fd, buffers)
        if not got:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return got

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Write one frame without its header. If only part of it can be written, `flush` writes the rest.

        Raises:
            BlockingIOError: nothing of it could be written; `fd` becomes writable.
            OSError: EPIPE if the other end has gone, EINVAL if it is no frame.
        """
        if not self.flush():
            raise BlockingIOError
        frame = part(buffers, len(_HEADER))
        size = length(frame)
        if not 0 < size <= MAX_FRAME:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sent = os.writev(self.fd, [_LENGTH.pack(size), *frame])
        if sent < _LENGTH.size + size:
            # A copy, since its buffers go back to the guest: at most one frame.
            rest = b"".join([_LENGTH.pack(size), *frame])[sent:]
            self._unsent = [memoryview(rest)]

    def flush(self) -> bool:
        """Write the rest of a frame. Return whether all of it is written; if not, `fd` becomes writable."""
        while self._unsent:
            try:
                self._unsent = part(self._unsent, os.write(self.fd, self._unsent[0]))
            except BlockingIOError:
                return False
            except OSError:
                self._unsent = []  # the other end has gone; the next read reports it
        return True

    def forget(self) -> None:
        """Drop the frame that `receive` has begun: its buffers are gone."""
        self._dropping = self._dropping or self._done > 0

    def close(self) -> None:
        self._stream.close()
        self.fd = -1


class Passt(FrameStream):
    """A passt process of our own, and the stream to it.

    Args:
        options: more of its command line: ``-t 8080:80`` and the like.

    Attributes:
        changes: None: that it has gone shows in the stream.

    Raises:
        OffmapError: it is not installed, or would not start.
    """

    changes = None
    _handed_over = False

    def __init__(self, options: Sequence[str] = ()) -> None:
        program = shutil.which("passt")
        if program is None:
            raise OffmapError(
                "there is no passt on this host, which user networking goes through",
                "install the package passt, or use tap=NAME",
            )
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            # Not a pipe: nobody reads it while the guest runs. Sealed, as a guest can make it say much.
            self._log = undo.enter_context(os.fdopen(os.memfd_create("passt", os.MFD_ALLOW_SEALING), "r+b"))
            os.ftruncate(self._log.fileno(), _MOST_SAID)
            fcntl.fcntl(self._log, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            with theirs:
                command = [program, "--foreground", "--stderr", "--fd", str(theirs.fileno()), *options]
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C at the terminal is for the guest's VMM
                )
            undo.callback(self._process.wait)
            self._ended = os.pidfd_open(self._process.pid)
            undo.callback(os.close, self._ended)
            super().__init__(ours)
            undo.pop_all()

    def hand_over(self) -> int:
        """Return its pidfd. If closing the stream does not end it, whoever has that does."""
        self._handed_over = True
        return os.dup(self._ended)

    def is_up(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """Why it ended, as it said itself."""
        self._log.seek(0)
        said = self._log.read().rstrip(b"\0").decode(errors="replace").splitlines()
        lines = [line for line in said if line.strip() and not re.match("Failed to send .* to syslog", line)]
        return printable(lines[-1][:_LONGEST_LINE]) if lines else f"it ended with status {self._process.poll()}"

    def close(self) -> None:
        if self.fd < 0:
            return
        super().close()
        self._log.close()
        ended = select.poll()
        ended.register(self._ended, select.POLLIN)
        if not ended.poll(_END_SECONDS * 1000):
            if self._handed_over:
                return
            self._process.kill()
        self._process.wait()
        os.close(self._ended)
