"""virtio-vsock (virtio 1.2, section 5.10): stream sockets between the guest and Unix sockets on the host.

Packets of all connections share two queues. A packet from the guest is passed on at once or kept by its connection
(vsock_connection.py), so no connection holds up the queue. When the guest gives a buffer, connections fill it by turns.
"""

import resource
import select
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from offmap.devices.virtio.device import Activation, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import part, scatter
from offmap.devices.virtio.queue import Chain
from offmap.devices.virtio.vsock_connection import Backlog, Connection, State
from offmap.devices.virtio.vsock_host import Greeting, Listener
from offmap.uapi.virtio import vsock as uapi
from offmap.uapi.virtio.config import VIRTIO_ID_VSOCK
from offmap.uapi.virtio.vsock import VIRTIO_VSOCK_HDR, virtio_vsock_hdr

RX, TX, EVENT = range(3)

MAX_CONNECTIONS = 1023  # as Firecracker has
_OTHER_FDS = 160  # fds of everything else: 16 devices with 5 queues, their threads, files and the terminal
_MAX_RESETS = 256  # answers to packets of no connection that may wait for buffers
_BUDGET = 64  # packets in one go and direction
_FIRST_HOST_PORT = 1 << 30  # of those that connect from the host; below are those that listen there
_PORTS = 1 << 30
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Vsock(VirtioDevice):
    """A socket device.

    Args:
        cid: the guest's context id, 3 or more.
        listener: where the host's programs connect; the device then owns it.
        say: takes a line for the user.

    Attributes:
        listener: as given.
    """

    kinds = ("vsock",)
    device_id = VIRTIO_ID_VSOCK
    queue_sizes = (256, 256, 64)

    def __init__(self, cid: int, listener: Listener, say: Callable[[str], None]) -> None:
        self._cid = cid
        self.listener = self._listener = listener
        self._say = say
        self._active = False
        self._connections: dict[tuple[int, int], Connection] = {}  # by (host port, guest port)
        self._leaving: set[Connection] = set()  # the guest is done with them, their host is not
        self._greetings: dict[int, Greeting] = {}  # by fd
        self._turn: dict[Connection, None] = {}  # those that may have a packet for the guest, in order
        self._resets: deque[virtio_vsock_hdr] = deque()
        self._listening = False
        self._held = False  # the guest's packets are not looked at until it has taken our answers
        self._posted: set[Callable[[], None]] = set()  # what goes on later
        self._next_port = 0
        self._refused = False  # a connection from the host
        self._backlog = Backlog()
        # Each takes an fd, and the rest of this process must never run out of fds.
        self._most = min(MAX_CONNECTIONS, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FDS, 1))

    def config(self) -> bytes:
        """struct virtio_vsock_config: the guest's context id."""
        return self._cid.to_bytes(8, "little")

    def activate(self, activation: Activation) -> None:
        rx, tx = activation.queues[RX], activation.queues[TX]
        if rx is None or tx is None:
            raise DriverError("leaves out a receive or a transmit queue")
        self._rx, self._tx = rx, tx
        self._worker = activation.worker
        self._active = True
        self._listen()

    def handle(self, queue: int) -> None:
        if self._active and queue == RX:
            self._deliver()
        elif self._active and queue == TX:
            self._take()
        # The event queue is for migration, which offmap does not have.

    def reset(self) -> None:
        if not self._active:
            return
        self._worker.unwatch(self._listener.fd)
        connections = (*self._connections.values(), *self._leaving)
        for connection in connections:
            connection.drop_backlog()
        sockets = [connection.socket for connection in connections]
        for host in (*sockets, *(greeting.socket for greeting in self._greetings.values())):
            self._worker.unwatch(host.fileno())
            host.close()
        for kept in (self._connections, self._leaving, self._greetings, self._turn, self._resets):
            kept.clear()
        self._active = self._listening = self._held = False

    def close(self) -> None:
        self.reset()
        self._listener.close()

    # From the guest

    def _take(self) -> None:
        queue = self._tx
        try:
            for _ in range(_BUDGET):
                self._held = len(self._resets) >= _MAX_RESETS
                if self._held:
                    break
                chain = queue.take()
                if chain is None:
                    break
                self._take_packet(chain)
                queue.push(chain, 0)
            else:
                self._later(self._take)
        finally:
            queue.notify()
        self._deliver()

    def _take_packet(self, chain: Chain) -> None:
        if chain.readable_bytes < VIRTIO_VSOCK_HDR.size or chain.writable:
            raise DriverError("sends a packet without a header")
        hdr = virtio_vsock_hdr(*VIRTIO_VSOCK_HDR.unpack(b"".join(part(chain.readable, 0, VIRTIO_VSOCK_HDR.size))))
        if hdr.len > chain.readable_bytes - VIRTIO_VSOCK_HDR.size:
            raise DriverError(f"sends a packet of {hdr.len} bytes in {chain.readable_bytes}")
        if hdr.src_cid != self._cid or hdr.dst_cid != uapi.VMADDR_CID_HOST:
            return  # not from it, or not to us (5.10.6.1.1)
        connection = self._connections.get((hdr.dst_port, hdr.src_port))
        if hdr.type != uapi.VIRTIO_VSOCK_TYPE_STREAM:
            self._reset_unknown(hdr)
        elif connection is not None:
            self._advance(connection, hdr, part(chain.readable, VIRTIO_VSOCK_HDR.size, hdr.len))
        elif hdr.op == uapi.VIRTIO_VSOCK_OP_REQUEST:
            self._request(hdr)
        else:
            self._reset_unknown(hdr)

    def _reset_unknown(self, hdr: virtio_vsock_hdr) -> None:
        if hdr.op != uapi.VIRTIO_VSOCK_OP_RST:  # or both sides would send resets for ever
            self._answer_reset(hdr.dst_port, hdr.src_port)

    def _answer_reset(self, host_port: int, guest_port: int) -> None:
        stream, reset = uapi.VIRTIO_VSOCK_TYPE_STREAM, uapi.VIRTIO_VSOCK_OP_RST
        hdr = virtio_vsock_hdr(uapi.VMADDR_CID_HOST, self._cid, host_port, guest_port, 0, stream, reset)
        self._resets.append(hdr)

    def _request(self, hdr: virtio_vsock_hdr) -> None:
        """The guest connects to a port of the host."""
        try:
            if self._full():
                raise BlockingIOError
            host = self._listener.connect(hdr.dst_port)
        except OSError:
            self._reset_unknown(hdr)
            return
        connection = Connection(host, self._cid, hdr.src_port, hdr.dst_port, State.UP, self._backlog)
        self._add(connection).take_credit(hdr)

    def _advance(self, connection: Connection, hdr: virtio_vsock_hdr, payload: Sequence[memoryview]) -> None:
        """A packet of a connection."""
        connection.take_credit(hdr)
        match hdr.op, connection.state:
            case uapi.VIRTIO_VSOCK_OP_RST, _:
                self._leave(connection)
                return
            case uapi.VIRTIO_VSOCK_OP_RESPONSE, State.ASKED:
                connection.state = State.UP
                connection.greet(b"OK %d\n" % connection.host_port)
            case uapi.VIRTIO_VSOCK_OP_RW, State.UP:
                connection.take(payload)
            case uapi.VIRTIO_VSOCK_OP_SHUTDOWN, State.UP:
                connection.take_shutdown(hdr.flags)
            case uapi.VIRTIO_VSOCK_OP_CREDIT_REQUEST, State.UP:
                connection.take_credit_request()
            case uapi.VIRTIO_VSOCK_OP_CREDIT_UPDATE, State.UP:
                pass
            case _:
                connection.failed = True
        self._look(connection)

    # To the guest

    def _deliver(self) -> None:
        """Fill the guest's buffers with what waits for it: one packet of each connection in turn."""
        queue = self._rx
        chain: Chain | None = None
        try:
            for _ in range(_BUDGET):
                if not self._resets and not self._turn:
                    break
                chain = chain or queue.take()
                if chain is None:
                    break
                if chain.writable_bytes <= VIRTIO_VSOCK_HDR.size or chain.readable:
                    raise DriverError(f"gives a receive buffer of {chain.writable_bytes} bytes")
                hdr = self._next_packet(part(chain.writable, VIRTIO_VSOCK_HDR.size))
                if hdr is not None:
                    scatter(VIRTIO_VSOCK_HDR.pack(*hdr), chain.writable)
                    queue.push(chain, VIRTIO_VSOCK_HDR.size + hdr.len)
                    chain = None
            else:
                self._later(self._deliver)
        finally:
            if chain is not None:
                queue.undo_pop()
            queue.notify()
        if self._held and not self._resets:
            self._later(self._take)

    def _next_packet(self, room: Sequence[memoryview]) -> virtio_vsock_hdr | None:
        if self._resets:
            return self._resets.popleft()
        connection = next(iter(self._turn))
        del self._turn[connection]
        hdr = connection.next_packet(room)
        self._look(connection)
        return hdr

    def _later(self, function: Callable[[], None]) -> None:
        """Go on after others have had their turn."""

        def go_on() -> None:
            self._posted.discard(function)
            if self._active:
                function()

        if function not in self._posted:
            self._posted.add(function)  # once: each kick would post another one
            self._worker.post(go_on)

    # The host's side

    def _full(self) -> bool:
        return len(self._connections) + len(self._leaving) + len(self._greetings) >= self._most

    def _listen(self) -> None:
        """Accept connections while there is room for them; the others wait."""
        if self._listening == (not self._full()):
            return
        self._listening = not self._listening
        if self._listening:
            self._worker.watch(self._listener.fd, self._accept)
        else:
            self._worker.unwatch(self._listener.fd)

    def _accept(self, _events: int) -> None:
        try:
            client = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # EMFILE: it would be offered again at once. Who connects now has to wait for another to end.
            if not self._refused:  # said once: guest and host can cause it again and again
                self._refused = True
                self._say(f"vsock: cannot accept a connection: {error.strerror}; no more until one ends")
            self._worker.unwatch(self._listener.fd)
            self._listening = False
            return
        self._greetings[client.fileno()] = Greeting(client)
        self._worker.watch(client.fileno(), partial(self._greeted, client.fileno()), _EVENTS)
        self._listen()

    def _greeted(self, fd: int, events: int) -> None:
        greeting = self._greetings[fd]
        try:
            port = greeting.port()
            over = port is None and events & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR)
        except ValueError:
            port, over = None, True
        if port is None and not over:
            return
        del self._greetings[fd]
        self._worker.unwatch(fd)
        if port is None:
            greeting.socket.close()
            self._listen()
            return
        host_port = self._free_port(port)
        self._add(Connection(greeting.socket, self._cid, port, host_port, State.ASKED, self._backlog))
        self._deliver()

    def _free_port(self, guest_port: int) -> int:
        while True:
            port = _FIRST_HOST_PORT + self._next_port
            self._next_port = (self._next_port + 1) % _PORTS
            if (port, guest_port) not in self._connections:
                return port

    # Connections

    def _add(self, connection: Connection) -> Connection:
        self._connections[connection.host_port, connection.guest_port] = connection
        self._turn[connection] = None
        self._worker.watch(connection.socket.fileno(), partial(self._on_socket, connection), _EVENTS)
        self._listen()
        return connection

    def _on_socket(self, connection: Connection, events: int) -> None:
        connection.events(events)
        self._look(connection)
        self._deliver()

    def _look(self, connection: Connection) -> None:
        """After an event of a connection: end it if it is over, or queue it if it has a packet."""
        if connection.state is State.OVER:
            if connection.drained():
                self._leaving.discard(connection)
                self._forget(connection)
        elif connection.failed or connection.finished():
            del self._connections[connection.host_port, connection.guest_port]
            self._answer_reset(connection.host_port, connection.guest_port)
            self._forget(connection)
        elif connection.has_packet():
            self._turn.setdefault(connection)

    def _leave(self, connection: Connection) -> None:
        """The guest has closed it. Its host may still have to read what was sent."""
        del self._connections[connection.host_port, connection.guest_port]
        connection.state = State.OVER
        self._leaving.add(connection)
        self._turn.pop(connection, None)
        self._look(connection)

    def _forget(self, connection: Connection) -> None:
        self._worker.unwatch(connection.socket.fileno())
        connection.socket.close()
        connection.drop_backlog()
        self._turn.pop(connection, None)
        self._listen()
