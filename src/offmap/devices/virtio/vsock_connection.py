"""One vsock connection: a stream between a port in the guest and a Unix socket on the host (virtio 1.2, 5.10.6).

Flow control is by credit: every packet says how large its sender's buffer is (buf_alloc) and how much it has passed on
(fwd_cnt). The other side sends no more than fits. So a peer that stalls holds up only its own connection. Guest data is
copied only if the host's socket does not take it at once: BUF_ALLOC bytes at most, and MOST_BACKLOG of all connections.
"""

import errno
import os
import select
import socket
from collections.abc import Sequence
from enum import Enum, auto

from offmap.devices.virtio.iov import length, part
from offmap.uapi.virtio import vsock as uapi
from offmap.uapi.virtio.vsock import virtio_vsock_hdr

BUF_ALLOC = 256 << 10  # what Linux's own vsock sockets have (VIRTIO_VSOCK_DEFAULT_BUF_SIZE)
MOST_BACKLOG = 32 << 20  # bytes of all connections of a device; a sender of more is disconnected
_UPDATE_AFTER = BUF_ALLOC // 4  # bytes passed on that the guest is told of by a packet of their own
_U32 = (1 << 32) - 1
_BOTH = uapi.VIRTIO_VSOCK_SHUTDOWN_RCV | uapi.VIRTIO_VSOCK_SHUTDOWN_SEND


class State(Enum):
    ASKED = auto()  # the host wants it, and the guest has not answered
    UP = auto()
    OVER = auto()  # closed for the guest; its data may still be on the way to the host


class Backlog:
    """What all connections of a device keep.

    Attributes:
        size: bytes.
    """

    def __init__(self) -> None:
        self.size = 0


class Connection:
    """The device's side of a connection. The socket must not block.

    Args:
        socket: the host's end.
        guest_cid, guest_port, host_port: its address.
        state: ASKED or UP.
        kept: what all connections of the device keep.

    Attributes:
        readable: the socket may have something for the guest.
        failed: the guest broke the rules, or the socket did: it is to be reset.
    """

    def __init__(
        self, socket: socket.socket, guest_cid: int, guest_port: int, host_port: int, state: State, kept: Backlog
    ) -> None:
        self.socket = socket
        self._kept = kept
        self.guest_port = guest_port
        self.host_port = host_port
        self.state = state
        self.readable = False
        self.failed = False
        self._guest_cid = guest_cid
        # To the guest.
        self._reply = uapi.VIRTIO_VSOCK_OP_REQUEST if state is State.ASKED else uapi.VIRTIO_VSOCK_OP_RESPONSE
        self._sent = 0
        self._peer_buf_alloc = self._peer_fwd_cnt = 0
        self._tell_credit = self._asked_credit = False
        self._ours_down = self._ours_told = 0  # VIRTIO_VSOCK_SHUTDOWN_*: what we do no more, and what the guest knows
        # From the guest.
        self._guest_down = 0
        self._host_told = False  # that nothing more will come
        # In one piece, so that a guest that sends single bytes costs no more memory than these.
        self._backlog = bytearray()
        self._fwd_cnt = self._fwd_told = 0

    # From the guest

    def take_credit(self, hdr: virtio_vsock_hdr) -> None:
        """Take the buffer size and position that every packet of the guest carries."""
        self._peer_buf_alloc, self._peer_fwd_cnt = hdr.buf_alloc, hdr.fwd_cnt
        self._asked_credit = False

    def credit(self) -> int:
        """How many bytes the guest has room for."""
        return max(self._peer_buf_alloc - (self._sent - self._peer_fwd_cnt & _U32), 0)

    def take(self, payload: Sequence[memoryview]) -> None:
        """Bytes from the guest, for the socket."""
        size = length(payload)
        if self._guest_down & uapi.VIRTIO_VSOCK_SHUTDOWN_SEND or len(self._backlog) + size > BUF_ALLOC:
            self.failed = True  # it sends after it ended the stream, or beyond its credit
            return
        done = 0 if self._backlog else self._send(payload)
        if self._kept.size + size - done > MOST_BACKLOG:
            self.failed = True
        elif done < size:
            self._kept.size += size - done
            for piece in part(payload, done):
                self._backlog += piece

    def take_shutdown(self, flags: int) -> None:
        """The guest has ended a direction, or both: VIRTIO_VSOCK_SHUTDOWN_*."""
        new = flags & ~self._guest_down & _BOTH
        self._guest_down |= new
        if new & uapi.VIRTIO_VSOCK_SHUTDOWN_RCV:
            self._shut(socket.SHUT_RD)
        self._shut_if_drained()

    def take_credit_request(self) -> None:
        """The guest wants to know our buffer."""
        self._tell_credit = True

    # From the host's socket

    def events(self, events: int) -> None:
        """Take epoll's events of the socket (edge-triggered)."""
        if events & (select.EPOLLIN | select.EPOLLRDHUP):
            self.readable = True
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self.readable = True
            self._ours_down |= uapi.VIRTIO_VSOCK_SHUTDOWN_RCV
            self.drop_backlog()
        if events & select.EPOLLOUT:
            self._flush()

    def greet(self, line: bytes) -> None:
        """Say `line` to the host, before anything of the guest."""
        if self._send([memoryview(line)], counts=False) < len(line):
            self.failed = True

    def _send(self, payload: Sequence[memoryview], *, counts: bool = True) -> int:
        """Write to the socket. Return how many bytes are done, written or lost."""
        try:
            # Not sendmsg, which could send descriptors: no thread of a VMM has it.
            done = os.writev(self.socket.fileno(), payload) if payload else 0
        except BlockingIOError:
            done = 0
        except OSError:
            # EPIPE: nobody reads there any more. What is on its way is lost, as in any socket.
            self._ours_down |= uapi.VIRTIO_VSOCK_SHUTDOWN_RCV
            done = length(payload)
        if counts:
            self._fwd_cnt += done
            if self._fwd_cnt - self._fwd_told >= _UPDATE_AFTER:
                self._tell_credit = True
        return done

    def _flush(self) -> None:
        while self._backlog:
            with memoryview(self._backlog) as rest:
                done = self._send([rest])
            if not done:
                return
            del self._backlog[:done]
            self._kept.size -= done
        self._shut_if_drained()

    def drop_backlog(self) -> None:
        """Lose what the host has not taken: nobody will."""
        self._kept.size -= len(self._backlog)
        self._fwd_cnt += len(self._backlog)
        self._backlog.clear()

    def _shut_if_drained(self) -> None:
        over = self._guest_down & uapi.VIRTIO_VSOCK_SHUTDOWN_SEND and not self._backlog
        if over and not self._host_told:  # once: each time is an event of the socket
            self._host_told = True
            self._shut(socket.SHUT_WR)

    def _shut(self, how: int) -> None:
        try:
            self.socket.shutdown(how)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def finished(self) -> bool:
        """Whether the guest has closed it, and all that it sent was passed on."""
        return self._guest_down == _BOTH and not self._backlog

    def drained(self) -> bool:
        """Whether all that the guest sent was passed on."""
        return not self._backlog

    # To the guest

    def has_packet(self) -> bool:
        """Whether `next_packet` may have one."""
        if self.state is State.OVER:
            return False
        if self._reply:
            return True
        if self.state is State.ASKED:
            return False
        if self._tell_credit:
            return True
        if self._may_read():  # the end comes behind what is to be read, and that may have to wait for credit
            return self.credit() > 0 or not self._asked_credit
        return bool(self._ours_down & ~self._ours_told)

    def _may_read(self) -> bool:
        done = self._ours_down & uapi.VIRTIO_VSOCK_SHUTDOWN_SEND or self._guest_down & uapi.VIRTIO_VSOCK_SHUTDOWN_RCV
        return self.readable and not done

    def next_packet(self, room: Sequence[memoryview]) -> virtio_vsock_hdr | None:
        """Return the header of the next packet for the guest, or None. Its payload is then in `room`."""
        if self._reply:
            op, self._reply = self._reply, 0
            return self._header(op)
        if self.state is State.UP and self._may_read():
            credit = self.credit()
            if credit and (size := self._read(part(room, 0, credit))):
                self._sent += size
                return self._header(uapi.VIRTIO_VSOCK_OP_RW, size)
            if not credit and not self._asked_credit:
                self._asked_credit = True
                return self._header(uapi.VIRTIO_VSOCK_OP_CREDIT_REQUEST)
        # After the last bytes, not before.
        if self._ours_down & ~self._ours_told and not self._may_read():
            self._ours_told = self._ours_down
            return self._header(uapi.VIRTIO_VSOCK_OP_SHUTDOWN, flags=self._ours_down)
        if self._tell_credit:
            return self._header(uapi.VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        return None

    def _read(self, room: Sequence[memoryview]) -> int:
        """Read from the socket. Return the number of bytes; 0 if there are none, or it has ended."""
        try:
            got = self.socket.recvmsg_into(room)[0] if room else 0
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError:  # ECONNRESET: it was closed with something unread
            got = 0
            self._ours_down |= uapi.VIRTIO_VSOCK_SHUTDOWN_RCV
        if not got:
            self.readable = False
            self._ours_down |= uapi.VIRTIO_VSOCK_SHUTDOWN_SEND
        return got

    def _header(self, op: int, size: int = 0, flags: int = 0) -> virtio_vsock_hdr:
        self._tell_credit = False
        self._fwd_told = self._fwd_cnt
        return virtio_vsock_hdr(
            uapi.VMADDR_CID_HOST,
            self._guest_cid,
            self.host_port,
            self.guest_port,
            size,
            uapi.VIRTIO_VSOCK_TYPE_STREAM,
            op,
            flags,
            BUF_ALLOC,
            self._fwd_cnt & _U32,
        )
